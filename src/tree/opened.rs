//! Who opened a file.

use crate::sandbox::Owner;

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
