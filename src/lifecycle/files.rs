//! The files that a spec names: kernel, initial RAM file system and disks.
//!
//! Whoever writes a `config` names them, and a VMM opens them with rights that its writer may
//! not have. So they are opened as whoever wrote it, each time that a machine is to use them,
//! and from then on it is what is open that is used. Root may name what it likes, and what it
//! names in `[template]` is for everybody.
//!
//! The daemon itself never looks at such a path, nor reads what is there: it may lead to a file
//! system that does not answer, or to the daemon's own tree. See [`opener`](crate::sys::opener).
//! That goes for `[template]` too.

use std::{
    cell::{OnceCell, RefCell},
    fs::File,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use super::{
    Error, Lifecycle,
    images::{why_too_large, why_unfit},
};
use crate::{
    sandbox::{Disk, FileRole, Record, Spec, Writer},
    snapshot::{DiskFacts, Home},
    sync::Arc,
    sys::{
        cancel::Cancel,
        files::{Opened, handle_path},
        host::own_ids,
        opener::{Opener, Rights},
    },
    vmm::{DiskKind, PlannedDisk, Vmm},
};

/// What is wrong with a file that a `config` names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unusable {
    /// A sentence about it.
    pub why: String,
    /// Whether it is that who wrote the `config` may not have it.
    pub is_denied: bool,
}

/// Opens files that one writer has named in a `config`. Processes do it, one for each kind of
/// rights, which are started when they are first needed.
#[derive(Debug)]
pub struct NamedFiles<'a> {
    lifecycle: &'a Lifecycle,
    /// Who wrote the `config`; `None` where nobody did.
    writer: Option<&'a Writer>,
    /// What calls off the operation that they are opened for.
    cancel: Option<&'a Cancel>,
    theirs: OnceCell<Opener>,
    ours: OnceCell<Opener>,
    /// What was found in order.
    looked_at: RefCell<Vec<(FileRole, PathBuf, Opened)>>,
}

/// Files of a sandbox that were opened for an operation, by their paths.
#[derive(Debug, Default)]
pub(super) struct Files(Vec<(PathBuf, Opened)>);

impl Files {
    /// Returns the file that is named so, if it was opened.
    pub(super) fn opened(&self, named: &Path) -> Option<&Opened> {
        self.0.iter().find(|(path, _)| path == named).map(|(_, file)| file)
    }

    /// Returns the path to use for the file that is named so, if it was opened.
    pub(super) fn path(&self, named: &Path) -> Option<PathBuf> {
        self.opened(named).map(|file| handle_path(&file.file))
    }

    /// Plans a disk, of which the sandbox's own copy is at `own`, if it may be written to.
    pub(super) fn planned(&self, disk: &Disk, own: PathBuf) -> PlannedDisk {
        if !disk.readonly {
            return PlannedDisk { path: own, kind: DiskKind::Own };
        }
        // A machine that is there already has it, by whatever path.
        let file = self.opened(&disk.path);
        let path = file.map_or_else(|| disk.path.clone(), |file| handle_path(&file.file));
        let is_device = file.is_some_and(|file| file.is_device);
        let kind = if is_device { DiskKind::SharedDevice } else { DiskKind::Shared };
        PlannedDisk { path, kind }
    }

    /// Returns the image of a disk, which an operation that needs it has opened.
    pub(super) fn image(&self, disk: &Disk) -> io::Result<&Opened> {
        self.opened(&disk.path).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Refuses to boot with files that no machine boots with. A copy of a disk that the sandbox
    /// has already is its guest's, which may write there what it likes.
    pub(super) fn check(&self, record: &Record, home: &Home) -> Result<(), Error> {
        let unbootable = |why| Err(Error::Unbootable { id: record.id.clone(), why });
        let spec = &record.spec;
        let kernel = spec.kernel.iter().map(|path| (path, FileRole::Kernel));
        let initramfs = spec.initramfs.iter().map(|path| (path, FileRole::Initramfs));
        let disks = spec.disks.iter().enumerate();
        let disks = disks.filter(|(number, disk)| disk.readonly || !home.disk(*number).exists());
        let disks = disks.map(|(_, disk)| (&disk.path, FileRole::Disk { readonly: disk.readonly }));
        for (path, role) in kernel.chain(initramfs).chain(disks) {
            if let Some(why) = self.opened(path).and_then(|file| why_unfit(path, role, file)) {
                return unbootable(format!("{} {why}", path.display()));
            }
        }
        let loaded = |path: &Option<PathBuf>| path.as_ref().and_then(|path| self.opened(path));
        why_too_large(spec.memory_bytes, loaded(&spec.kernel), loaded(&spec.initramfs))
            .map_or(Ok(()), unbootable)
    }

    /// Refuses a block device that has another size than when the sandbox fell asleep. After a
    /// boot of the host another may have its name.
    fn check_devices(&self, record: &Record, asleep: &[DiskFacts]) -> Result<(), Error> {
        for (disk, then) in record.spec.disks.iter().zip(asleep) {
            let Some(file) = self.opened(&disk.path).filter(|file| file.is_device) else {
                continue;
            };
            let (now, then) = (file.size.bytes, then.bytes);
            if now != then {
                let path = disk.path.display();
                let why = format!(
                    "{path} has {now} bytes, and had {then} when it fell asleep; have that name \
                     lead to the device that it led to"
                );
                return Err(Error::Foreign { id: record.id.clone(), why });
            }
        }
        Ok(())
    }

    /// Returns what has to stay open for these paths.
    pub(super) fn held(&self) -> Vec<Arc<OwnedFd>> {
        self.0.iter().map(|(_, file)| Arc::clone(&file.file)).collect()
    }
}

impl NamedFiles<'_> {
    /// Returns what is wrong with a file that is named in the `config`, if anything.
    #[must_use]
    pub fn why_unusable(&self, path: &Path, role: FileRole) -> Option<Unusable> {
        let file = match self.open(path) {
            Ok(file) => file,
            Err(error) => return Some(self.unusable(path, &error)),
        };
        let unfit = why_unfit(path, role, &file);
        self.looked_at.borrow_mut().push((role, path.to_owned(), file));
        unfit.map(|why| Unusable { why: format!("it {why}"), is_denied: false })
    }

    /// Returns why kernel and initial RAM file system do not fit into the memory of `spec`, in
    /// so far as its `config` names them.
    #[must_use]
    pub fn why_too_large(&self, spec: &Spec) -> Option<String> {
        let looked_at = self.looked_at.borrow();
        let find = |role, path: &Option<PathBuf>| {
            let is_it = |(as_what, at, _): &&(FileRole, PathBuf, Opened)| {
                *as_what == role && path.as_ref() == Some(at)
            };
            looked_at.iter().find(is_it).map(|(_, _, file)| file)
        };
        let kernel = find(FileRole::Kernel, &spec.kernel);
        why_too_large(spec.memory_bytes, kernel, find(FileRole::Initramfs, &spec.initramfs))
    }

    fn unusable(&self, path: &Path, error: &io::Error) -> Unusable {
        let denied = match rights(self.lifecycle, self.writer, path) {
            Rights::Of(writer) if error.kind() == io::ErrorKind::PermissionDenied => Some(writer),
            Rights::Of(_) | Rights::Ours => None,
        };
        let why = if let Some(Writer { uid, gid, .. }) = &denied {
            format!(
                "you (uid {uid}, gid {gid}) may not read it; the writer of a `config` must be \
                 able to read the files that it names, except those that [template] names"
            )
        } else if error.kind() == io::ErrorKind::NotFound {
            "there is no such file; write the path of one".to_owned()
        } else {
            format!("{error}; write the path of a file")
        };
        Unusable { why, is_denied: denied.is_some() }
    }

    /// Opens a file with the rights by which it was named.
    fn open(&self, path: &Path) -> io::Result<Opened> {
        self.opener(path)?.open(path)
    }

    /// Fills `target`, an empty file, with what is in the file that was opened at `path`.
    /// `progress` is called for each piece.
    pub(super) fn copy(
        &self,
        path: &Path,
        file: &Opened,
        target: &File,
        progress: &mut dyn FnMut(),
    ) -> io::Result<()> {
        self.opener(path)?.copy(file, target, progress)
    }

    fn open_all<'a>(
        &self,
        record: &Record,
        paths: impl IntoIterator<Item = &'a PathBuf>,
    ) -> Result<Files, Error> {
        let files = paths.into_iter().map(|path| match self.open(path) {
            Ok(file) => Ok((path.clone(), file)),
            Err(source) => Err(unopened(self.lifecycle, record, path, source)),
        });
        files.collect::<Result<_, _>>().map(Files)
    }

    fn opener(&self, path: &Path) -> io::Result<&Opener> {
        let rights = rights(self.lifecycle, self.writer, path);
        let place = match rights {
            Rights::Ours => &self.ours,
            Rights::Of(_) => &self.theirs,
        };
        if let Some(opener) = place.get() {
            return Ok(opener);
        }
        let started = self.lifecycle.openers.start(&rights)?;
        if let Some(cancel) = self.cancel {
            started.ends_with(cancel);
        }
        Ok(place.get_or_init(|| started))
    }
}

impl Lifecycle {
    /// Returns what opens the files that `writer` names in a `config`.
    #[must_use]
    pub fn named_files<'a>(&'a self, writer: &'a Writer) -> NamedFiles<'a> {
        NamedFiles::new(self, Some(writer), None)
    }
}

impl<'a> NamedFiles<'a> {
    fn new(
        lifecycle: &'a Lifecycle,
        writer: Option<&'a Writer>,
        cancel: Option<&'a Cancel>,
    ) -> Self {
        let (theirs, ours, looked_at) = Default::default();
        Self { lifecycle, writer, cancel, theirs, ours, looked_at }
    }
}

/// Returns what opens the files of a sandbox, for an operation.
pub(super) fn files_of<'a>(
    lifecycle: &'a Lifecycle,
    record: &'a Record,
    cancel: &'a Cancel,
) -> NamedFiles<'a> {
    NamedFiles::new(lifecycle, record.config_by.as_deref(), Some(cancel))
}

/// Opens what is used of such files by a boot.
pub(super) fn open_to_boot(
    lifecycle: &Lifecycle,
    record: &Record,
    home: &Home,
    cancel: &Cancel,
) -> Result<Files, Error> {
    let spec = &record.spec;
    // Of a disk that was copied the original is not needed any more.
    let disks = spec.disks.iter().enumerate();
    let disks = disks.filter(|(number, disk)| disk.readonly || !home.disk(*number).exists());
    let disks = disks.map(|(_, disk)| &disk.path);
    let paths = spec.kernel.iter().chain(&spec.initramfs).chain(disks);
    files_of(lifecycle, record, cancel).open_all(record, paths)
}

/// Opens what is used of such files by a wake: kernel and initial RAM file system only
/// where `vmm` may read them again, and if there are any. `asleep` are the disks as they were
/// when it fell asleep.
pub(super) fn open_to_wake(
    lifecycle: &Lifecycle,
    record: &Record,
    asleep: &[DiskFacts],
    vmm: &dyn Vmm,
    cancel: &Cancel,
) -> Result<Files, Error> {
    let spec = &record.spec;
    let named = files_of(lifecycle, record, cancel);
    let mut files = named.open_all(record, shared_disks(record))?;
    files.check_devices(record, asleep)?;
    if vmm.reads_kernel_again() {
        let dispensable = spec.kernel.iter().chain(&spec.initramfs);
        let opened = dispensable.filter_map(|path| Some((path.clone(), named.open(path).ok()?)));
        files.0.extend(opened);
    }
    Ok(files)
}

/// Opens the disks that a machine uses where they are.
pub(super) fn open_disks(
    lifecycle: &Lifecycle,
    record: &Record,
    cancel: &Cancel,
) -> Result<Files, Error> {
    files_of(lifecycle, record, cancel).open_all(record, shared_disks(record))
}

fn unopened(lifecycle: &Lifecycle, record: &Record, path: &Path, source: io::Error) -> Error {
    let (id, path) = (record.id.clone(), path.to_owned());
    // What is no file, and where nothing answers, is so for everybody.
    let is_same_for_all =
        matches!(source.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::TimedOut);
    match rights(lifecycle, record.config_by.as_deref(), &path) {
        Rights::Of(Writer { uid, gid, .. }) if !is_same_for_all => {
            Error::NotWriters { id, path, uid, gid, source }
        }
        Rights::Ours | Rights::Of(_) => Error::Unopened { id, path, source },
    }
}

/// Returns with whose rights a file is opened that `writer` names, or the template of an
/// earlier daemon.
fn rights(lifecycle: &Lifecycle, writer: Option<&Writer>, path: &Path) -> Rights {
    match writer {
        Some(writer) if writer.uid != own_ids().0 && !is_of_template(lifecycle, path) => {
            Rights::Of(writer.clone())
        }
        Some(_) | None => Rights::Ours,
    }
}

fn is_of_template(lifecycle: &Lifecycle, path: &Path) -> bool {
    lifecycle.settings.template.files().any(|named| named == path)
}

/// Lists the images that the guest of a sandbox only reads.
fn shared_disks(record: &Record) -> impl Iterator<Item = &PathBuf> {
    record.spec.disks.iter().filter(|disk| disk.readonly).map(|disk| &disk.path)
}
