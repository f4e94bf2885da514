//! The document of a sandbox's hardware.

use rustix::io::Errno;

use super::refused;
use crate::support::Setup;

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

#[test]
fn an_image_that_is_not_raw_fails_the_wake_with_the_command_that_converts_it() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.qcow2");
    std::fs::write(&image, [&b"QFI\xfb\0\0\0\x03"[..], &[0; 65536]].concat()).unwrap();
    let host = Setup::counter("").start();
    host.mkdir("web-1").unwrap();
    host.write("web-1/config", format!("disks = [{{ path = {image:?} }}]\n")).unwrap();
    let converts = format!("`qemu-img convert -O raw {} OUT`", image.display());
    refused(&host, "web-1/state", b"wake", Errno::INVAL, &converts);
    assert_eq!(host.state("web-1"), "stopped");
    std::fs::write(&image, [0; 65536]).unwrap();
    host.wake("web-1");
    host.counts_on("web-1");
}

#[test]
fn a_kernel_that_went_away_or_is_none_fails_the_wake_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    std::fs::write(&kernel, "this is no kernel").unwrap();
    let host = Setup::counter("").start();
    host.mkdir("web-1").unwrap();
    let document = format!("kernel = \"{}\"\n", kernel.display());
    host.write("web-1/config", &document).unwrap();
    refused(&host, "web-1/state", b"wake", Errno::INVAL, "is no kernel");
    assert_eq!(host.state("web-1"), "stopped");
    // It looks like one, and the VMM knows better.
    std::fs::write(&kernel, b"\x7fELF, but no kernel").unwrap();
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
