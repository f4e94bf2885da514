//! The files that a spec names: kernel, initial RAM file system and disks.
//!
//! Whoever writes a `config` names them, and a VMM opens them with rights that its writer may
//! not have. So they are opened as whoever wrote it, each time that a machine is to use them,
//! and from then on it is what is open that is used. Root may name what it likes, and what it
//! names in `[template]` is for everybody.
//!
//! The daemon itself never looks at a path of a `config`, which may lead to a file system that
//! does not answer, or to the daemon's own tree: see [`opener`](crate::sys::opener). What
//! `[template]` names is used by its path, so that a wake without any other file starts no
//! process.

use std::{
    cell::OnceCell,
    fs::File,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use super::{Error, Lifecycle};
use crate::{
    sandbox::{Disk, Record, Writer},
    snapshot::Home,
    sync::Arc,
    sys::{
        cancel::Cancel,
        files::{ImageSize, Opened, handle_path, open_image, read_start},
        host::own_ids,
        opener::{Opener, Rights},
    },
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
    writer: &'a Writer,
    /// What calls off the operation that they are opened for.
    cancel: Option<&'a Cancel>,
    theirs: OnceCell<Opener>,
    ours: OnceCell<Opener>,
}

/// Files of a sandbox, in so far as they are not used by their own paths.
#[derive(Debug, Default)]
pub(super) struct Files(Vec<(PathBuf, Option<Opened>)>);

impl Files {
    /// Returns the path to use for the file that is named so; `None` if it cannot be had.
    pub(super) fn path(&self, named: &Path) -> Option<PathBuf> {
        match self.find(named) {
            None => Some(named.to_owned()),
            Some(file) => file.map(|file| handle_path(&file.file)),
        }
    }

    /// Returns the path to use for the image of a disk, which is never done without.
    pub(super) fn disk(&self, disk: &Disk) -> PathBuf {
        self.path(&disk.path).unwrap_or_else(|| disk.path.clone())
    }

    /// Returns the first bytes of the file that is named so.
    pub(super) fn start(&self, named: &Path) -> io::Result<Vec<u8>> {
        match self.find(named) {
            None => read_start(named),
            Some(Some(file)) => Ok(file.start.clone()),
            Some(None) => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Returns the image of a disk, open for reading, and its sizes.
    pub(super) fn image(&self, disk: &Disk) -> io::Result<(File, ImageSize)> {
        if let Some(file) = self.find(&disk.path) {
            let file = file.ok_or(io::ErrorKind::NotFound)?;
            return Ok((file.file.try_clone()?.into(), file.size));
        }
        let file = open_image(&disk.path)?;
        let size = ImageSize::of(&file)?;
        Ok((file, size))
    }

    /// Returns the length of the image of a disk, in bytes.
    pub(super) fn bytes(&self, disk: &Disk) -> io::Result<u64> {
        match self.find(&disk.path) {
            None => Ok(disk.path.metadata()?.len()),
            Some(Some(file)) => Ok(file.size.bytes),
            Some(None) => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Returns what has to stay open for these paths.
    pub(super) fn held(&self) -> Vec<Arc<OwnedFd>> {
        let files = self.0.iter().filter_map(|(_, file)| file.as_ref());
        files.map(|file| Arc::clone(&file.file)).collect()
    }

    /// Returns what became of the file that is named so; `None` if it is used by its path.
    fn find(&self, named: &Path) -> Option<Option<&Opened>> {
        self.0.iter().find(|(path, _)| path == named).map(|(_, file)| file.as_ref())
    }
}

impl NamedFiles<'_> {
    /// Returns what is wrong with a file that is named in the `config`, if anything.
    #[must_use]
    pub fn why_unusable(&self, path: &Path) -> Option<Unusable> {
        let error = self.open(path).err()?;
        let is_denied = error.kind() == io::ErrorKind::PermissionDenied
            && matches!(self.lifecycle.rights(self.writer, path), Rights::Of(_));
        let why = if is_denied {
            let Writer { uid, gid, .. } = self.writer;
            format!(
                "you (uid {uid}, gid {gid}) may not read it; whoever writes a `config` has to be \
                 allowed to read what it names, but for what [template] names"
            )
        } else if error.kind() == io::ErrorKind::NotFound {
            "there is no such file; write the path of one".to_owned()
        } else {
            format!("{error}; write the path of a file")
        };
        Some(Unusable { why, is_denied })
    }

    /// Opens a file with the rights by which it was named.
    fn open(&self, path: &Path) -> io::Result<Opened> {
        let rights = self.lifecycle.rights(self.writer, path);
        let place = match rights {
            Rights::Ours => &self.ours,
            Rights::Of(_) => &self.theirs,
        };
        let opener = match place.get() {
            Some(opener) => opener,
            None => {
                let started = self.lifecycle.openers.start(&rights)?;
                if let Some(cancel) = self.cancel {
                    started.ends_with(cancel);
                }
                place.get_or_init(|| started)
            }
        };
        opener.open(path)
    }
}

impl Lifecycle {
    /// Returns what opens the files that `writer` names in a `config`.
    #[must_use]
    pub fn named_files<'a>(&'a self, writer: &'a Writer) -> NamedFiles<'a> {
        let (theirs, ours) = Default::default();
        NamedFiles { lifecycle: self, writer, cancel: None, theirs, ours }
    }

    /// Opens what is used of such files by a boot.
    pub(super) fn open_to_boot(
        &self,
        record: &Record,
        home: &Home,
        cancel: &Cancel,
    ) -> Result<Files, Error> {
        let spec = &record.spec;
        // Of a disk that was copied the original is not needed any more.
        let disks = spec.disks.iter().enumerate();
        let disks = disks.filter(|(number, disk)| disk.readonly || !home.disk(*number).exists());
        let disks = disks.map(|(_, disk)| &disk.path);
        self.open(record, spec.kernel.iter().chain(&spec.initramfs).chain(disks), [], cancel)
    }

    /// Opens what is used of such files by a wake: kernel and initial RAM file system only
    /// if there are any.
    pub(super) fn open_to_wake(&self, record: &Record, cancel: &Cancel) -> Result<Files, Error> {
        let spec = &record.spec;
        let dispensable = spec.kernel.iter().chain(&spec.initramfs);
        self.open(record, shared_disks(record), dispensable, cancel)
    }

    /// Opens the disks that a machine uses where they are.
    pub(super) fn open_disks(&self, record: &Record, cancel: &Cancel) -> Result<Files, Error> {
        self.open(record, shared_disks(record), [], cancel)
    }

    fn open<'a>(
        &self,
        record: &Record,
        needed: impl IntoIterator<Item = &'a PathBuf>,
        dispensable: impl IntoIterator<Item = &'a PathBuf>,
        cancel: &Cancel,
    ) -> Result<Files, Error> {
        let Some(writer) = record.config_by.as_deref() else {
            return Ok(Files::default());
        };
        let named = NamedFiles { cancel: Some(cancel), ..self.named_files(writer) };
        let needed = needed.into_iter().map(|path| (path, true));
        let dispensable = dispensable.into_iter().map(|path| (path, false));
        let wanted = needed.chain(dispensable).filter(|(path, _)| !self.is_of_template(path));
        let files = wanted.map(|(path, is_needed)| match named.open(path) {
            Ok(file) => Ok((path.clone(), Some(file))),
            Err(_) if !is_needed => Ok((path.clone(), None)),
            Err(source) => Err(self.unopened(record, writer, path, source)),
        });
        files.collect::<Result<_, _>>().map(Files)
    }

    fn unopened(&self, record: &Record, writer: &Writer, path: &Path, source: io::Error) -> Error {
        let (id, path) = (record.id.clone(), path.to_owned());
        // What is no file, and where nothing answers, is so for everybody.
        let is_same_for_all =
            matches!(source.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::TimedOut);
        match self.rights(writer, &path) {
            Rights::Of(Writer { uid, gid, .. }) if !is_same_for_all => {
                Error::NotWriters { id, path, uid, gid, source }
            }
            Rights::Ours | Rights::Of(_) => Error::Unopened { id, path, source },
        }
    }

    /// Returns with whose rights a file is opened that `writer` names.
    fn rights(&self, writer: &Writer, path: &Path) -> Rights {
        if writer.uid == own_ids().0 || self.is_of_template(path) {
            Rights::Ours
        } else {
            Rights::Of(writer.clone())
        }
    }

    fn is_of_template(&self, path: &Path) -> bool {
        self.settings.template.files().any(|named| named == path)
    }
}

fn shared_disks(record: &Record) -> impl Iterator<Item = &PathBuf> {
    record.spec.disks.iter().filter(|disk| disk.readonly).map(|disk| &disk.path)
}
