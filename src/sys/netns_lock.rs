//! Locks that belong to a network namespace: abstract Unix sockets.
//!
//! Such a socket has a name in the network namespace, not in a file system, and ends with its
//! process. Any user may bind any name, so each lock has a random name, and counts only if a
//! process of the daemon's user listens on it.

use std::{
    fs, io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
    },
};

/// The sockets of the network namespace of the thread that reads it.
const SOCKETS: &str = "/proc/thread-self/net/unix";
const UNIQUE: &str = "/proc/sys/kernel/random/uuid";
/// The length of the queue of callers, which nobody accepts: the kernel answers them.
const CALLERS_MAX: i32 = 4096;

/// A lock, until it is dropped or the process exits.
#[derive(Debug)]
pub struct NetnsLock {
    _socket: OwnedFd,
    name: String,
}

/// A lock of a process of the daemon's user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Locked {
    /// What it is for.
    pub subject: String,
    /// The process, where it is in a PID namespace that we see.
    pub pid: Option<u32>,
    name: String,
}

impl NetnsLock {
    /// Takes a lock of `kind` for `subject` in the network namespace of this thread. Others of the
    /// same kind, and for the same subject, may be held: see [`Self::others`].
    pub fn take(kind: &str, subject: &str) -> io::Result<Self> {
        let unique = fs::read_to_string(UNIQUE)?;
        let pid = std::process::id();
        let name = format!("{}{subject}/{pid}-{}", prefix(kind), unique.trim());
        let address = SocketAddrUnix::new_abstract_name(name.as_bytes())?;
        let socket = new_socket()?;
        bind(&socket, &address)?;
        listen(&socket, CALLERS_MAX)?;
        Ok(Self { _socket: socket, name })
    }

    /// Returns the locks of `kind` that others have in the network namespace of this thread.
    pub fn others(&self, kind: &str) -> io::Result<Vec<Locked>> {
        let mut all = locked(kind)?;
        all.retain(|other| other.name != self.name);
        Ok(all)
    }
}

/// Returns the locks of `kind` that processes of our user have.
fn locked(kind: &str) -> io::Result<Vec<Locked>> {
    let list = fs::read(SOCKETS)?;
    let list = String::from_utf8_lossy(&list);
    let prefix = prefix(kind);
    let mut found: Vec<Locked> = Vec::new();
    for line in list.lines() {
        // Num RefCount Protocol Flags Type St Inode Path
        let mut words = line.split_ascii_whitespace().skip(6);
        let (Some(inode), Some(path)) = (words.next(), words.next()) else { continue };
        let Some(name) = path.strip_prefix('@') else { continue };
        let Some((subject, unique)) =
            name.strip_prefix(&prefix).and_then(|rest| rest.rsplit_once('/'))
        else {
            continue;
        };
        // A socket with callers in its queue is listed once for each of them.
        if found.iter().any(|known| known.name == name) {
            continue;
        }
        let pid = match holder(name)? {
            Holder::Ours(pid) => pid,
            Holder::Unknown => match claimed_pid(unique).filter(|pid| has_socket(*pid, inode)) {
                Some(pid) => Some(pid),
                None => continue,
            },
            Holder::NotOurs => continue,
        };
        found.push(Locked { subject: subject.to_owned(), pid, name: name.to_owned() });
    }
    Ok(found)
}

fn prefix(kind: &str) -> String {
    format!("dozed/{kind}/")
}

/// Who listens at a name.
enum Holder {
    /// A process of our user, if it is in a PID namespace that we see.
    Ours(Option<u32>),
    /// Nobody, or another user.
    NotOurs,
    /// Its queue is full, so the kernel does not say.
    Unknown,
}

fn holder(name: &str) -> io::Result<Holder> {
    let Ok(address) = SocketAddrUnix::new_abstract_name(name.as_bytes()) else {
        return Ok(Holder::NotOurs);
    };
    let socket = new_socket()?;
    match connect(&socket, &address) {
        Ok(()) => {}
        // It is gone, or has a name and does not listen yet: it looks for us after that.
        Err(Errno::CONNREFUSED) => return Ok(Holder::NotOurs),
        Err(Errno::AGAIN) => return Ok(Holder::Unknown),
        Err(errno) => return Err(errno.into()),
    }
    let peer = peer(&socket)?;
    if peer.uid != rustix::process::geteuid().as_raw() {
        return Ok(Holder::NotOurs);
    }
    Ok(Holder::Ours(u32::try_from(peer.pid).ok().filter(|pid| *pid > 0)))
}

fn new_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?)
}

/// Returns who made the socket listen that this one is connected to.
fn peer(socket: &OwnedFd) -> io::Result<libc::ucred> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut length = libc::socklen_t::try_from(size_of::<libc::ucred>())
        .expect("the kernel's structs are small");
    // SAFETY: the descriptor is open and ours, and the kernel writes at most `length` bytes to
    // a struct of that size, which outlives the call. Every value of its fields is valid.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut length,
        )
    };
    if done == -1 { Err(io::Error::last_os_error()) } else { Ok(peer) }
}

/// Returns the process that the unique part of a name is said to be of.
fn claimed_pid(unique: &str) -> Option<u32> {
    unique.split_once('-')?.0.parse().ok()
}

/// Says whether a process of our user has the socket `inode` open.
fn has_socket(pid: u32, inode: &str) -> bool {
    let ours = rustix::process::geteuid().as_raw();
    let is_ours = fs::metadata(format!("/proc/{pid}")).is_ok_and(|proc| proc.uid() == ours);
    let wanted = format!("socket:[{inode}]");
    let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    is_ours
        && files
            .filter_map(|file| fs::read_link(file.path()).ok())
            .any(|target| target.as_os_str() == wanted.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::netns;

    fn subjects(lock: &NetnsLock) -> Vec<String> {
        lock.others("test").unwrap().into_iter().map(|other| other.subject).collect()
    }

    #[test]
    fn a_lock_is_seen_in_its_namespace_until_it_is_dropped() {
        netns::in_a_new_one(|_| {
            let one = NetnsLock::take("test", "10.0.0.0/8").unwrap();
            assert_eq!(subjects(&one), [""; 0]);
            let other = NetnsLock::take("test", "10.0.0.0/8").unwrap();
            let seen = other.others("test").unwrap();
            assert_eq!(seen.len(), 1);
            assert_eq!(seen[0].subject, "10.0.0.0/8");
            assert_eq!(seen[0].pid, Some(std::process::id()));
            // Looking leaves a caller in the queue, which makes no second lock.
            assert_eq!(subjects(&other).len(), 1);
            netns::in_a_new_one(|_| {
                let elsewhere = NetnsLock::take("test", "10.0.0.0/8").unwrap();
                assert_eq!(subjects(&elsewhere), [""; 0]);
            })
            .unwrap();
            assert_eq!(other.others("tes").unwrap(), [], "another kind");
            drop(one);
            assert_eq!(subjects(&other), [""; 0]);
        })
        .unwrap();
    }

    #[test]
    fn a_name_that_nobody_of_ours_listens_at_is_no_lock() {
        netns::in_a_new_one(|_| {
            let lock = NetnsLock::take("test", "a").unwrap();
            let bound = |unique: &str| {
                let name = format!("{}b/{unique}", prefix("test"));
                let socket = new_socket().unwrap();
                bind(&socket, &SocketAddrUnix::new_abstract_name(name.as_bytes()).unwrap())
                    .unwrap();
                socket
            };
            let _silent = bound("1-x");
            assert_eq!(subjects(&lock), [""; 0]);
            // A queue without room, at a name that says that it is of a process which has
            // nothing to do with it.
            let full = bound("1-y");
            listen(&full, 0).unwrap();
            let address = format!("{}b/1-y", prefix("test"));
            let address = SocketAddrUnix::new_abstract_name(address.as_bytes()).unwrap();
            let _callers: Vec<_> = std::iter::repeat_with(|| {
                let caller = new_socket().unwrap();
                connect(&caller, &address).map(|()| caller)
            })
            .map_while(Result::ok)
            .collect();
            assert_eq!(subjects(&lock), [""; 0]);
            let own = bound(&format!("{}-z", std::process::id()));
            listen(&own, 0).unwrap();
            assert_eq!(subjects(&lock), ["b"]);
        })
        .unwrap();
    }
}
