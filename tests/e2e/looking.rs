//! Looking is free.

use std::{
    fs,
    process::{Child, Stdio},
    time::Duration,
};

use dozed::sys::clock::Deadline;
use rustix::process::Signal;

use crate::support::{Host, Setup, command, wait_for, wait_until};

/// No guest is active by its CPU: that of a boot may count as late as with the next look of
/// the reaper, and be taken for what a look at a file did.
const QUIET: &str = "[activity]\ncpu_percent = 6400";

/// Returns what looking at a sandbox must not change, of all or of some.
fn facts_of(host: &Host, ids: &[String]) -> Vec<String> {
    let mut facts = Vec::new();
    for id in ids {
        facts.push(format!("{id} {}", host.state(id)));
        let touched = fs::metadata(host.path(&format!("{id}/activity"))).unwrap();
        facts.push(format!("mtime {:?}", touched.modified().unwrap()));
        for (file, keys) in [
            ("status", &["since", "generation", "sleeps", "wakes", "pid"][..]),
            ("activity", &["count", "last"][..]),
            ("idle", &["sleeps_at", "deletes_at"][..]),
        ] {
            let file = format!("{id}/{file}");
            facts.extend(keys.iter().map(|key| format!("{key} {}", host.value(&file, key))));
        }
    }
    facts
}

fn facts(host: &Host) -> Vec<String> {
    facts_of(host, &host.list())
}

#[test]
fn nothing_that_looks_wakes_anything_or_counts_as_activity() {
    let host = Setup::counter("").config(QUIET).start();
    for id in ["asleep-1", "asleep-2", "running"] {
        host.boot(id);
    }
    host.sleep("asleep-1");
    host.sleep("asleep-2");
    host.mkdir("stopped").unwrap();
    // A VMM that does not answer shows that none is asked.
    let vmm = host.vmm("running");
    host.signal_vmm(vmm, Signal::STOP);
    let before = facts(&host);
    for look in [
        "grep -r . .",
        "grep -rc count . || true",
        "find . -type f -size +0 -mmin -1000000",
        "find . -exec stat {} +",
        "ls -lR",
        "ls -la --time=atime asleep-1",
        "tar c . | tar t",
        "cat $(find . -type f)",
        "wc -c $(find . -type f)",
        "sha1sum $(find . -type f)",
        "head -c 1 $(find . -type f)",
        "tail -n 3 */console",
        "du -a",
        "for f in */*; do test -r $f -a -w $f; done; true",
        "python3 -c 'import os; [os.stat(f) for f in os.listdir(\".\")]'",
        "timeout 1 inotifywait -q -r . || true",
        "cp -r asleep-1 $(mktemp -d)",
        "exec 3< asleep-1/state 4<> asleep-2/state; cat <&3",
        "python3 -c 'import select; f = open(\"asleep-1/state\"); p = select.poll(); \
         p.register(f, select.POLLIN | select.POLLPRI); f.read(); p.poll(100)'",
    ] {
        host.bash_ok(&format!("{{ {look}; }} > /dev/null"));
        assert_eq!(facts(&host), before, "after {look}");
    }
    host.signal_vmm(vmm, Signal::CONT);
    host.counts_on("running");
}

#[test]
fn what_is_read_is_whole_whatever_the_reader_reads_by() {
    let host = Setup::counter("").start();
    host.boot("web-1");
    host.sleep("web-1");
    for file in ["state", "error", "config", "idle_after", "console"] {
        let file = format!("web-1/{file}");
        let want = host.read(&file);
        // A guest may be put to sleep in the middle of a line.
        assert!(want.ends_with('\n') || file.ends_with("console"), "{file}: {want:?}");
        for read in
            ["cat FILE", "dd if=FILE bs=1 2>/dev/null", "head -n 1000 FILE", "tail -n +1 FILE"]
        {
            assert_eq!(host.bash_ok(&read.replace("FILE", &file)), want, "{read} of {file}");
        }
    }
    let status = host.bash_ok("while read -r key value; do echo $key; done < web-1/status");
    assert!(status.starts_with("state\nsince\ngeneration\n"), "{status}");
}

/// What crawlers do to a tree, each again and again: a search, a look at everything, a backup,
/// and what updatedb does.
const CRAWLS: [&str; 4] = [
    "grep -r nothing .",
    "find . -exec stat {} +",
    "tar cf - . | cat",
    "find . -printf '%p %s %T@ %C@\\n'",
];
/// How many crawl at a time.
const CRAWLERS: usize = 10;
/// For how long they crawl, unless `DOZED_CRAWL_SECONDS` says otherwise. `scripts/bench` has
/// them do it for a minute, and measures what a `sleep` feels of it.
const CRAWL_SECONDS: u64 = 10;
/// So many sandboxes are there to be looked at besides those that the test is about.
const CROWD: usize = 200;

/// Ten crawlers in a tree.
struct Crawlers {
    children: Vec<Child>,
    /// While this is there they go on.
    dir: tempfile::TempDir,
}

impl Crawlers {
    fn start(host: &Host) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("go"), "").unwrap();
        let place = dir.path().display();
        let crawl = |number: usize| {
            let crawl = CRAWLS[number % CRAWLS.len()];
            let script = format!(
                "while test -e {place}/go; do {{ {crawl}; }} > /dev/null 2>&1; \
                 echo round >> {place}/{number}; done"
            );
            let mut bash = command("/bin/bash");
            bash.args(["-c", &script]).current_dir(host.mount()).stdin(Stdio::null());
            bash.spawn().unwrap()
        };
        Self { children: (0..CRAWLERS).map(crawl).collect(), dir }
    }

    /// Returns how often the laziest of them was through.
    fn rounds(&self) -> usize {
        let rounds = |number: usize| {
            let rounds = fs::read_to_string(self.dir.path().join(number.to_string()));
            rounds.unwrap_or_default().lines().count()
        };
        (0..CRAWLERS).map(rounds).min().unwrap()
    }
}

impl Drop for Crawlers {
    fn drop(&mut self) {
        fs::remove_file(self.dir.path().join("go")).unwrap();
        for child in &mut self.children {
            wait_for("a crawler ends", || child.try_wait().unwrap());
        }
    }
}

#[allow(clippy::disallowed_methods, reason = "a test has no command line of its own")]
fn crawl_time() -> Duration {
    let seconds = std::env::var("DOZED_CRAWL_SECONDS").map(|text| text.parse().unwrap());
    Duration::from_secs(seconds.unwrap_or(CRAWL_SECONDS))
}

#[test]
fn ten_crawlers_wake_nobody_move_no_clock_and_keep_nobody_awake() {
    let host = Setup::counter("").config("[reaper]\ntick = \"1s\"").config(QUIET).start();
    host.bash_ok(&format!("mkdir $(seq -f 'crowd-%g' {CROWD})"));
    for id in ["asleep-1", "asleep-2", "running", "deaf", "idle", "napper"] {
        host.boot(id);
    }
    host.sleep("asleep-1");
    host.sleep("asleep-2");
    // A VMM that does not answer shows that none is asked.
    let vmm = host.vmm("deaf");
    host.signal_vmm(vmm, Signal::STOP);
    let mut still = host.list();
    still.retain(|id| id != "idle" && id != "napper");
    let before = facts_of(&host, &still);
    let crawlers = Crawlers::start(&host);
    let over = Deadline::after(crawl_time());
    // Whatever they look at, the reaper thinks it idle; and who writes is heard.
    host.write("idle/idle_after", "1s").unwrap();
    wait_until("the reaper puts it to sleep", || host.state("idle") == "snapshotted");
    while !over.passed() || crawlers.rounds() == 0 {
        host.sleep("napper");
        host.wake("napper");
    }
    assert_eq!(facts_of(&host, &still), before);
    drop(crawlers);
    assert_eq!(facts_of(&host, &still), before);
    assert_eq!(host.number("idle/status", "wakes"), 0);
    host.signal_vmm(vmm, Signal::CONT);
    host.counts_on("deaf");
}
