//! Who looks, and what they may see of all sandboxes together.

use std::cell::OnceCell;

use super::Caller;
use crate::{lifecycle::Viewer, sandbox::Owner, sys::task::groups_of};

/// Returns who looks, with all of their groups. Called by a job, unless for root: a thread may
/// be in very many groups.
pub(super) fn viewer(caller: Caller) -> Viewer {
    let Caller { uid, gid, tid } = caller;
    // Root sees everything, so its groups need not be looked up.
    let groups = if uid == 0 { Vec::new() } else { groups_of(tid, uid, gid) };
    Viewer::new(uid, gid, &groups)
}

/// What somebody may see. Their groups are looked up only where one of them decides.
#[derive(Debug)]
pub(super) struct Seeing {
    caller: Caller,
    without_groups: Viewer,
    with_groups: OnceCell<Viewer>,
}

impl Seeing {
    pub(super) fn of(caller: Caller) -> Self {
        let without_groups = Viewer::new(caller.uid, caller.gid, &[]);
        Self { caller, without_groups, with_groups: OnceCell::new() }
    }

    /// Says whether they may see what `owner` has. Called by a job.
    pub(super) fn may_see(&self, owner: Owner) -> bool {
        self.without_groups.may_see(owner)
            || self.with_groups.get_or_init(|| viewer(self.caller)).may_see(owner)
    }
}
