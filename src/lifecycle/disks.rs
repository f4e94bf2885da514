//! A sandbox's own copies of its writable disks.

use std::{cell::Cell, rc::Rc};

use super::{
    Entry, Error, Lifecycle,
    files::Files,
    operation::Operation,
    undo::Undo,
    wake::{host_failed, snapshot_failed},
};
use crate::{
    sandbox::{Disk, Record},
    snapshot::{Home, SLEEP_RESERVE_BYTES},
    sync::Arc,
    sys::files::{PieceError, bytes_to_copy, copy_image, remove_file},
};

impl Lifecycle {
    /// Makes the copies that the sandbox does not have yet. They are removed if the boot fails,
    /// unless the guest may have run by then, which the caller notes in what this returns.
    ///
    /// A copy takes as long as it takes, so those who copy have a place of their own and wait
    /// for none of those who wake.
    pub(super) fn make_disks<'a>(
        &'a self,
        entry: &'a Arc<Entry>,
        files: &Files,
        operation: &Operation<'_>,
        undo: &mut Undo<'a>,
    ) -> Result<Rc<Cell<bool>>, Error> {
        let may_have_run = Rc::new(Cell::new(false));
        let record = entry.record();
        let home = self.home(&record);
        let missing: Vec<_> = missing_disks(&record, &home).collect();
        if missing.is_empty() {
            return Ok(may_have_run);
        }
        let _place = self.admission.copy(&record.id, &operation.cancel)?;
        let mut bytes = 0;
        for (_, disk) in &missing {
            bytes += bytes_to_copy(&files.disk(disk), home.dir())
                .map_err(host_failed(entry, "measuring a disk of"))?;
        }
        home.check_space(bytes + SLEEP_RESERVE_BYTES)
            .map_err(snapshot_failed(entry, "finding space for the disks of"))?;
        let (copies, ran) = (missing.iter().map(|(number, _)| home.disk(*number)), &may_have_run);
        let (copies, ran): (Vec<_>, _) = (copies.collect(), Rc::clone(ran));
        undo.push("removing its copies of disks", move || {
            if ran.get() {
                return Ok(());
            }
            copies.iter().try_for_each(|copy| Ok(remove_file(copy)?))
        });
        for (number, disk) in missing {
            let copied = copy_image(&files.disk(disk), &home.disk(number), &operation.cancel);
            copied.map_err(|error| match error {
                PieceError::CalledOff(_) => Error::Gone { id: record.id.clone() },
                PieceError::Io(source) => host_failed(entry, "copying a disk of")(source),
            })?;
        }
        Ok(may_have_run)
    }
}

/// Lists the writable disks that the sandbox has no copy of, with their numbers.
fn missing_disks<'a>(
    record: &'a Record,
    home: &'a Home,
) -> impl Iterator<Item = (usize, &'a Disk)> {
    let disks = record.spec.disks.iter().enumerate();
    disks.filter(|(number, disk)| !disk.readonly && !home.disk(*number).exists())
}
