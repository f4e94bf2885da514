//! How a request is answered: at once from memory, or by a job.

use std::fmt;

use super::Errno;

/// Work that may take long; its result answers the request.
pub type Job<T> = Box<dyn FnOnce() -> Result<T, Errno> + Send>;

/// How a request is answered.
pub enum Answer<T> {
    /// At once, from memory.
    Now(Result<T, Errno>),
    /// By a job.
    Job(Work, Job<T>),
    /// At once with success. The job is started if there is a thread for it, and nobody waits
    /// for its result.
    Started(T, Job<()>),
}

/// What a job does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// It reads, and may wait for a disk or the kernel. A caller that is signalled gets EINTR,
    /// and then nobody needs it.
    Read,
    /// It changes a sandbox. A caller that is signalled gets EINTR, and it goes on.
    Change,
    /// It changes names or attributes, which the kernel remembers as they are answered. So its
    /// caller waits for it, also when signalled.
    Attributes,
}

impl<T> Answer<T> {
    /// Answers by a job.
    pub(super) fn job(work: Work, job: impl FnOnce() -> Result<T, Errno> + Send + 'static) -> Self {
        Self::Job(work, Box::new(job))
    }

    /// Returns the answer, and waits for it.
    ///
    /// # Errors
    /// Those of the answer.
    pub fn wait(self) -> Result<T, Errno> {
        match self {
            Self::Now(result) => result,
            Self::Job(_, job) => job(),
            Self::Started(value, job) => job().map(|()| value),
        }
    }
}

impl<T: fmt::Debug> fmt::Debug for Answer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Now(result) => f.debug_tuple("Now").field(result).finish(),
            Self::Job(work, _) => f.debug_tuple("Job").field(work).finish(),
            Self::Started(value, _) => f.debug_tuple("Started").field(value).finish(),
        }
    }
}

impl<T> From<Result<T, Errno>> for Answer<T> {
    fn from(result: Result<T, Errno>) -> Self {
        Self::Now(result)
    }
}

impl<T> From<Errno> for Answer<T> {
    fn from(errno: Errno) -> Self {
        Self::Now(Err(errno))
    }
}
