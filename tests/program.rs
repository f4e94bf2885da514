//! What the program says on its command line, before any daemon runs. Needs root.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    fs,
    process::{Command, Output},
};

/// Runs the program to its end.
fn dozed(arguments: &[&str]) -> Output {
    run(env!("CARGO_BIN_EXE_dozed"), arguments, &[])
}

/// Runs a program to its end.
#[allow(clippy::disallowed_methods, reason = "the test waits for the child before it goes on")]
fn run(program: &str, arguments: &[&str], more: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.args(arguments).args(more).env_remove("JOURNAL_STREAM");
    command.output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn the_version_is_told() {
    let output = dozed(&["--version"]);
    assert_eq!(output.status.code(), Some(0));
    let want = format!("dozed {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(text(&output.stdout), want);
}

#[test]
fn without_a_command_it_helps() {
    let output = dozed(&[]);
    assert_eq!(output.status.code(), Some(2));
    let help = text(&output.stderr);
    assert!(help.contains("run") && help.contains("doctor"), "{help}");
}

#[test]
fn a_bad_configuration_is_one_line_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("dozed.toml");
    fs::write(&file, "[limits]\nwaks = 1\n").unwrap();
    let file = file.to_str().unwrap();
    for command in ["run", "doctor"] {
        let output = dozed(&[command, "--config", file]);
        assert_eq!(output.status.code(), Some(2), "{command}");
        assert_eq!(
            text(&output.stderr),
            format!(
                "dozed: {file}:2: unknown key `waks`, expected one of `sandboxes`, `wakes`, \
                 `sleeps`, `holds`, `memory`\n"
            )
        );
    }
}

#[test]
fn a_missing_configuration_is_one_line_that_says_what_to_do() {
    let output = dozed(&["run", "--config", "/no/such.toml"]);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(
        text(&output.stderr),
        "dozed: /no/such.toml: there is no such file; name an existing one with --config, or \
         leave out --config to use /etc/dozed.toml, or the defaults if that does not exist\n"
    );
}

#[test]
fn the_doctor_reports_and_its_exit_code_agrees() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("dozed.toml");
    fs::write(&file, "store = \"/var/lib/dozed\"\n").unwrap();
    let output = dozed(&["doctor", "--config", file.to_str().unwrap()]);
    let report = text(&output.stdout);
    let failed = report.lines().any(|line| line.starts_with("FAIL"));
    assert_eq!(output.status.code(), Some(i32::from(failed)), "{report}");
    assert_eq!(report.contains("Sandboxes can run here"), !failed, "{report}");
}

#[test]
fn without_the_device_of_fuse_it_says_what_to_do_and_makes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let file = path("dozed.toml");
    let directories = ["mount", "store", "runtime"].map(|key| (key, path(key)));
    let keys = directories.clone().map(|(key, dir)| format!("{key} = \"{dir}\"\n"));
    fs::write(&file, keys.concat()).unwrap();
    // As in a container that was not given the device.
    let hide = "mount -t tmpfs none /dev && exec \"$@\"";
    let output = run(
        "unshare",
        &["--mount", "--propagation", "private", "sh", "-c", hide, "sh"],
        &[env!("CARGO_BIN_EXE_dozed"), "run", "--config", &file],
    );
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        text(&output.stderr),
        "dozed: there is no /dev/fuse, so the tree cannot be mounted; run `modprobe fuse`, or pass \
         the device to the container\n"
    );
    for (key, dir) in directories {
        assert!(!fs::exists(&dir).unwrap(), "{key} was made");
    }
}
