//! Many at once, each doing something else.

use std::process::Stdio;

use crate::support::{Host, Setup, command};

const SANDBOXES: usize = 8;
const PROCESSES: u64 = 16;
const STEPS: u64 = 13;

/// A generator of numbers that look random and are the same in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        // Knuth's MMIX constants; the upper bits are the good ones.
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

/// Returns what one of the processes does, a command a line.
fn script(process: u64) -> String {
    let mut dice = Dice(process);
    let mut step = || {
        let id = format!("s{}", dice.roll(SANDBOXES as u64));
        match dice.roll(10) {
            0..=2 => format!("echo wake > {id}/state"),
            3..=5 => format!("echo sleep > {id}/state"),
            6 => format!("touch {id}/activity"),
            7 => format!("cat $(find {id} -type f) > /dev/null; ls -l . {id} > /dev/null"),
            8 => format!("mkdir own-{process} && rmdir own-{process}"),
            // Two of them come and go.
            _ => "rmdir s0; mkdir s0; rmdir s1; mkdir s1".to_owned(),
        }
    };
    (0..STEPS).map(|_| step() + "\n").collect()
}

/// Says whether a line that a process complained with is one that this turmoil explains.
fn is_explained(line: &str) -> bool {
    // A sleep of one that is stopped, and what is being deleted or was made by another.
    ["Invalid argument", "No such file or directory", "No such device", "File exists"]
        .iter()
        .any(|words| line.ends_with(words))
}

#[test]
fn two_hundred_operations_at_once_end_in_legal_states() {
    let host = Setup::counter("").start();
    for number in 0..SANDBOXES {
        host.mkdir(&format!("s{number}")).unwrap();
    }
    let spawn = |process| {
        let mut bash = command("/bin/bash");
        bash.args(["-c", &script(process)]).current_dir(host.mount());
        bash.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let children: Vec<_> = (0..PROCESSES).map(spawn).collect();
    for child in children {
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        for line in said.lines() {
            assert!(is_explained(line), "{line}\n{}", host.bash_ok("head -v s*/error"));
        }
    }
    let mut names = host.list();
    names.sort_unstable();
    assert_eq!(names, (0..SANDBOXES).map(|number| format!("s{number}")).collect::<Vec<_>>());
    for id in names {
        check(&host, &id);
    }
}

/// Checks that a sandbox is in a state that it can stay in, and is of use.
fn check(host: &Host, id: &str) {
    let state = host.state(id);
    match state.as_str() {
        "stopped" | "snapshotted" => host.wake(id),
        "running" => {}
        _ => panic!("{id} is left {state}"),
    }
    assert_eq!(host.counts_on(id).boots, 1, "{id}");
}
