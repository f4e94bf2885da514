//! A VMM's program file: which version it is, and whether it is still the same.

use std::{
    fs::File,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{Error, VmmIdentity};
use crate::{
    sync::{Arc, Mutex, lock},
    sys::{command, host, process::Process},
};

/// For a question that takes 20 ms to answer, on a host that is busy.
const VERSION_LIMIT: Duration = Duration::from_secs(10);

/// A VMM's program file.
///
/// # Locking
/// `known` is a leaf, held while the file is read, which is once for each upgrade.
#[derive(Debug)]
pub(super) struct Program {
    path: PathBuf,
    /// Finds the version in what the program says when it is asked for it.
    parse: fn(&str) -> Option<&str>,
    known: Mutex<Option<(Stamp, Arc<VmmIdentity>)>>,
}

/// What changes when a file is replaced or written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
}

impl Program {
    pub(super) fn new(path: PathBuf, parse: fn(&str) -> Option<&str>) -> Self {
        Self { path, parse, known: Mutex::default() }
    }

    /// Returns the program that `process` runs. It can be read, and asked for its version,
    /// also where an upgrade has removed its file.
    pub(super) fn running_as(&self, process: &Process) -> Self {
        let path = PathBuf::from(format!("/proc/{}/exe", process.identity().pid));
        Self { path, parse: self.parse, known: Mutex::new(lock(&self.known).clone()) }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns what the program is now. It is read again only if it was changed, and then
    /// `describe` says the rest, of its version and digest.
    pub(super) fn identity(
        &self,
        describe: impl FnOnce(String, String) -> Result<VmmIdentity, Error>,
    ) -> Result<Arc<VmmIdentity>, Error> {
        let stamp = self.stamp()?;
        let mut known = lock(&self.known);
        if let Some((of, identity)) = known.as_ref()
            && *of == stamp
        {
            return Ok(Arc::clone(identity));
        }
        let identity = Arc::new(describe(self.version()?, self.digest()?)?);
        *known = Some((stamp, Arc::clone(&identity)));
        Ok(identity)
    }

    fn stamp(&self) -> Result<Stamp, Error> {
        let meta = self.path.metadata().map_err(|error| self.missing(&error.to_string()))?;
        Ok(Stamp {
            device: meta.dev(),
            inode: meta.ino(),
            bytes: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
        })
    }

    fn version(&self) -> Result<String, Error> {
        let said = command::output(&self.path, &["--version"], VERSION_LIMIT)
            .map_err(|error| self.missing(&error.to_string()))?;
        (self.parse)(&said.stdout)
            .map(str::to_owned)
            .ok_or_else(|| self.missing("it does not print its version"))
    }

    fn digest(&self) -> Result<String, Error> {
        let mut hasher = blake3::Hasher::new();
        File::open(&self.path)
            .and_then(|file| hasher.update_reader(file).map(drop))
            .map_err(|error| self.missing(&error.to_string()))?;
        Ok(format!("blake3:{}", hasher.finalize().to_hex()))
    }

    /// Returns the error for a program that cannot be used.
    pub(super) fn missing(&self, why: &str) -> Error {
        Error::Missing { program: self.path.display().to_string(), why: why.to_owned() }
    }
}

/// Returns the model of the host's CPU, which guests of KVM see.
pub(super) fn host_cpu() -> Result<String, Error> {
    let model = host::cpu_model()
        .map_err(|source| Error::Host { doing: "reading /proc/cpuinfo".to_owned(), source })?;
    Ok(format!("host: {model}"))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;
    use crate::sys::process::Launch;

    fn write_program(path: &Path, says: &str) {
        fs::write(path, format!("#!/bin/sh\necho '{says}'\n")).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn identity(program: &Program) -> Result<Arc<VmmIdentity>, Error> {
        program.identity(|version, digest| {
            Ok(VmmIdentity {
                name: "test",
                version,
                digest,
                accelerator: "tcg",
                machine: String::new(),
                cpu: host_cpu()?,
            })
        })
    }

    fn after_v(text: &str) -> Option<&str> {
        text.split_once(" v").map(|(_, version)| version.trim())
    }

    #[test]
    fn a_process_is_what_it_was_started_as_whatever_became_of_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sleeper");
        fs::copy("/bin/sleep", &path).unwrap();
        let program = Program::new(path.clone(), |said| said.lines().next());
        let before = identity(&program).unwrap();
        let log = File::create(dir.path().join("log")).unwrap();
        let args = ["1000".into()];
        let process = Process::spawn(Launch::new(&path, &args, log)).unwrap();
        fs::remove_file(&path).unwrap();
        write_program(&path, "other v2");
        assert_ne!(identity(&program).unwrap(), before);
        assert_eq!(identity(&program.running_as(&process)).unwrap(), before);
        process.kill();
        process.wait(VERSION_LIMIT).unwrap();
    }

    #[test]
    fn an_upgrade_of_the_program_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmm");
        let program = Program::new(path.clone(), after_v);
        let error = identity(&program).unwrap_err();
        assert!(error.to_string().ends_with("No such file or directory (os error 2)"), "{error}");

        write_program(&path, "vmm v7.2.22");
        let first = identity(&program).unwrap();
        assert_eq!(first.version, "7.2.22");
        assert!(Arc::ptr_eq(&first, &identity(&program).unwrap()));

        write_program(&path, "vmm v10.0.2");
        let second = identity(&program).unwrap();
        assert_eq!(second.version, "10.0.2");
        assert_ne!(second.digest, first.digest);
    }

    #[test]
    fn a_program_that_is_something_else_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmm");
        write_program(&path, "hello");
        let error = identity(&Program::new(path, after_v)).unwrap_err();
        assert!(error.to_string().ends_with("it does not print its version"), "{error}");
    }

    #[test]
    fn the_host_has_a_cpu() {
        assert!(host_cpu().unwrap().starts_with("host: "));
    }
}
