//! Looking is free.

use rustix::process::Signal;

use crate::support::{Host, Setup};

/// Returns what looking must not change.
fn facts(host: &Host) -> Vec<String> {
    let mut facts = Vec::new();
    for id in host.list() {
        facts.push(format!("{id} {}", host.state(&id)));
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

#[test]
fn nothing_that_looks_wakes_anything_or_counts_as_activity() {
    let host = Setup::counter("").start();
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
