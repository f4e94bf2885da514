//! Which files are documents, and what each of them says.

use crate::{
    lifecycle::Policy,
    sandbox::{
        Spec,
        network::{Destinations, Nameservers},
    },
    tree::{
        File, Node,
        command::{self, BadCommand},
    },
};

/// The files that are documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::tree) enum DocumentKind {
    Config,
    Nameservers,
    Denied,
    Allowed,
}

impl DocumentKind {
    const ALL: [Self; 4] = [Self::Config, Self::Nameservers, Self::Denied, Self::Allowed];

    /// Returns what kind of document a node is, if it is one.
    pub(in crate::tree) fn of(node: Node) -> Option<Self> {
        let Node::File(_, file) = node else { return None };
        Self::ALL.into_iter().find(|kind| kind.file() == file)
    }

    fn file(self) -> File {
        match self {
            Self::Config => File::Config,
            Self::Nameservers => File::Nameservers,
            Self::Denied => File::Denied,
            Self::Allowed => File::Allowed,
        }
    }

    /// Returns what it reads as.
    pub(in crate::tree) fn text(self, spec: &Spec) -> String {
        match self {
            Self::Config => spec.to_toml(),
            Self::Nameservers => spec.nameservers.to_string(),
            Self::Denied => spec.denied.to_string(),
            Self::Allowed => spec.allowed.to_string(),
        }
    }

    /// Reads a list of `net/`; `None` for a `config`, which is none.
    pub(super) fn list(self, text: &[u8]) -> Option<Result<Policy, BadCommand>> {
        Some(match self {
            Self::Config => return None,
            Self::Nameservers => {
                command::list(text, |lines| Nameservers::read(lines)).map(Policy::Nameservers)
            }
            Self::Denied => {
                command::list(text, |lines| Destinations::denied(lines)).map(Policy::Denied)
            }
            Self::Allowed => {
                command::list(text, |lines| Destinations::allowed(lines)).map(Policy::Allowed)
            }
        })
    }
}
