//! The files that a spec names: kernel, initial RAM file system and disks.
//!
//! Whoever writes a `config` names them, and a VMM opens them with rights that its writer may
//! not have. So they are opened as whoever wrote it, each time that a machine is to use them,
//! and from then on it is what is open that is used. Root may name what it likes, and what it
//! names in `[template]` is for everybody.

use std::{
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
        files::{handle_path, open_as, why_unusable},
        host::own_ids,
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

/// Files of a sandbox, in so far as they are not used by their own paths.
#[derive(Debug, Default)]
pub(super) struct Files(Vec<(PathBuf, Option<Arc<OwnedFd>>)>);

impl Files {
    /// Returns the path to use for the file that is named so; `None` if it cannot be had.
    pub(super) fn path(&self, named: &Path) -> Option<PathBuf> {
        match self.0.iter().find(|(path, _)| path == named) {
            None => Some(named.to_owned()),
            Some((_, file)) => file.as_ref().map(handle_path),
        }
    }

    /// Returns the path to use for the image of a disk, which is never done without.
    pub(super) fn disk(&self, disk: &Disk) -> PathBuf {
        self.path(&disk.path).unwrap_or_else(|| disk.path.clone())
    }

    /// Returns what has to stay open for these paths.
    pub(super) fn held(&self) -> Vec<Arc<OwnedFd>> {
        self.0.iter().filter_map(|(_, file)| file.clone()).collect()
    }
}

impl Lifecycle {
    /// Returns what is wrong with a file that is named in a `config` of `writer`, if anything.
    #[must_use]
    pub fn why_unusable(&self, writer: &Writer, path: &Path) -> Option<Unusable> {
        if !self.is_for_its_writer(writer, path) {
            return why_unusable(path).map(|why| Unusable { why, is_denied: false });
        }
        let error = open_one_as(writer, path).err()?;
        let is_denied = error.kind() == io::ErrorKind::PermissionDenied;
        let why = if is_denied {
            let Writer { uid, gid, .. } = writer;
            format!(
                "you (uid {uid}, gid {gid}) may not read it; whoever writes a `config` has to be \
                 allowed to read what it names, but for what [template] names"
            )
        } else {
            format!("{error}; write the path of a file")
        };
        Some(Unusable { why, is_denied })
    }

    /// Opens what is used of such files by a boot.
    pub(super) fn open_to_boot(&self, record: &Record, home: &Home) -> Result<Files, Error> {
        let spec = &record.spec;
        // Of a disk that was copied the original is not needed any more.
        let disks = spec.disks.iter().enumerate();
        let disks = disks.filter(|(number, disk)| disk.readonly || !home.disk(*number).exists());
        let disks = disks.map(|(_, disk)| &disk.path);
        self.open(record, spec.kernel.iter().chain(&spec.initramfs).chain(disks), [])
    }

    /// Opens what is used of such files by a wake: kernel and initial RAM file system only
    /// if there are any.
    pub(super) fn open_to_wake(&self, record: &Record) -> Result<Files, Error> {
        let spec = &record.spec;
        self.open(record, shared_disks(record), spec.kernel.iter().chain(&spec.initramfs))
    }

    /// Opens the disks that a machine uses where they are.
    pub(super) fn open_disks(&self, record: &Record) -> Result<Files, Error> {
        self.open(record, shared_disks(record), [])
    }

    fn open<'a>(
        &self,
        record: &Record,
        needed: impl IntoIterator<Item = &'a PathBuf>,
        dispensable: impl IntoIterator<Item = &'a PathBuf>,
    ) -> Result<Files, Error> {
        let Some(writer) = record.config_by.as_deref() else {
            return Ok(Files::default());
        };
        let needed = needed.into_iter().map(|path| (path.as_path(), true));
        let dispensable = dispensable.into_iter().map(|path| (path.as_path(), false));
        let wanted: Vec<_> = needed
            .chain(dispensable)
            .filter(|(path, _)| self.is_for_its_writer(writer, path))
            .collect();
        if wanted.is_empty() {
            return Ok(Files::default());
        }
        let failed = |path: &Path, source| Error::NotWriters {
            id: record.id.clone(),
            path: path.to_owned(),
            uid: writer.uid,
            gid: writer.gid,
            source,
        };
        let paths: Vec<_> = wanted.iter().map(|(path, _)| *path).collect();
        let opened = open_as(writer, &paths).map_err(|source| failed(paths[0], source))?;
        let files = wanted.into_iter().zip(opened).map(|((path, is_needed), file)| match file {
            Ok(file) => Ok((path.to_owned(), Some(Arc::new(file)))),
            Err(_) if !is_needed => Ok((path.to_owned(), None)),
            Err(source) => Err(failed(path, source)),
        });
        files.collect::<Result<_, _>>().map(Files)
    }

    /// Says whether a file is opened as whoever named it, rather than as root.
    fn is_for_its_writer(&self, writer: &Writer, path: &Path) -> bool {
        writer.uid != own_ids().0 && self.settings.template.files().all(|named| named != path)
    }
}

fn shared_disks(record: &Record) -> impl Iterator<Item = &PathBuf> {
    record.spec.disks.iter().filter(|disk| disk.readonly).map(|disk| &disk.path)
}

fn open_one_as(writer: &Writer, path: &Path) -> io::Result<OwnedFd> {
    open_as(writer, &[path])?.pop().unwrap_or_else(|| Err(io::ErrorKind::NotFound.into()))
}
