//! Why a request failed, in the real program's words.

use std::{error::Error, fmt, io};

/// A chain of errors, outermost first, and what kind the HTTP status goes by.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) kind: Kind,
    pub(crate) chain: Vec<String>,
}

/// What the HTTP status goes by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// 500.
    Internal,
    /// 400.
    Request,
    /// 404: there is no such endpoint.
    Endpoint,
    /// 404 or 500, by version: there is no VM.
    NoVm,
    /// 400 or 500, by version: the configuration is not valid.
    Config,
}

impl Failure {
    /// An error of the VMM.
    pub(crate) fn new(said: &str) -> Self {
        Self { kind: Kind::Internal, chain: vec![said.to_owned()] }
    }

    /// An error of this kind.
    pub(crate) fn of(kind: Kind, said: &str) -> Self {
        Self { kind, chain: vec![said.to_owned()] }
    }

    /// Puts `said` around the chain, as an error has its source.
    #[must_use]
    pub(crate) fn within(mut self, said: &str) -> Self {
        self.chain.insert(0, said.to_owned());
        self
    }

    /// A VM whose configuration is not valid.
    pub(crate) fn config(said: &str) -> Self {
        Self::of(Kind::Config, said).within("Failed to validate config")
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::new(&error.to_string())
    }
}

impl From<rustix::io::Errno> for Failure {
    fn from(error: rustix::io::Errno) -> Self {
        io::Error::from(error).into()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.chain.join(": "))
    }
}

impl Error for Failure {}

/// Puts words around what failed.
pub(crate) trait Within<T> {
    /// Puts `said` around the failure, if it is one.
    fn within(self, said: &str) -> Result<T, Failure>;
}

impl<T, E: Into<Failure>> Within<T> for Result<T, E> {
    fn within(self, said: &str) -> Result<T, Failure> {
        self.map_err(|error| error.into().within(said))
    }
}
