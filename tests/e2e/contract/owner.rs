//! Whose files a guest is made of: those that whoever wrote its `config` may open.

use std::{
    fs::{self, Permissions},
    os::unix::{
        fs::{PermissionsExt, chown, symlink},
        process::CommandExt,
    },
    path::{Path, PathBuf},
};

use rustix::io::Errno;
use tempfile::TempDir;

use super::words;
use crate::support::{Host, Setup, command};

/// Two users, each in a group of their own.
const OWNER: u32 = 65_532;
const STRANGER: u32 = 65_533;

/// A directory that everybody may look into, and a sandbox `web-1` of `OWNER`.
struct Stage {
    host: Host,
    files: TempDir,
}

impl Stage {
    fn new() -> Self {
        let files = tempfile::tempdir().unwrap();
        fs::set_permissions(files.path(), Permissions::from_mode(0o755)).unwrap();
        let host = Setup::counter("").private_kernel(files.path()).start();
        host.bash_ok("chmod 1777 .");
        let stage = Self { host, files };
        stage.succeeds("mkdir web-1");
        stage
    }

    fn path(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    /// Makes a file that only `uid` may read.
    fn file(&self, name: &str, bytes: &[u8], uid: u32) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        chown(&path, Some(uid), Some(uid)).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        path
    }

    /// Makes a copy of the template's kernel that only `uid` may read.
    fn kernel(&self, name: &str, uid: u32) -> PathBuf {
        let config = self.host.read("web-1/config");
        let line = config.lines().find_map(|line| line.strip_prefix("kernel = ")).unwrap();
        self.file(name, &fs::read(line.trim_matches('"')).unwrap(), uid)
    }

    /// Runs a script by bash, in the tree, as the owner; returns what it says if it fails.
    fn as_owner(&self, script: &str) -> Result<(), String> {
        let mut bash = command("/bin/bash");
        bash.args(["-c", script]).current_dir(self.host.mount()).uid(OWNER).gid(OWNER);
        let output = bash.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() { Ok(()) } else { Err(said) }
    }

    #[track_caller]
    fn succeeds(&self, script: &str) {
        self.as_owner(script).unwrap_or_else(|said| panic!("{script} says {said}"));
    }

    #[track_caller]
    fn is_denied(&self, script: &str, path: &Path) {
        let said = self.as_owner(script).expect_err("it is not theirs");
        assert!(said.contains(&words(Errno::ACCESS)), "{script} says {said}");
        let told = self.host.error("web-1");
        assert!(told.contains(path.to_str().unwrap()), "{told}");
        assert!(told.contains("(uid 65532, gid 65532)"), "{told}");
    }
}

fn kernel(path: &Path) -> String {
    format!("printf '%s\\n' 'kernel = \"{}\"' > web-1/config", path.display())
}

fn disk(path: &Path, readonly: bool) -> String {
    let path = path.display();
    format!(
        "printf '%s\\n' 'disks = [{{ path = \"{path}\", readonly = {readonly} }}]' > web-1/config"
    )
}

/// Puts a link to `target` where `path` is, which is kept beside it.
fn swap(path: &Path, target: &Path) {
    rustix::fs::rename(path, path.with_extension("aside")).unwrap();
    symlink(target, path).unwrap();
}

fn swap_back(path: &Path) {
    rustix::fs::rename(path.with_extension("aside"), path).unwrap();
}

#[test]
fn a_config_that_names_what_its_owner_may_not_read_is_refused() {
    let stage = Stage::new();
    let before = stage.host.read("web-1/config");
    let (roots, anothers) = (stage.kernel("roots", 0), stage.kernel("anothers", STRANGER));
    let link = stage.path("link");
    symlink(&roots, &link).unwrap();
    let shut = stage.path("shut");
    fs::create_dir(&shut).unwrap();
    fs::set_permissions(&shut, Permissions::from_mode(0o700)).unwrap();
    fs::write(shut.join("there"), "").unwrap();
    // What is in a directory that is shut to them is not told, not even whether it is there.
    for path in [&roots, &anothers, &link, &shut.join("there"), &shut.join("nowhere")] {
        stage.is_denied(&kernel(path), path);
        stage.is_denied(&kernel(path).replace("kernel", "initramfs"), path);
        stage.is_denied(&disk(path, false), path);
        stage.is_denied(&disk(path, true), path);
    }
    let fifo = stage.path("fifo");
    stage.host.bash_ok(&format!("mkfifo -m 666 {}", fifo.display()));
    let said = stage.as_owner(&kernel(&fifo)).unwrap_err();
    assert!(said.contains(&words(Errno::INVAL)), "{said}");
    assert!(stage.host.error("web-1").contains("nor a block device"));
    assert_eq!(stage.host.read("web-1/config"), before);
    // Root may, for whomever it does.
    stage.host.bash_ok(&kernel(&roots));
    stage.host.wake("web-1");
    stage.host.counts_on("web-1");
}

#[test]
fn an_owner_boots_and_wakes_with_files_of_their_own_and_those_of_the_template() {
    let stage = Stage::new();
    let host = &stage.host;
    // The template's may be read by nobody but root.
    stage.succeeds("echo wake > web-1/state");
    host.counts_on("web-1");
    stage.succeeds("rmdir web-1 && mkdir web-1");
    // To write down what is there is to name it.
    stage.succeeds("c=$(cat web-1/config); cat <<< \"$c\" > web-1/config");
    let (own, shared) = (stage.kernel("own", OWNER), stage.file("shared", &[7; 4096], OWNER));
    let copied = stage.file("copied", &[9; 4096], OWNER);
    stage.succeeds(&format!(
        "cat > web-1/config <<END\nkernel = \"{}\"\n[[disks]]\npath = \"{}\"\n\
         [[disks]]\npath = \"{}\"\nreadonly = true\nEND",
        own.display(),
        copied.display(),
        shared.display()
    ));
    stage.succeeds("echo wake > web-1/state");
    host.counts_on("web-1");
    assert_eq!(fs::read(host.home("web-1").join("disk-0.img")).unwrap(), [9; 4096]);
    has_open(host, &shared);
    stage.succeeds("echo sleep > web-1/state");
    stage.succeeds("echo wake > web-1/state");
    host.counts_on("web-1");
    has_open(host, &shared);
}

/// The VMM has the very file open, and the daemon does not.
fn has_open(host: &Host, path: &Path) {
    let open = |pid: u32| {
        let files = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        files
            .filter(|file| fs::read_link(file.as_ref().unwrap().path()).is_ok_and(|to| to == path))
            .count()
    };
    assert!(open(host.vmm("web-1")) > 0, "{} is attached", path.display());
    assert_eq!(open(host.daemon_pid()), 0);
}

#[test]
fn a_link_that_is_put_in_the_place_of_a_file_gains_nothing() {
    let stage = Stage::new();
    let host = &stage.host;
    let (secret, own) = (stage.kernel("secret", 0), stage.kernel("own", OWNER));
    let shared = stage.file("shared", &[7; 4096], OWNER);
    stage.succeeds(&kernel(&own));
    swap(&own, &secret);
    stage.is_denied("echo wake > web-1/state", &own);
    assert_eq!(host.state("web-1"), "stopped");
    swap_back(&own);
    stage.succeeds(&disk(&shared, true));
    stage.succeeds("echo wake > web-1/state");
    host.counts_on("web-1");
    stage.succeeds("echo sleep > web-1/state");
    swap(&shared, &secret);
    stage.is_denied("echo wake > web-1/state", &shared);
    assert_eq!(host.state("web-1"), "snapshotted");
    swap_back(&shared);
    stage.succeeds("echo wake > web-1/state");
    host.counts_on("web-1");
}

#[test]
fn a_sandbox_that_is_given_to_root_has_no_file_more() {
    let stage = Stage::new();
    let host = &stage.host;
    let (secret, shared) = (stage.kernel("secret", 0), stage.file("shared", &[7; 4096], OWNER));
    stage.succeeds(&disk(&shared, true));
    host.bash_ok("chown 0:0 web-1");
    // The directory is theirs, so they can put there what they like.
    swap(&shared, &secret);
    let refused = host.write("web-1/state", "wake");
    assert_eq!(refused, Err(Errno::ACCESS), "{}", host.error("web-1"));
    swap_back(&shared);
    host.wake("web-1");
    host.counts_on("web-1");
    host.sleep("web-1");
    swap(&shared, &secret);
    assert_eq!(host.write("web-1/state", "wake"), Err(Errno::ACCESS));
    assert_eq!(host.state("web-1"), "snapshotted");
    swap_back(&shared);
    host.wake("web-1");
}
