//! What `scripts/install-deps --rust` does on machines with and without Rust. What it would
//! download is made by programs of the same names.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tempfile::TempDir;

/// A machine as far as `PATH` and `HOME` make one.
struct Machine {
    dir: TempDir,
}

impl Machine {
    /// Has a shell, an apt-get that notes what it was asked, and no Rust. `apt-cache` knows
    /// rustup or does not.
    fn new(has_debian_rustup: bool) -> Self {
        let machine = Self { dir: tempfile::tempdir().unwrap() };
        fs::create_dir_all(machine.bin()).unwrap();
        for tool in ["bash", "sh", "cat", "mkdir", "chmod"] {
            symlink(Path::new("/bin").join(tool), machine.bin().join(tool)).unwrap();
        }
        machine.program("apt-cache", if has_debian_rustup { "exit 0" } else { "exit 100" });
        machine.program("apt-get", "echo apt-get \"$@\" >> \"$HOME/log\"");
        machine
    }

    fn bin(&self) -> PathBuf {
        self.dir.path().join("bin")
    }

    fn program(&self, name: &str, script: &str) {
        let path = self.bin().join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[allow(clippy::disallowed_methods, reason = "the test waits for the child before it goes on")]
    fn install(&self) -> Output {
        Command::new(self.bin().join("bash"))
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/install-deps"))
            .arg("--rust")
            .env_clear()
            .env("PATH", self.bin())
            .env("HOME", self.dir.path())
            .output()
            .unwrap()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }
}

fn said(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// A program that puts a cargo into `$1` when it runs.
fn puts_cargo(dir: &str) -> String {
    format!("mkdir -p {dir}; printf '#!/bin/sh\\n' > {dir}/cargo; chmod +x {dir}/cargo")
}

#[test]
fn nothing_is_done_and_said_where_there_is_a_cargo() {
    let machine = Machine::new(true);
    machine.program("cargo", "exit 1");
    let output = machine.install();
    assert!(output.status.success(), "{output:?}");
    assert_eq!((said(&output), machine.log()), (String::new(), String::new()));
}

#[test]
fn rust_is_installed_by_the_rustup_of_debian_where_there_is_one() {
    let machine = Machine::new(true);
    let bin = machine.bin();
    let rustup = format!("echo rustup \"$@\" >> \"$HOME/log\"; {}", puts_cargo("\"$HOME\"/x"));
    machine.program("rustup", &rustup);
    machine.program("curl", "echo curl >> \"$HOME/log\"; exit 1");
    let apt =
        format!("echo apt-get \"$@\" >> \"$HOME/log\"; {}", puts_cargo(bin.to_str().unwrap()));
    machine.program("apt-get", &format!("case \"$*\" in *install*) {apt} ;; esac"));
    let output = machine.install();
    assert!(output.status.success(), "{output:?}");
    assert!(said(&output).contains("installing Rust with Debian's rustup"), "{output:?}");
    let log = machine.log();
    let lines: Vec<&str> = log.lines().collect();
    assert!(lines[0].ends_with("install --no-install-recommends rustup"), "{log}");
    assert!(lines[1].starts_with("rustup toolchain install stable "), "{log}");
    assert_eq!(lines[2..], ["rustup default stable"]);
}

#[test]
fn rust_is_installed_by_the_installer_of_rustup_elsewhere() {
    let machine = Machine::new(false);
    let installer =
        format!("echo installer \\$@ >> \\$HOME/log; {}", puts_cargo("\\$HOME/.cargo/bin"));
    let curl = format!("echo curl \"$@\" >> \"$HOME/log\"\ncat <<END\n{installer}\nEND");
    machine.program("curl", &curl);
    let output = machine.install();
    assert!(output.status.success(), "{output:?}");
    let sentence = "there is no cargo; installing Rust with the installer of https://rustup.rs";
    assert!(said(&output).contains(sentence), "{output:?}");
    let log = machine.log();
    assert!(log.contains("curl --proto =https --tlsv1.2 -sSf https://sh.rustup.rs\n"), "{log}");
    assert!(log.contains("installer -y -q --no-modify-path"), "{log}");
    let again = machine.install();
    assert!(again.status.success() && said(&again).is_empty(), "{again:?}");
}

#[test]
fn an_installer_that_fails_is_an_error() {
    for curl in ["exit 6", "echo exit 1", "echo true"] {
        let machine = Machine::new(false);
        machine.program("curl", curl);
        let output = machine.install();
        assert!(!output.status.success(), "{curl}: {output:?}");
    }
}
