//! The contract's answers: which write does what, and which errno refuses what.
//!
//! Where an errno is promised it is looked at twice: as the number that a system call
//! returns, and as the words that a shell makes of it.

mod config;
mod file;
mod limit;
mod name;
mod owner;
mod permission;
mod verb;

use std::{ffi::OsStr, os::unix::ffi::OsStrExt};

use rustix::io::Errno;

use crate::support::{Host, command};

/// Returns the words that a shell has for an errno.
fn words(errno: Errno) -> String {
    let text = std::io::Error::from(errno).to_string();
    text.split(" (os error").next().unwrap().to_owned()
}

/// Runs `script` by bash with arguments, in the tree; it has to fail with that errno.
#[track_caller]
fn shell_fails(host: &Host, script: &str, arguments: &[&OsStr], errno: Errno) {
    let mut bash = command("/bin/bash");
    bash.args(["-c", script, "bash"]).args(arguments).current_dir(host.mount());
    let output = bash.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "`{script}` succeeds");
    assert!(said.contains(&words(errno)), "`{script}` says {said}");
}

/// Writes what has to be refused, by a system call and by a shell. `error` then has to
/// have `says` in it.
#[track_caller]
fn refused(host: &Host, file: &str, bytes: &[u8], errno: Errno, says: &str) {
    let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(40)]).into_owned();
    assert_eq!(host.write(file, bytes), Err(errno), "`{shown}` into {file}");
    let (id, _) = file.split_once('/').unwrap();
    let told = host.error(id);
    assert!(told.contains(says), "after `{shown}` into {file} the error is: {told}");
    // Bash writes each line by itself, and has no words with a nought.
    if bytes.len() <= 4096 && !bytes.contains(&0) && !bytes.contains(&b'\n') {
        let arguments = [OsStr::from_bytes(bytes), file.as_ref()];
        shell_fails(host, "echo \"$1\" > \"$2\"", &arguments, errno);
    }
}
