//! The document of a sandbox's hardware.

use rustix::io::Errno;

use super::refused;
use crate::support::{Host, Setup, counter_kernel};

#[test]
fn a_document_that_is_wrong_changes_nothing_and_the_error_says_where() {
    let host = Setup::counter("").start();
    host.mkdir("web-1").unwrap();
    let before = host.read("web-1/config");
    for (document, says) in [
        ("vcpus = 1\nmemroy = \"24MiB\"\n", "line 2: unknown key `memroy`"),
        ("memory = \"24\"", "\"256MiB\""),
        ("vcpus = 0", "from 1 to 64"),
        ("vcpus = ", "line 1"),
        ("vmm = \"xen\"", "`cloud-hypervisor`"),
        ("kernel = \"/no/such/kernel\"", "/no/such/kernel"),
        ("kernel = \"vmlinuz\"", "absolute"),
        ("[[disks]]\npath = \"/no/such/disk\"", "line 2: `disks.path`: /no/such/disk"),
    ] {
        refused(&host, "web-1/config", document.as_bytes(), Errno::INVAL, says);
    }
    refused(&host, "web-1/config", &vec![b'#'; 65537], Errno::TOOBIG, "65536");
    assert_eq!(host.read("web-1/config"), before);
    host.write("web-1/config", vec![b'#'; 65536]).unwrap();
    assert_eq!(host.read("web-1/config"), before, "a comment is the template");
}

#[test]
fn what_is_read_can_be_written_and_hardware_changes_only_while_stopped() {
    let host = Setup::counter("").start();
    host.mkdir("web-1").unwrap();
    let first = host.read("web-1/config");
    host.bash_ok("f=$(mktemp) && cp web-1/config $f && cp $f web-1/config && rm $f");
    host.bash_ok("c=$(cat web-1/config); cat <<< \"$c\" > web-1/config");
    assert_eq!(host.read("web-1/config"), first);
    let other = first.replace("24MiB", "28MiB");
    host.write("web-1/config", &other).unwrap();
    assert_eq!(host.read("web-1/config"), other);
    host.wake("web-1");
    assert_eq!(host.number("web-1/status", "memory_bytes"), 28 << 20);
    let third = other.replace("28MiB", "32MiB");
    refused(&host, "web-1/config", third.as_bytes(), Errno::BUSY, "only while it is stopped");
    host.write("web-1/config", &other).unwrap();
    host.sleep("web-1");
    refused(&host, "web-1/config", third.as_bytes(), Errno::BUSY, "only while it is stopped");
    host.wake("web-1");
    host.counts_on("web-1");
    assert_eq!(host.read("web-1/config"), other);
}

#[test]
fn without_a_kernel_there_is_nothing_to_wake() {
    let host = Setup::bare().start();
    host.mkdir("web-1").unwrap();
    refused(&host, "web-1/state", b"wake", Errno::INVAL, "has no kernel");
    assert_eq!(host.state("web-1"), "stopped");
}

/// A host with a sandbox `web-1`, and a directory for its files.
fn host_with_files() -> (Host, tempfile::TempDir) {
    let host = Setup::counter("").start();
    host.mkdir("web-1").unwrap();
    (host, tempfile::tempdir().unwrap())
}

/// Has a `config` name `file` by `document`, in which `FILE` stands for it, when its content is
/// bad: the document is refused. Then when it is good, and the content becomes bad: the boot is.
fn refused_at_commit_and_boot(document: &str, bad: &[u8], good: &[u8], says: &str) {
    let (host, dir) = host_with_files();
    let file = dir.path().join("file");
    let document = document.replace("FILE", file.to_str().unwrap());
    let before = host.read("web-1/config");
    std::fs::write(&file, bad).unwrap();
    refused(&host, "web-1/config", document.as_bytes(), Errno::INVAL, says);
    assert_eq!(host.read("web-1/config"), before);
    std::fs::write(&file, good).unwrap();
    host.write("web-1/config", &document).unwrap();
    std::fs::write(&file, bad).unwrap();
    refused(&host, "web-1/state", b"wake", Errno::INVAL, says);
    assert_eq!(host.state("web-1"), "stopped");
    std::fs::write(&file, good).unwrap();
    host.wake("web-1");
    host.counts_on("web-1");
}

#[test]
fn an_image_that_is_not_raw_is_refused_with_the_command_that_converts_it() {
    let qcow2 = [&b"QFI\xfb\0\0\0\x03"[..], &[0; 65528]].concat();
    let says =
        "is a qcow2 image, and a disk has to be raw; convert it by `qemu-img convert -O raw /";
    for readonly in ["", ", readonly = true"] {
        let document = format!("disks = [{{ path = \"FILE\"{readonly} }}]\n");
        refused_at_commit_and_boot(&document, &qcow2, &[0; 65536], says);
    }
}

#[test]
fn a_compressed_image_is_refused_unless_guests_only_read_it() {
    let (host, dir) = host_with_files();
    let file = dir.path().join("file");
    std::fs::write(&file, [&b"\x1f\x8b\x08"[..], &[0; 509]].concat()).unwrap();
    let document = format!("[[disks]]\npath = {file:?}\n");
    refused(&host, "web-1/config", document.as_bytes(), Errno::INVAL, "is compressed by gzip");
    // Line by line, the last of which says that it is only read.
    let script = format!("printf '%s\n' '[[disks]]' 'path = {file:?}' 'readonly = true'");
    host.bash_ok(&format!("{{ {script}; }} > web-1/config"));
    host.bash_ok(&format!("{script} | while read -r line; do echo \"$line\"; done > web-1/config"));
    assert!(host.read("web-1/config").contains("readonly = true"));
}

#[test]
fn a_disk_that_is_empty_or_ends_within_a_sector_is_refused() {
    let document = "disks = [{ path = \"FILE\", readonly = true }]\n";
    refused_at_commit_and_boot(document, b"", &[0; 65536], "is empty");
    refused_at_commit_and_boot(document, &[0; 65537], &[0; 65536], "`truncate -s %512 /");
}

#[test]
fn what_is_loaded_has_to_fit_into_memory() {
    let kernel = std::fs::read(counter_kernel()).unwrap();
    let says = "`memory` is 24 MiB, of which the kernel takes ";
    let document = format!("kernel = {:?}\ninitramfs = \"FILE\"\n", counter_kernel());
    refused_at_commit_and_boot(&document, &vec![0; 24 << 20], &[0; 512], says);
    refused_at_commit_and_boot(&document, b"", &[0; 512], "is empty");
    let bzimage = [&[0; 0x202][..], b"HdrS", &vec![0; 25 << 20]].concat();
    refused_at_commit_and_boot("kernel = \"FILE\"\n", &bzimage, &kernel, says);
}

#[test]
fn a_kernel_that_is_none_is_refused() {
    let kernel = std::fs::read(counter_kernel()).unwrap();
    let document = "kernel = \"FILE\"\n";
    refused_at_commit_and_boot(document, b"this is no kernel", &kernel, "is not a kernel");
    refused_at_commit_and_boot(document, b"", &kernel, "is empty");
}

#[test]
fn a_kernel_that_went_away_or_only_looks_like_one_fails_the_wake_and_says_so() {
    let (host, dir) = host_with_files();
    let kernel = dir.path().join("kernel");
    // It looks like one, and the VMM knows better.
    std::fs::write(&kernel, b"\x7fELF, but no kernel").unwrap();
    let document = format!("kernel = \"{}\"\n", kernel.display());
    host.write("web-1/config", &document).unwrap();
    assert_eq!(host.write("web-1/state", "wake"), Err(Errno::IO));
    assert_eq!(host.state("web-1"), "stopped");
    assert!(host.error("web-1").contains("booting web-1: "), "{}", host.error("web-1"));
    std::fs::remove_file(&kernel).unwrap();
    assert_eq!(host.write("web-1/state", "wake"), Err(Errno::IO));
    let says = host.error("web-1");
    assert!(says.contains(kernel.to_str().unwrap()), "{says}");
    host.write("web-1/config", "# the template's").unwrap();
    host.wake("web-1");
    host.counts_on("web-1");
}
