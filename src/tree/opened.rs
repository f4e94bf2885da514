//! Who opened a file, and what for.

use crate::{lifecycle::Wait, sandbox::Owner};

/// Who opened a file of a sandbox, and whose that was then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct OpenedBy {
    pub(super) uid: u32,
    pub(super) owner: Owner,
}

impl OpenedBy {
    /// Says whether it is of no more use, as the sandbox is `owner`'s now. It was opened with
    /// the rights of then: root's go on, and those of the group where that is the same.
    pub(super) fn has_ended(self, owner: Owner) -> bool {
        let Self { uid, owner: before } = self;
        let is_of_group = before.gid == owner.gid && uid != before.uid;
        owner != before && uid != 0 && uid != owner.uid && !is_of_group
    }
}

/// What a file is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reading.
    Read,
    /// Writing, and perhaps reading.
    Write,
    /// The same, by a caller who does not wait.
    WriteNonblocking,
    /// Writing at the end.
    Append,
    /// The same, by a caller who does not wait.
    AppendNonblocking,
}

impl Access {
    pub(super) fn wait(self) -> Wait {
        match self {
            Self::Read | Self::Write | Self::Append => Wait::ForIt,
            Self::WriteNonblocking | Self::AppendNonblocking => Wait::Never,
        }
    }

    pub(super) fn is_append(self) -> bool {
        matches!(self, Self::Append | Self::AppendNonblocking)
    }
}
