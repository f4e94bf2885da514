//! Watching: every change is seen, by every kind of watcher, whoever made it.

use std::{fs, os::unix::process::CommandExt, process::Stdio, thread, time::Duration};

use dozed::sys::clock::Stopwatch;
use rustix::process::Signal;
use serde_json::Value;

use crate::support::{Host, Setup, Watcher, command, is_alive, wait_for, wait_until};

const TICK: &str = "[reaper]\ntick = \"1s\"\nconcurrency = 8\n[defaults]\nidle_after = \"never\"";
/// So many sandboxes change at the same time, and so often each way.
const SANDBOXES: usize = 25;
const ROUNDS: usize = 10;

fn names(count: usize) -> Vec<String> {
    (0..count).map(|number| format!("s{number}")).collect()
}

/// Returns the events of a log.
fn events(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Returns the process that tells inotify, once it is ready.
fn announcer(host: &Host) -> u32 {
    let daemon = host.daemon_pid();
    wait_for("there is an announcer", || {
        let children = fs::read_to_string(format!("/proc/{daemon}/task/{daemon}/children"));
        let threads = fs::read_dir(format!("/proc/{daemon}/task")).unwrap().flatten();
        let of_all =
            threads.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
        let children: String = children.into_iter().chain(of_all).collect::<Vec<_>>().join(" ");
        children.split_whitespace().filter_map(|pid| pid.parse().ok()).find(|pid: &u32| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            name == "dozed-announcer\n" && is_alive(*pid)
        })
    })
}

/// Wakes a sandbox and has the reaper put it to sleep, and waits until all have seen both.
fn change_twice(host: &Host, watchers: &[Watcher], id: &str) {
    let counts: Vec<usize> = watchers.iter().map(|watcher| watcher.seen(id).len()).collect();
    let woken = host.write(&format!("{id}/state"), "wake");
    assert_eq!(woken, Ok(()), "{id}: {}", host.error(id));
    for (watcher, count) in watchers.iter().zip(&counts) {
        watcher.wait_to_see(id, *count, "running");
    }
    let counts: Vec<usize> = watchers.iter().map(|watcher| watcher.seen(id).len()).collect();
    host.write(&format!("{id}/idle_after"), "1s").unwrap();
    for (watcher, count) in watchers.iter().zip(&counts) {
        watcher.wait_to_see(id, *count, "snapshotted");
    }
    host.write(&format!("{id}/idle_after"), "never").unwrap();
}

#[test]
fn every_watcher_sees_500_changes_by_writers_and_by_the_reaper_and_no_others() {
    let host = Setup::counter("").config(TICK).start();
    let ids = names(SANDBOXES);
    for id in ids.iter().chain(&["still".to_owned()]) {
        host.mkdir(id).unwrap();
    }
    let mut watched = ids.clone();
    watched.push("still".to_owned());
    let watchers = Watcher::every(host.mount(), &watched);
    thread::scope(|scope| {
        for id in &ids {
            scope.spawn(|| (0..ROUNDS).for_each(|_| change_twice(&host, &watchers, id)));
        }
    });
    let log = events(&host.read("dozed.events"));
    let by = |to: &str, cause: &str| {
        let is = |event: &&Value| {
            event["to"] == to && event["cause"].as_str().unwrap().starts_with(cause)
        };
        log.iter().filter(is).count()
    };
    let (woken, slept) = (by("running", "write"), by("snapshotted", "idle"));
    assert_eq!((woken, slept), (SANDBOXES * ROUNDS, SANDBOXES * ROUNDS));
    // Some changes have one event together, and none has two.
    for id in &ids {
        let changes = log.iter().filter(|event| event["id"] == **id && event["event"] == "state");
        let (changes, seen) = (changes.count(), watchers[0].seen(id).len());
        assert!((2 * ROUNDS..=changes).contains(&seen), "{id}: {seen} events, {changes} changes");
    }
    for watcher in &watchers {
        assert_eq!(watcher.seen("still"), [""; 0], "{}", watcher.name);
    }
    // Half are deleted by the reaper, half by hand.
    for (number, id) in ids.iter().enumerate() {
        if number % 2 == 0 {
            host.write(&format!("{id}/delete_after"), "1s").unwrap();
        } else {
            host.rmdir(id).unwrap();
        }
    }
    for watcher in &watchers {
        ids.iter().for_each(|id| watcher.wait_to_see(id, 0, "deleted"));
    }
    host.mkdir("new").unwrap();
    for watcher in &watchers {
        watcher.wait_to_see("new", 0, "created");
    }
}

#[test]
fn a_guest_that_ends_is_seen_and_the_log_has_who_did_what() {
    let host = Setup::counter("").config(TICK).start();
    host.boot("web-1");
    let watcher = Watcher::inotifywait(host.mount(), &["web-1".to_owned()]);
    host.signal_vmm(host.vmm("web-1"), Signal::KILL);
    watcher.wait_to_see("web-1", 0, "stopped");
    let log = host.read("web-1/events");
    let events = events(&log);
    assert_eq!(host.read("dozed.events"), log);
    let kinds: Vec<&str> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["created", "state", "state", "state"]);
    let pid = std::process::id();
    let woken = &events[2];
    assert_eq!((&woken["from"], &woken["to"]), (&"booting".into(), &"running".into()));
    assert_eq!(woken["pid"], pid);
    assert_eq!(woken["uid"], 0);
    let cause = woken["cause"].as_str().unwrap();
    assert!(cause.starts_with(&format!("write by pid {pid} (")), "{cause}");
    let ended = &events[3];
    assert_eq!(ended["cause"], "guest-exit");
    assert_eq!(ended["error"], "the VMM was killed by signal 9");
    assert!(ended["pid"].is_null());
    // One that fails says so, and one that was not understood is no operation.
    host.write("web-1/state", "sleep").unwrap_err();
    host.write("web-1/state", "dance").unwrap_err();
    let last = host.read("web-1/events");
    let last: Value = serde_json::from_str(last.lines().last().unwrap()).unwrap();
    assert_eq!((&last["event"], last["uid"].as_u64()), (&"failed".into(), Some(0)));
    assert!(last["error"].as_str().unwrap().contains("cannot be put to sleep"), "{last}");
}

#[test]
fn changes_of_another_users_sandbox_are_seen_too_and_its_end_by_who_watches_one_file() {
    let host = Setup::counter("").config(TICK).start();
    host.boot("web-1");
    host.bash_ok("chown 1000:2000 web-1; chmod 700 web-1");
    let watcher = Watcher::inotifywait(host.mount(), &["web-1".to_owned()]);
    let mut one_file = command("inotifywait");
    one_file.args(["-q", "-e", "delete_self", "state"]).current_dir(host.path("web-1"));
    let mut one_file = one_file.stdout(Stdio::null()).spawn().unwrap();
    host.write("web-1/idle_after", "1s").unwrap();
    watcher.wait_to_see("web-1", 0, "snapshotted");
    host.write("web-1/delete_after", "1s").unwrap();
    watcher.wait_to_see("web-1", 0, "deleted");
    let ended = wait_for("its watcher ends", || one_file.try_wait().unwrap());
    assert!(ended.success(), "{ended}");
    // The kernel has forgotten the name, so that it is free at once.
    host.mkdir("web-1").unwrap();
    assert_eq!(host.state("web-1"), "stopped");
}

#[test]
fn what_a_writer_who_was_signalled_began_is_seen_when_it_is_done() {
    let host = Setup::counter("").config(TICK).start();
    host.boot("web-1");
    let watcher = Watcher::inotifywait(host.mount(), &["web-1".to_owned()]);
    let vmm = host.vmm("web-1");
    host.signal_vmm(vmm, Signal::STOP);
    let mut writer = command("/bin/bash");
    writer.args(["-c", "echo sleep 1<> web-1/state"]).current_dir(host.mount());
    let mut writer = writer.stderr(Stdio::null()).spawn().unwrap();
    wait_until("it has begun", || host.state("web-1") == "snapshotting");
    assert_eq!(watcher.seen("web-1"), [""; 0], "the file is locked by its writer");
    crate::support::signal(&writer, Signal::TERM);
    wait_for("the writer ends", || writer.try_wait().unwrap());
    watcher.wait_to_see("web-1", 0, "snapshotting");
    host.signal_vmm(vmm, Signal::CONT);
    watcher.wait_to_see("web-1", 0, "snapshotted");
}

#[test]
fn what_a_crash_cut_off_is_told_as_reconciled() {
    let mut host = Setup::counter("").config(TICK).start();
    host.boot("web-1");
    let vmm = host.vmm("web-1");
    host.kill_daemon();
    host.signal_vmm(vmm, Signal::KILL);
    host.restart();
    let log = events(&host.read("web-1/events"));
    assert_eq!(log.len(), 1, "{log:?}");
    assert_eq!((&log[0]["to"], &log[0]["cause"]), (&"stopped".into(), &"reconcile".into()));
}

#[test]
fn a_watcher_that_is_stopped_or_killed_holds_nobody_up() {
    let host = Setup::counter("").config(TICK).start();
    let ids = names(3);
    ids.iter().for_each(|id| host.boot(id));
    let watcher = Watcher::inotifywait(host.mount(), &ids);
    watcher.signal(Signal::STOP);
    let mut tail = command("tail");
    tail.args(["-f", "dozed.events"]).current_dir(host.mount()).stdout(Stdio::null());
    let mut tail = tail.spawn().unwrap();
    crate::support::signal(&tail, Signal::STOP);
    for _ in 0..5 {
        for id in &ids {
            host.sleep(id);
            host.wake(id);
        }
    }
    for id in &ids {
        host.write(&format!("{id}/idle_after"), "1s").unwrap();
    }
    for id in &ids {
        wait_until("the reaper puts it to sleep", || host.state(id) == "snapshotted");
    }
    watcher.signal(Signal::CONT);
    for id in &ids {
        wait_until("the last state is seen", || {
            watcher.seen(id).last().is_some_and(|seen| seen == "snapshotted")
        });
    }
    watcher.signal(Signal::STOP);
    drop(watcher);
    tail.kill().unwrap();
    tail.wait().unwrap();
    ids.iter().for_each(|id| host.wake(id));
}

#[test]
fn the_announcer_has_nothing_of_the_daemons_and_goes_with_it() {
    let mut host = Setup::counter("").config(TICK).start();
    let pid = announcer(&host);
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let of = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().to_owned()
    };
    // CAP_DAC_OVERRIDE and CAP_FOWNER.
    assert_eq!((of("CapPrm:"), of("CapEff:")), ("000000000000000a".into(), of("CapPrm:")));
    assert_eq!(of("NoNewPrivs:"), "1");
    // While it does something it has the root of the tree.
    wait_until("it has nothing but its socket", || {
        let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        let targets = fds.filter_map(|fd| fs::read_link(fd.path()).ok());
        let mut targets = targets.map(|target| target.to_string_lossy().into_owned());
        targets.all(|target| target == "/dev/null" || target.starts_with("socket:"))
    });
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap();
    assert_eq!(environment, b"");
    host.kill_daemon();
    wait_until("it ends with the daemon", || !is_alive(pid));
    host.restart();
    let pid = announcer(&host);
    host.terminate();
    assert!(!is_alive(pid), "an orderly end waits for it");
    host.restart();
}

#[test]
fn an_announcer_that_dies_is_replaced_and_what_was_not_told_is_told() {
    let host = Setup::counter("").config(TICK).start();
    host.boot("web-1");
    let watcher = Watcher::inotifywait(host.mount(), &["web-1".to_owned()]);
    for _ in 0..3 {
        let pid = announcer(&host);
        assert!(host.signal_naming_mount(pid, Signal::STOP));
        let count = watcher.seen("web-1").len();
        host.write("web-1/idle_after", "1s").unwrap();
        wait_until("the reaper puts it to sleep", || host.state("web-1") == "snapshotted");
        assert!(host.signal_naming_mount(pid, Signal::KILL));
        watcher.wait_to_see("web-1", count, "snapshotted");
        assert!(!is_alive(pid));
        host.write("web-1/idle_after", "never").unwrap();
        host.wake("web-1");
    }
}

#[test]
fn a_thousand_that_change_at_once_are_all_announced() {
    const COUNT: usize = 1000;
    let host = Setup::bare().start();
    host.bash_ok(&format!("mkdir $(seq -f 's%g' {COUNT})"));
    let out = tempfile::NamedTempFile::new().unwrap();
    let mut inotifywait = command("inotifywait");
    inotifywait.args(["-m", "-r", "-e", "modify", "--format", "%w%f", "."]);
    inotifywait.current_dir(host.mount()).stdout(out.reopen().unwrap());
    inotifywait.stderr(out.reopen().unwrap());
    let mut inotifywait = inotifywait.spawn().unwrap();
    let said = || fs::read_to_string(out.path()).unwrap();
    wait_until("it watches", || said().contains("Watches established."));
    // Each is refused, which is an event of its own that only the daemon can tell of.
    host.bash_ok("ls -d s* | xargs -P 64 -I{} sh -c 'echo sleep 1<> {}/state' 2>&1 | wc -l");
    wait_until("all of them are announced", || {
        let said = said();
        let paths = said.lines().filter(|line| line.ends_with("/events"));
        paths.collect::<std::collections::BTreeSet<_>>().len() == COUNT
    });
    let log = host.read("dozed.events");
    assert_eq!(log.matches("\"event\":\"failed\"").count(), COUNT);
    inotifywait.kill().unwrap();
    inotifywait.wait().unwrap();
}

#[test]
fn strangers_see_no_events_but_their_own() {
    let host = Setup::bare().start();
    for id in ["web-1", "web-2"] {
        host.mkdir(id).unwrap();
    }
    let read = |uid: u32, gid: u32, script: &str| {
        let mut bash = command("/bin/bash");
        bash.args(["-c", script]).current_dir(host.mount()).uid(uid).gid(gid);
        String::from_utf8(bash.output().unwrap().stdout).unwrap()
    };
    assert_eq!(read(1000, 1000, "cat dozed.events; stat -c %s dozed.events"), "0\n");
    host.bash_ok("chown 1000:2000 web-1");
    host.write("web-1/state", "sleep").unwrap_err();
    host.write("web-2/state", "sleep").unwrap_err();
    let all = host.read("dozed.events");
    assert_eq!(all.lines().count(), 4);
    let mine: String = all.split_inclusive('\n').filter(|l| l.contains("\"1000:2000\"")).collect();
    assert_eq!(mine.lines().count(), 1);
    for (uid, gid) in [(1000, 1000), (1001, 2000)] {
        let size = format!("{}\n", mine.len());
        assert_eq!(read(uid, gid, "stat -c %s dozed.events"), size);
        assert_eq!(read(uid, gid, "cat dozed.events"), mine, "{uid}:{gid}");
        assert_eq!(read(uid, gid, "tail -n 9 dozed.events"), mine, "{uid}:{gid}");
    }
    assert_eq!(read(3000, 3000, "cat dozed.events"), "");
    assert_eq!(read(3000, 3000, "cat web-1/events"), "");
}

#[test]
fn tail_follows_the_logs() {
    let host = Setup::counter("").config(TICK).start();
    host.boot("web-1");
    let out = tempfile::NamedTempFile::new().unwrap();
    let mut tails: Vec<_> = [
        "tail -n +1 -s 0.1 -f dozed.events",
        "tail -n 2 -s 0.1 -f web-1/events",
        "tail -s 0.1 -F web-1/console",
    ]
    .map(|script| {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut tail = command("/bin/bash");
        tail.args(["-c", &format!("exec {script}")]).current_dir(host.mount());
        let tail = tail.stdout(file.reopen().unwrap()).stderr(out.reopen().unwrap());
        (tail.spawn().unwrap(), file)
    })
    .into();
    let said = |tails: &[(std::process::Child, tempfile::NamedTempFile)], number: usize| {
        fs::read_to_string(tails[number].1.path()).unwrap()
    };
    wait_until("they have begun", || (0..3).all(|number| !said(&tails, number).is_empty()));
    for _ in 0..3 {
        host.sleep("web-1");
        host.wake("web-1");
    }
    wait_until("all of it came", || said(&tails, 0) == host.read("dozed.events"));
    let log = host.read("web-1/events");
    wait_until("all of it came", || log.ends_with(&said(&tails, 1)));
    assert_eq!(said(&tails, 1).lines().count(), 2 + 12);
    let before = said(&tails, 2).len();
    wait_until("the console goes on", || said(&tails, 2).len() > before);
    assert!(host.read("web-1/console").contains(said(&tails, 2).lines().last().unwrap()));
    for (tail, _) in &mut tails {
        tail.kill().unwrap();
        tail.wait().unwrap();
    }
    let complaints = fs::read_to_string(out.path()).unwrap();
    assert!(!complaints.contains("truncated"), "{complaints}");
}

#[test]
fn fifty_kills_of_daemon_or_announcer_hang_nobody() {
    let mut host = Setup::counter("").config(TICK).start();
    let ids = names(4);
    ids.iter().for_each(|id| host.boot(id));
    // A fixed sequence, so that a failure comes again.
    let mut random = 12_345_u64;
    let mut next = |below: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (random >> 33) % below
    };
    for _ in 0..50 {
        let watcher = Watcher::inotifywait(host.mount(), &ids);
        let writers: Vec<_> = ids
            .iter()
            .map(|id| {
                let script = format!(
                    "for verb in sleep wake sleep wake; do echo $verb > {0}/state; \
                     touch {0}/activity; cat {0}/state {0}/events; done; ls -l",
                    host.path(id).display()
                );
                let mut bash = command("/bin/bash");
                bash.args(["-c", &script]).stdout(Stdio::null()).stderr(Stdio::null());
                bash.spawn().unwrap()
            })
            .collect();
        let since = Stopwatch::start();
        let moment = Duration::from_millis(next(150));
        wait_until("some moment in the middle of it", || since.elapsed() >= moment);
        if next(2) == 0 {
            let pid = announcer(&host);
            assert!(host.signal_naming_mount(pid, Signal::KILL));
            wait_until("it is gone", || !is_alive(pid));
        } else {
            host.kill_daemon();
            host.restart();
        }
        for mut writer in writers {
            wait_for("a writer ends", || writer.try_wait().unwrap());
        }
        drop(watcher);
    }
    for id in &ids {
        wait_until("it is settled", || ["running", "snapshotted"].contains(&&*host.state(id)));
        let watcher = Watcher::inotifywait(host.mount(), &ids);
        host.wake(id);
        host.write(&format!("{id}/idle_after"), "1s").unwrap();
        watcher.wait_to_see(id, 0, "snapshotted");
    }
}
