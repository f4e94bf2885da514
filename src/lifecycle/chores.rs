//! What each tick does that may have to wait for a disk.

use super::{Lifecycle, chain, page_cache::drop_page_cache, room::keep_room, stale::confirm_clock};

impl Lifecycle {
    /// Does what each tick does that may have to wait for a disk. The next tick tries again what
    /// fails.
    pub fn do_chores(&self) {
        trim_consoles(self);
        drop_page_cache(self);
        keep_room(self);
        self.records.keep_reserve();
        if let Err(error) = self.activity.flush() {
            tracing::error!(error = chain(&error), "writing activity to the index");
        }
        if let Err(error) = self.activity.forget_released_holds() {
            tracing::error!(error = chain(&error), "forgetting holds that have ended");
        }
        if let Err(error) = confirm_clock(self) {
            tracing::warn!(error = chain(&error), "recording that the wall clock is synchronised");
        }
    }
}

/// Drops what is too old of the consoles of all that run.
pub(super) fn trim_consoles(lifecycle: &Lifecycle) {
    for (row, _) in lifecycle.machines.all() {
        let Some(entry) = lifecycle.by_row(row) else { continue };
        if let Err(error) = lifecycle.store.console(&entry.record()).trim() {
            tracing::warn!(id = %entry.id(), %error, "trimming a console");
        }
    }
}
