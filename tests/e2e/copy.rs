//! A copy is the content: every way of reading a file gives what `cat` shows.

use std::{collections::BTreeMap, fs, os::unix::fs::MetadataExt, path::Path};

use crate::support::{Host, Setup};

/// Ways to read a file, by one interpreter: each is given the paths and writes what it read.
const WAYS: &str = r#"
import mmap, os, shutil, sys, tempfile
READ = os.O_RDONLY
def read(fd, path): return open(path, 'rb').read()
def small(fd, path):
    parts = []
    while part := os.read(fd, 7): parts.append(part)
    return b''.join(parts)
def pread(fd, path):
    parts, at = [], 0
    while part := os.pread(fd, 11, at): parts.append(part); at += len(part)
    return b''.join(parts)
def readv(fd, path):
    bufs = [bytearray(5), bytearray(1 << 20)]
    count = os.readv(fd, bufs)
    return b''.join(bufs)[:count] + os.read(fd, 1 << 20)
def into(copy):
    def way(fd, path):
        with tempfile.TemporaryFile() as to:
            copy(fd, to.fileno())
            to.seek(0)
            return to.read()
    return way
def sendfile(fd, to):
    at = 0
    while count := os.sendfile(to, fd, at, 1 << 16): at += count
def splice(fd, to):
    r, w = os.pipe()
    while count := os.splice(fd, w, 1 << 14): os.splice(r, to, count)
    os.close(r); os.close(w)
def copy_file_range(fd, to):
    try:
        while os.copy_file_range(fd, to, 1 << 16): pass
    except OSError: sendfile(fd, to)
def private(fd, path):
    size = os.fstat(fd).st_size
    return bytes(mmap.mmap(fd, size, access=mmap.ACCESS_COPY)) if size else b''
def copyfile(fd, path):
    with tempfile.NamedTemporaryFile() as to:
        shutil.copyfile(path, to.name)
        return open(to.name, 'rb').read()
def direct(fd, path):
    fd = os.open(path, READ | os.O_DIRECT)
    buf = mmap.mmap(-1, 1 << 20)
    count = os.readv(fd, [buf])
    os.close(fd)
    return buf[:count]
def sized(fd, path):
    return os.read(fd, os.fstat(fd).st_size)
ways = dict(read=read, small=small, pread=pread, readv=readv, sendfile=into(sendfile),
    splice=into(splice), copy_file_range=into(copy_file_range), private=private,
    copyfile=copyfile, direct=direct, sized=sized)
out = sys.argv[1]
for path in sys.argv[2:]:
    for name, way in ways.items():
        fd = os.open(path, READ)
        with open(f"{out}/{name}:{path.replace('/', '+')}", 'wb') as to: to.write(way(fd, path))
        os.close(fd)
"#;

/// Ways to read a file by a program.
const PROGRAMS: [(&str, &str); 12] = [
    ("cat", "cat F"),
    ("busybox-cat", "busybox cat F"),
    ("dd", "dd if=F bs=3 2> /dev/null"),
    ("cp", "cp F $TMP/c; cat $TMP/c"),
    ("cp-sparse", "cp --sparse=always F $TMP/c; cat $TMP/c"),
    ("busybox-cp", "busybox cp F $TMP/c; cat $TMP/c"),
    ("install", "install -m 600 F $TMP/c; cat $TMP/c"),
    ("tar", "tar cf - F 2> $TMP/said | tar xOf -; [ ! -s $TMP/said ]"),
    ("busybox-tar", "busybox tar cf - F | busybox tar xOf - F"),
    ("cpio", "echo F | cpio -o --quiet | (cd $TMP && cpio -idum --quiet); cat $TMP/F"),
    ("tail", "tail -c +1 F"),
    ("head", "head -c 1000000 F"),
];

const STABLE: [&str; 12] = [
    "config",
    "error",
    "idle_after",
    "delete_after",
    "pinned",
    "net/address",
    "net/mac",
    "net/namespace",
    "net/nameservers",
    "net/denied",
    "net/allowed",
    "awake",
];
const MOVING: [&str; 5] = ["status", "activity", "idle", "events", "net/counters"];

/// Reads every file in every way.
fn read_all(host: &Host, files: &[String]) -> BTreeMap<String, Vec<u8>> {
    let out = tempfile::tempdir().unwrap();
    let dir = out.path().join("out");
    fs::create_dir(&dir).unwrap();
    let script = out.path().join("ways.py");
    fs::write(&script, WAYS).unwrap();
    let names = files.join(" ");
    host.bash_ok(&format!("/usr/bin/python3 {} {} {names}", script.display(), dir.display()));
    let tmp = out.path().display().to_string();
    for file in files {
        let flat = file.replace('/', "+");
        for (name, program) in PROGRAMS {
            let program = program.replace('F', file).replace("$TMP", &tmp);
            host.bash_ok(&format!("({program}) > {}/{name}:{flat}", dir.display()));
        }
    }
    let read = |path: &Path| fs::read(path).unwrap();
    let entries = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path());
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().replace('+', "/");
    entries.map(|path| (name(&path), read(&path))).collect()
}

/// What of a table does not change by itself: its keys.
fn keys(text: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(text);
    text.lines().map(|line| line.split(' ').next().unwrap().to_owned()).collect()
}

#[test]
fn every_way_of_reading_gives_the_same_bytes() {
    let host = Setup::counter("").start();
    host.boot("web-1");
    let list: String = (0..1000).map(|n| format!("10.{}.{}.0/24\n", n / 256, n % 256)).collect();
    host.write("web-1/net/denied", &list).unwrap();
    let of = |files: &[&str]| files.iter().map(|f| format!("web-1/{f}")).collect::<Vec<_>>();
    let (stable, moving) = (of(&STABLE), of(&MOVING));
    let roots = ["dozed.status", "dozed.list", "dozed.events", "dozed.metrics", "dozed.error"];
    let roots = roots.map(str::to_owned);
    let ways = 11 + PROGRAMS.len();
    let read = read_all(&host, &[&stable[..], &moving[..], &roots[..]].concat());
    assert_eq!(read.len(), ways * (stable.len() + moving.len() + roots.len()));
    for (name, text) in read {
        let (way, file) = name.split_once(':').unwrap();
        let whole = fs::read(host.path(file)).unwrap();
        if stable.iter().any(|stable| stable == file) {
            assert_eq!(String::from_utf8_lossy(&text), String::from_utf8_lossy(&whole), "{name}");
        } else if file.ends_with("events") {
            assert!(whole.starts_with(&text) && text.ends_with(b"\n"), "{way} of {file}");
        } else {
            assert_eq!(keys(&text), keys(&whole), "{way} of {file}");
            assert_eq!(text.last(), whole.last(), "{way} of {file}");
        }
    }
}

#[test]
fn the_size_of_a_file_is_the_length_of_its_text() {
    let host = Setup::counter("").start();
    host.boot("web-1");
    for file in STABLE {
        let path = host.path(&format!("web-1/{file}"));
        let size = fs::metadata(&path).unwrap().size();
        assert_eq!(fs::read(&path).unwrap().len() as u64, size, "{file}");
    }
    // A growing log has the length that it had when it was asked for, and goes on.
    let console = host.path("web-1/console");
    let size = fs::metadata(&console).unwrap().size();
    assert!(size > 0 && fs::read(&console).unwrap().len() as u64 >= size);
    assert_eq!(fs::metadata(host.path("web-1/state")).unwrap().size(), 4096);
    let said =
        host.bash_ok("tail -c 5 web-1/config; wc -c < web-1/config; stat -c %s web-1/config");
    let config = host.read("web-1/config");
    let (tail, len) = (&config[config.len() - 5..], config.len());
    assert_eq!(said, format!("{tail}{len}\n{len}\n"));
    let archive = tempfile::NamedTempFile::new().unwrap();
    let tar = archive.path().display();
    host.bash_ok(&format!(
        "tar cf {tar} --exclude=web-1/console --exclude=web-1/state web-1 dozed.list"
    ));
    let said = host.bash_ok(&format!("tar xOf {tar} web-1/config web-1/net/nameservers"));
    assert_eq!(said, config + &host.read("web-1/net/nameservers"));
    host.bash_ok(
        "grep -r nothing-of-that-name . || true; find . -size +1 > /dev/null; ls -lR > /dev/null",
    );
    assert_eq!(host.error("web-1"), "ok");
}

#[test]
fn mkdir_says_in_a_file_why_it_failed() {
    let host = Setup::bare().start();
    assert_eq!(host.read("dozed.error"), "ok\n");
    assert!(!host.bash("mkdir Web_1").status.success());
    let says = "`Web_1`: an id consists of lower-case letters, digits and inner hyphens, such as \
                `web-1`\n";
    assert_eq!(host.read("dozed.error"), says);
    host.bash_ok("mkdir web-1; echo 1 > web-1/pinned");
    assert_eq!(host.read("dozed.error"), "ok\n");
    assert!(!host.bash("rmdir web-1").status.success());
    assert!(host.read("dozed.error").contains("pinned"));
    assert!(!host.bash(&format!("mkdir {}", "a".repeat(64))).status.success());
    assert!(host.read("dozed.error").contains("at most 63 characters"));
    host.bash_ok("echo 0 > web-1/pinned; rmdir web-1");
    assert_eq!(host.read("dozed.error"), "ok\n");
}
