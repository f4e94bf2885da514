//! A VMM that does not answer, which a stopped process is as good as. It holds up the
//! one who asked for it, and nobody else; and that one may leave.

use std::{
    process::{Child, Stdio},
    thread,
};

use rustix::{io::Errno, process::Signal};

use crate::support::{Host, Setup, command, is_alive, signal, wait_for, wait_until};

/// Starts a daemon with a sandbox `stuck` that runs on a stopped VMM, and one that is not.
fn host() -> (Host, u32) {
    let host = Setup::counter("").start();
    host.boot("stuck");
    host.boot("other");
    host.counts_on("stuck");
    let vmm = host.vmm("stuck");
    host.signal_vmm(vmm, Signal::STOP);
    (host, vmm)
}

/// Starts a shell that puts `stuck` to sleep, and waits until it is at it.
fn sleeper(host: &Host) -> Child {
    // Whoever runs the tests in the background has them ignore Ctrl-C, and so all they start.
    let mut bash = command("/usr/bin/env");
    bash.args(["--default-signal=INT", "/bin/bash", "-c", "echo sleep > stuck/state"]);
    bash.current_dir(host.mount());
    let child = bash.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("the sleep has begun", || host.state("stuck") == "snapshotting");
    child
}

#[test]
fn a_stuck_operation_holds_up_nobody_else() {
    let (host, vmm) = host();
    thread::scope(|scope| {
        let writer = scope.spawn(|| host.write("stuck/state", "sleep"));
        wait_until("the sleep has begun", || host.state("stuck") == "snapshotting");
        for file in ["status", "error", "config", "activity", "idle", "console", "pinned"] {
            host.read(&format!("stuck/{file}"));
        }
        host.bash_ok("ls -lR . > /dev/null; stat stuck stuck/* > /dev/null; cat dozed.*");
        host.bash_ok("touch stuck/activity; chmod 660 stuck/config");
        host.sleep("other");
        host.wake("other");
        host.counts_on("other");
        host.bash_ok("mkdir new && rmdir new");
        assert_eq!(host.mkdir("stuck"), Err(Errno::EXIST));
        assert_eq!(host.state("stuck"), "snapshotting");
        host.signal_vmm(vmm, Signal::CONT);
        assert_eq!(writer.join().unwrap(), Ok(()));
    });
    assert_eq!(host.state("stuck"), "snapshotted");
    host.wake("stuck");
    assert_eq!(host.counts_on("stuck").boots, 1);
}

#[test]
fn a_writer_that_does_not_wait_is_told_that_the_lock_is_taken() {
    let (host, vmm) = host();
    let mut writer = sleeper(&host);
    for (file, text) in [("state", "wake"), ("state", "sleep"), ("pinned", "1")] {
        let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::NONBLOCK;
        let path = host.path("stuck").join(file);
        let fd = rustix::fs::open(path, flags, rustix::fs::Mode::empty()).unwrap();
        let written = rustix::io::write(&fd, text.as_bytes());
        assert_eq!(written, Err(Errno::AGAIN), "{text} into {file}");
    }
    host.signal_vmm(vmm, Signal::CONT);
    assert!(writer.wait().unwrap().success());
    // Where nobody has the lock the operation is started, and goes on by itself.
    for (verb, state) in [("wake", "running"), ("sleep", "snapshotted")] {
        let script = format!("echo {verb} | dd of=stuck/state oflag=nonblock conv=notrunc");
        host.bash_ok(&script);
        wait_until("what was started is done", || host.state("stuck") == state);
    }
}

#[test]
fn a_signal_ends_the_wait_of_a_writer_and_not_the_operation() {
    let (host, mut vmm) = host();
    for end in [Signal::INT, Signal::TERM, Signal::KILL] {
        host.signal_vmm(vmm, Signal::STOP);
        let mut writer = sleeper(&host);
        signal(&writer, end);
        let status = wait_for("the writer ends", || writer.try_wait().unwrap());
        assert!(!status.success(), "{end:?}: {status}");
        assert_eq!(host.state("stuck"), "snapshotting", "the operation goes on");
        host.signal_vmm(vmm, Signal::CONT);
        wait_until("the operation is done", || host.state("stuck") == "snapshotted");
        assert_eq!(host.error("stuck"), "ok");
        host.wake("stuck");
        host.counts_on("stuck");
        vmm = host.vmm("stuck");
    }
}

#[test]
fn a_signal_that_is_only_news_does_not_end_the_wait() {
    let (host, vmm) = host();
    // Bash has a handler for the end of its children, and none for these others.
    let script = "trap '' INT
        { until test $(cat stuck/state) = snapshotting; do :; done
          kill -INT $$; kill -WINCH $$; kill -URG $$; kill -CONT $$; } &
        echo sleep > stuck/state || exit 1; echo slept";
    let mut bash = command("/bin/bash");
    bash.args(["-c", script]).current_dir(host.mount());
    let mut writer = bash.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("the sleep has begun", || host.state("stuck") == "snapshotting");
    let children = format!("/proc/{0}/task/{0}/children", writer.id());
    let mut looks = 0;
    wait_until("its child has ended, and the daemon has looked at it a while", || {
        let children = std::fs::read_to_string(&children).unwrap();
        looks += u32::from(children.split_whitespace().all(|pid| !is_alive(pid.parse().unwrap())));
        looks > 200
    });
    assert!(writer.try_wait().unwrap().is_none(), "the writer waits on");
    host.signal_vmm(vmm, Signal::CONT);
    let output = writer.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "slept\n");
}

#[test]
fn deleting_preempts_what_is_stuck_and_its_writer_is_told() {
    let (host, vmm) = host();
    thread::scope(|scope| {
        let writer = scope.spawn(|| host.write("stuck/state", "sleep"));
        wait_until("the sleep has begun", || host.state("stuck") == "snapshotting");
        let waiting = scope.spawn(|| host.write("stuck/state", "wake"));
        host.rmdir("stuck").unwrap();
        assert!(!host.list().contains(&"stuck".to_owned()));
        assert_eq!(writer.join().unwrap(), Err(Errno::NODEV));
        let waited = waiting.join().unwrap();
        assert!(matches!(waited, Err(Errno::NODEV | Errno::NOENT)), "{waited:?}");
    });
    wait_until("its VMM is gone", || !is_alive(vmm));
    host.boot("stuck");
    assert_eq!(host.counts_on("stuck").boots, 1);
}

#[test]
fn a_sleep_that_a_vmm_does_not_answer_is_given_up_and_the_guest_runs_on() {
    let (host, vmm) = host();
    let before = host.counted("stuck");
    assert_eq!(host.write("stuck/state", "sleep"), Err(Errno::TIMEDOUT));
    let says = host.error("stuck");
    assert!(says.contains("pausing stuck: "), "{says}");
    host.signal_vmm(vmm, Signal::CONT);
    // Whatever is left to be settled, the next verb settles it.
    host.wake("stuck");
    let after = host.counts_on("stuck");
    assert!(after.count > before.count);
    assert_eq!(host.vmm("stuck"), vmm);
    host.sleep("stuck");
    host.wake("stuck");
    assert_eq!(host.counts_on("stuck").boots, 1);
}
