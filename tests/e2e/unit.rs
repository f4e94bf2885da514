//! The daemon as the service of `dozed.service`: all that sandboxes do, under what systemd
//! forbids it.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::io::Errno;

use crate::support::{Host, Setup, in_a_world, wait_for, wait_until};

/// No answer takes as long on any machine.
const SOON: Duration = Duration::from_secs(60);

fn unit() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/package/dozed.service")
}

fn boot(host: &Host, id: &str) {
    host.boot(id);
    wait_until("the guest is up", || host.read(&format!("{id}/console")).contains("guest# "));
}

/// Connects to a guest, which may not be listening yet.
fn connect(host: &Host, id: &str) -> TcpStream {
    let address: Ipv4Addr = host.read(&format!("{id}/net/address")).trim().parse().unwrap();
    let to = SocketAddr::from((address, 7));
    wait_for("the guest listens", || TcpStream::connect_timeout(&to, SOON).ok())
}

#[test]
fn all_that_a_sandbox_does_works_under_the_unit() {
    in_a_world(|_| {
        let options = "dozed.quiet dozed.net=169.254.0.21/30,169.254.0.22 dozed.serve=7";
        let setup = Setup::linux(options).net("internet").woken_by_packets();
        let mut host = setup.restricted_by(&unit()).start();
        assert_eq!(host.value("dozed.status", "lacks"), "none");
        boot(&host, "web-1");
        drop(connect(&host, "web-1"));
        host.sleep("web-1");
        host.wake("web-1");
        host.write("web-1/net/denied", "198.51.100.0/24").unwrap();
        host.sleep("web-1");
        drop(connect(&host, "web-1"));
        // A guest may answer a moment before its wake is recorded.
        wait_until("the wake is told", || {
            host.value("web-1/idle", "last_wake_cause").starts_with("packet ")
        });
        host.bash_ok("touch web-1/activity; chmod 700 web-1; chown 4321:4321 web-1");
        // Guests outlive it here too.
        host.kill_daemon();
        host.restart();
        assert_eq!(host.state("web-1"), "running");
        drop(connect(&host, "web-1"));
        host.mkdir("web-2").unwrap();
        host.write("web-2/config", "net = \"isolated\"\nwake_on = \"none\"").unwrap();
        host.wake("web-2");
        drop(host.open("web-2/awake").unwrap());
        host.sleep("web-2");
        for id in ["web-1", "web-2"] {
            host.rmdir(id).unwrap();
        }
        let log = host.log();
        let bad: Vec<_> =
            log.lines().filter(|line| line.contains("Operation not permitted")).collect();
        assert!(bad.is_empty(), "{bad:?}");
    });
}

#[test]
fn a_unit_that_forbids_networks_is_told_by_the_daemon_and_by_the_doctor() {
    in_a_world(|_| {
        let dir = tempfile::tempdir().unwrap();
        let changed = dir.path().join("dozed.service");
        let text = fs::read_to_string(unit()).unwrap();
        let lines = text.lines().map(|line| match line {
            _ if line.starts_with("RestrictAddressFamilies=") => "RestrictAddressFamilies=AF_UNIX",
            _ if line.contains("CAP_NET_ADMIN") || line.contains("/dev/net/tun") => "",
            other => other,
        });
        fs::write(&changed, lines.collect::<Vec<_>>().join("\n")).unwrap();
        let host = Setup::counter("").restricted_by(&changed).start();
        let lacks = host.value("dozed.status", "lacks");
        for part in ["AF_NETLINK", "CAP_NET_ADMIN", "/dev/net/tun"] {
            assert!(lacks.contains(part), "{lacks}");
            assert!(host.log().contains(part));
        }
        let report = host.doctor();
        let line = report.lines().find(|line| line.contains("daemon")).unwrap();
        assert!(line.starts_with("warn") && line.contains("CAP_NET_ADMIN"), "{report}");
        // A sandbox without a network has all that it had.
        host.boot("web-1");
        host.sleep("web-1");
        host.mkdir("web-2").unwrap();
        let refused = host.write("web-2/config", "net = \"isolated\"");
        let refused = refused.and_then(|()| host.write("web-2/state", "wake"));
        assert_eq!(refused, Err(Errno::IO));
    });
}
