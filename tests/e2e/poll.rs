//! poll(2) and epoll(7) on the files of a sandbox.

use std::{
    fs::File,
    io::{Read as _, Seek as _},
    os::unix::fs::FileExt as _,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, epoll, poll},
    io::Errno,
    process::Signal,
};

use crate::support::{Host, Setup, wait_until};

const TICK: &str = "[reaper]\ntick = \"1s\"\n[defaults]\nidle_after = \"never\"";
/// How long any news may take.
const SOON: Duration = Duration::from_secs(180);
const NEWS: PollFlags = PollFlags::PRI.union(PollFlags::ERR);

/// Waits for `wanted`, for at most `limit`, and returns what there was.
fn polled(file: &File, wanted: PollFlags, limit: Duration) -> PollFlags {
    let mut fds = [PollFd::new(file, wanted)];
    poll(&mut fds, Some(&Timespec::try_from(limit).unwrap())).unwrap();
    fds[0].revents()
}

fn now(file: &File, wanted: PollFlags) -> PollFlags {
    polled(file, wanted, Duration::ZERO)
}

fn state(file: &File) -> String {
    let mut bytes = [0; 64];
    let count = file.read_at(&mut bytes, 0).unwrap();
    String::from_utf8_lossy(&bytes[..count]).trim_end().to_owned()
}

fn open(host: &Host, name: &str) -> File {
    File::open(host.path(name)).unwrap()
}

#[test]
fn state_has_pollpri_from_a_change_until_it_is_read_again() {
    let host = Setup::counter("").config(TICK).start();
    host.boot("web-1");
    let file = open(&host, "web-1/state");
    assert_eq!(now(&file, NEWS), NEWS, "it was not read yet");
    assert_eq!(state(&file), "running");
    assert_eq!(now(&file, NEWS | PollFlags::IN), PollFlags::IN);
    // By a writer, by the reaper, by its guest's end.
    std::thread::scope(|scope| {
        scope.spawn(|| host.sleep("web-1"));
        assert!(polled(&file, NEWS, SOON).contains(NEWS));
    });
    assert!(now(&file, NEWS).contains(NEWS), "it was not read again");
    assert_eq!(state(&file), "snapshotted");
    assert_eq!(now(&file, NEWS), PollFlags::empty());
    host.wake("web-1");
    assert_eq!(state(&file), "running");
    host.write("web-1/idle_after", "1s").unwrap();
    while state(&file) != "snapshotted" {
        assert!(polled(&file, NEWS, SOON).contains(NEWS));
    }
    host.write("web-1/idle_after", "never").unwrap();
    host.wake("web-1");
    assert_eq!(state(&file), "running");
    host.signal_vmm(host.vmm("web-1"), Signal::KILL);
    assert!(polled(&file, NEWS, SOON).contains(NEWS));
    assert_eq!(state(&file), "stopped");
    std::thread::scope(|scope| {
        scope.spawn(|| host.rmdir("web-1").unwrap());
        // That it is being deleted is news too.
        wait_until("it hangs up", || polled(&file, NEWS, SOON).contains(NEWS | PollFlags::HUP));
    });
    let gone = file.read_at(&mut [0; 8], 0).unwrap_err();
    assert_eq!(Errno::from_io_error(&gone), Some(Errno::NODEV));
}

#[test]
fn epoll_wakes_once_for_each_change_on_every_one_of_many_files() {
    const FILES: usize = 50;
    let host = Setup::counter("").config(TICK).start();
    host.boot("web-1");
    let files: Vec<File> = (0..FILES).map(|_| open(&host, "web-1/state")).collect();
    let all = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    for (number, file) in files.iter().enumerate() {
        assert_eq!(state(file), "running");
        let flags = epoll::EventFlags::PRI | epoll::EventFlags::ET;
        let data = epoll::EventData::new_u64(number as u64);
        epoll::add(&all, file, data, flags).unwrap();
    }
    let mut woken = std::collections::BTreeSet::new();
    host.write("web-1/idle_after", "1s").unwrap();
    let mut events = Vec::with_capacity(FILES);
    while woken.len() < FILES {
        let limit = Timespec::try_from(SOON).unwrap();
        events.clear();
        let spare = rustix::buffer::spare_capacity(&mut events);
        assert_ne!(epoll::wait(&all, spare, Some(&limit)).unwrap(), 0, "{} of all", woken.len());
        woken.extend(events.iter().map(|event| event.data.u64()));
    }
}

#[test]
fn a_log_has_pollin_while_there_is_more_to_read() {
    let host = Setup::counter("").config(TICK).start();
    host.boot("web-1");
    for name in ["web-1/events", "dozed.events"] {
        let mut file = open(&host, name);
        assert_eq!(now(&file, PollFlags::IN), PollFlags::IN, "{name}");
        let mut before = String::new();
        file.read_to_string(&mut before).unwrap();
        assert!(!before.is_empty());
        assert_eq!(now(&file, PollFlags::IN), PollFlags::empty(), "{name}");
        std::thread::scope(|scope| {
            scope.spawn(|| host.sleep("web-1"));
            assert_eq!(polled(&file, PollFlags::IN, SOON), PollFlags::IN, "{name}");
        });
        host.wake("web-1");
        let mut more = String::new();
        file.read_to_string(&mut more).unwrap();
        assert!(more.contains("\"to\":\"snapshotted\"") && more.ends_with('\n'), "{more}");
        file.rewind().unwrap();
        let mut whole = String::new();
        file.read_to_string(&mut whole).unwrap();
        assert_eq!(whole, before + &more);
    }
}

#[test]
fn a_console_has_pollin_when_the_guest_has_printed() {
    let host = Setup::counter("").config(TICK).start();
    host.mkdir("web-1").unwrap();
    let mut file = open(&host, "web-1/console");
    assert_eq!(now(&file, PollFlags::IN), PollFlags::empty(), "it never ran");
    std::thread::scope(|scope| {
        scope.spawn(|| host.wake("web-1"));
        let mut said = String::new();
        // It counts for as long as it runs.
        for _ in 0..5 {
            assert_eq!(polled(&file, PollFlags::IN, SOON), PollFlags::IN);
            let before = said.len();
            file.read_to_string(&mut said).unwrap();
            assert!(said.len() > before);
        }
    });
    host.sleep("web-1");
    file.read_to_string(&mut String::new()).unwrap();
    assert_eq!(now(&file, PollFlags::IN), PollFlags::empty(), "nobody prints");
}
