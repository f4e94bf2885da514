//! A sandbox's own copies of its writable disks.

use std::{io, path::PathBuf};

use super::{
    Error, Lifecycle,
    error::{host_failed, snapshot_failed},
    files::{Files, files_of},
    operation::Op,
    store::free_name,
    undo::ActId,
};
use crate::{
    sandbox::{Disk, Record, Spec},
    snapshot::{Home, SLEEP_RESERVE_BYTES},
    sys::files::{PieceError, bytes_to_copy, make_copy, remove_file, rename_durably},
};

/// More disks than any machine has.
const MAX_DISKS: usize = 16;

/// Makes the copies that the sandbox does not have yet. They are removed if the boot fails,
/// unless the guest may have run by then: the caller has what it returns forgotten.
///
/// A copy takes as long as it takes, so those who copy have a place of their own and wait
/// for none of those who wake.
pub(super) fn make_disks<'a>(
    lifecycle: &'a Lifecycle,
    op: &mut Op<'a>,
    files: &Files,
) -> Result<Option<ActId>, Error> {
    let entry = op.entry;
    let record = entry.record();
    let home = lifecycle.store.home(&record);
    let missing: Vec<_> = missing_disks(&record, &home).collect();
    if missing.is_empty() {
        return Ok(None);
    }
    let place = lifecycle.admission.copy(&record.id, &op.cancel)?;
    let (mut bytes, mut images) = (0, Vec::new());
    for (number, disk) in &missing {
        let image = files.image(disk).and_then(|image| {
            bytes += bytes_to_copy(&image.size, home.dir())?;
            Ok(image)
        });
        let image = image.map_err(host_failed(entry, "measuring a disk of"))?;
        images.push((home.disk(*number), &disk.path, image));
    }
    home.check_space(bytes + SLEEP_RESERVE_BYTES)
        .map_err(snapshot_failed(entry, "finding space for the disks of"))?;
    let copies: Vec<_> = images.iter().map(|(copy, ..)| copy.clone()).collect();
    let removing = op.undo.push("removing its copies of disks", move || {
        copies.iter().try_for_each(|copy| Ok(remove_file(copy)?))
    });
    let named = files_of(lifecycle, &record, &op.cancel);
    for (copy, path, image) in images {
        let copied = make_copy(&copy, &op.cancel, |target| {
            // What does not answer keeps nobody else from copying.
            place.asked();
            named.copy(path, image, target, &mut || place.asked())?;
            place.answered();
            Ok(())
        });
        copied.map_err(|error| match error {
            PieceError::CalledOff(_) => Error::Gone { id: record.id.clone() },
            PieceError::Io(source) => {
                let why = format!("{}: {source}", path.display());
                host_failed(entry, "copying a disk of")(io::Error::new(source.kind(), why))
            }
        })?;
    }
    Ok(Some(removing))
}

/// Lists the writable disks that the sandbox has no copy of, with their numbers.
fn missing_disks<'a>(
    record: &'a Record,
    home: &'a Home,
) -> impl Iterator<Item = (usize, &'a Disk)> {
    let disks = record.spec.disks.iter().enumerate();
    disks.filter(|(number, disk)| !disk.readonly && !home.disk(*number).exists())
}

/// Keeps the disks that `after` does not have in their places, under names that say which image
/// they were copied from. They may hold work; a config that names the image again gets them back.
pub(super) fn set_aside_changed_disks(
    home: &Home,
    before: &Record,
    after: &Spec,
) -> io::Result<()> {
    for (number, disk) in before.spec.disks.iter().enumerate() {
        let same = after.disks.get(number) == Some(disk);
        let own = home.disk(number);
        if same || disk.readonly || !own.try_exists()? {
            continue;
        }
        let mut kept = home.kept_disk(number, &disk.path);
        if kept.try_exists()? {
            kept = free_name(&kept);
        }
        tracing::info!(id = %before.id, disk = %kept.display(), "kept a disk that was replaced");
        rename_durably(&own, &kept)?;
    }
    Ok(())
}

/// Moves the disks that were set aside, and that the config names again, back into their places.
/// Of several that were copied from one image each goes first to the number that it had.
pub(super) fn take_back_disks(home: &Home, record: &Record) -> io::Result<()> {
    let disks = || record.spec.disks.iter().enumerate().filter(|(_, disk)| !disk.readonly);
    for (number, disk) in disks() {
        take_back(home, record, number, &[home.kept_disk(number, &disk.path)])?;
    }
    for (number, disk) in disks() {
        let kept: Vec<_> = (0..MAX_DISKS).map(|had| home.kept_disk(had, &disk.path)).collect();
        take_back(home, record, number, &kept)?;
    }
    Ok(())
}

/// Moves the first of `kept` that exists to the place of a disk, if that is free.
fn take_back(home: &Home, record: &Record, number: usize, kept: &[PathBuf]) -> io::Result<()> {
    let own = home.disk(number);
    if own.try_exists()? {
        return Ok(());
    }
    for kept in kept {
        if kept.try_exists()? {
            tracing::info!(id = %record.id, disk = %kept.display(), "took back a disk");
            return rename_durably(kept, &own);
        }
    }
    Ok(())
}
