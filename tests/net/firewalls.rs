//! Other firewalls of the host: what is said of them is what they do, and who does what is
//! said gets packets through.

use std::{fs, net::UdpSocket};

use dozed::{
    net::{Network as _, survey},
    sandbox::network::WakePorts,
};
use tempfile::TempDir;

use crate::{
    guest::{Guest, UDP},
    host::{Host, SERVER, Sandbox, assert_silent, heard, id, nft, on_a_host, run},
};

const SENT: &str = "packets from sandboxes";
const ANSWERS: &str = "answers to sandboxes";
const QUEUED: &str = "packets queued for a wake";
const WELL: &str = "None drops forwarded packets.";

fn says(host: &Host) -> String {
    let findings = survey(&host.plan);
    let found = findings.into_iter().find(|finding| finding.subject == "other firewalls").unwrap();
    assert_eq!(found.is_well, found.says == WELL, "{found:?}");
    found.says
}

/// Fails if not just this is said to be refused.
#[track_caller]
fn assert_refused(host: &Host, refused: &[&str], what: &str) {
    let says = says(host);
    let found: Vec<_> =
        [SENT, ANSWERS, QUEUED].into_iter().filter(|words| says.contains(words)).collect();
    assert_eq!(found, refused, "{what}: {says}");
}

/// Returns the commands of a sentence.
fn commands(says: &str) -> Vec<&str> {
    says.split('`').skip(1).step_by(2).collect()
}

/// Sends from a sandbox, and has it be answered.
fn assert_answered(host: &Host, sandbox: &Sandbox) {
    let server = host.udp_server(SERVER, 4000);
    sandbox.guest.udp(5000, (SERVER, 4000), b"out");
    let (text, from) = heard(&server);
    assert_eq!(text, "out");
    server.send_to(b"back", from).unwrap();
    sandbox.guest.expect("the answer", |p| p.protocol == UDP && p.text() == b"back");
}

/// Wakes a sandbox by a datagram, and returns what comes of that to its guest.
fn wake_by_packet(host: &Host, name: &str, slot: u32) -> Guest {
    let wanted = host.wanted(name, slot);
    let ports = WakePorts::new(&["udp/53"]).unwrap();
    host.network.listen(&id(name), wanted.address, Some(&ports)).unwrap();
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.send_to(b"wake", (wanted.address.ip(), 53)).unwrap();
    assert_eq!(host.triggered().0, wanted.address);
    host.network.ensure(&wanted).unwrap();
    let guest = Guest::new(host.network.open_tap(&id(name)).unwrap());
    host.network.deliver(&id(name), wanted.address).unwrap();
    guest
}

/// Fails if a firewall that refuses everything is not told of, if that is wrong, or if what is
/// said to do about it does not help. `tell` runs a command.
fn assert_judged_right(host: &Host, words: &str, tell: &dyn Fn(&str)) {
    let sandbox = host.sandbox("a", 0);
    let server = host.udp_server(SERVER, 4000);
    sandbox.guest.udp(5000, (SERVER, 4000), b"out");
    assert_silent(&server);
    drop(server);
    let says = says(host);
    assert!(says.contains(words) && says.contains(SENT) && says.contains(QUEUED), "{says}");
    let commands = commands(&says);
    assert_eq!(commands.len(), 2, "{says}");
    for command in commands {
        tell(command);
    }
    assert_refused(host, &[], words);
    assert_answered(host, &sandbox);
    let woken = wake_by_packet(host, "b", 1);
    woken.expect("what was held", |p| p.protocol == UDP && p.text() == b"wake");
}

fn shell(script: &str) {
    run("sh", &["-c", script]);
}

fn nft_file(script: &str) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rules.nft");
    fs::write(&path, script).unwrap();
    nft(&format!("-f {}", path.display()));
}

#[test]
fn a_chain_of_nftables_is_judged_by_what_it_does_with_each_of_our_packets() {
    on_a_host(|host| {
        let all = &[SENT, ANSWERS, QUEUED][..];
        let chain = |policy: &str, rules: &str| {
            nft_file(&format!(
                "table inet filter {{ chain trusted {{ counter accept; }}; chain forward {{ \
                 type filter hook forward priority 0; policy {policy}; {rules} }}; }}"
            ));
        };
        let in_is_out = "iifname \"dz*\" accept; oifname \"dz*\" accept;";
        for (policy, rules, refused) in [
            ("accept", "", &[][..]),
            ("drop", "", all),
            ("drop", in_is_out, &[]),
            ("drop", "iifname \"dz*\" accept;", &[ANSWERS, QUEUED]),
            ("drop", "oifname \"dz*\" accept;", &[SENT]),
            ("drop", "iifname \"dz0ad50002\" accept; oifname \"dz*\" accept;", &[SENT]),
            ("drop", "iifname \"dz*\" oifname \"up0\" accept; oifname \"dz*\" accept;", &[]),
            ("drop", "iifname \"dz*\" oif up0 accept; oifname \"dz*\" accept;", &[]),
            ("drop", "iifname \"dz*\" tcp dport 443 accept; oifname \"dz*\" accept;", &[SENT]),
            ("drop", "iifname { \"lan0\", \"dz*\" } accept; oifname \"dz*\" accept;", &[]),
            ("drop", "iifname vmap { \"dz*\" : jump trusted }; oifname \"dz*\" accept;", &[]),
            ("drop", "iifname vmap { \"lan0\" : jump trusted };", all),
            ("drop", "ct state established,related accept; iifname \"do*\" accept;", &[SENT]),
            ("drop", "ct state { established, related } accept;", &[SENT, QUEUED]),
            ("drop", "ct state vmap { established : accept, invalid : drop };", &[SENT, QUEUED]),
            ("drop", "ip saddr 10.213.0.0/16 accept; ip daddr 10.213.0.0/16 accept;", &[]),
            ("drop", "ip saddr { 10.0.0.0/8, 192.168.0.0/16 } accept;", &[ANSWERS]),
            ("drop", "iifgroup 181731328 accept; oifgroup 181731328 accept;", &[]),
            ("accept", "ct state invalid drop; ip daddr 192.0.2.1 drop; tcp dport 25 drop;", &[]),
            ("accept", "iifname \"lan0\" drop; iifname != \"dz*\" drop;", &[ANSWERS, QUEUED]),
            ("accept", "ct state new drop;", &[SENT, QUEUED]),
            ("accept", "meta nfproto ipv4 reject;", all),
            (
                "accept",
                "iifname \"dz*\" return; reject with icmpx admin-prohibited;",
                &[ANSWERS, QUEUED],
            ),
        ] {
            chain(policy, rules);
            assert_refused(host, refused, rules);
            nft("delete table inet filter");
        }
        // Others are none of our business.
        nft_file(
            "table ip6 filter { chain f { type filter hook forward priority 0; policy drop; }; }",
        );
        assert_refused(host, &[], "IPv6");
        nft("delete table ip6 filter");
        chain("drop", "");
        let words = "Chain forward of table inet filter drops by its policy";
        assert_judged_right(host, words, &shell);
        nft("delete table inet filter");
    });
}

#[test]
fn dockers_chains_are_judged_right() {
    on_a_host(|host| {
        // As dockerd 20.10 makes them where the host did not forward before.
        for rule in [
            "-P FORWARD DROP",
            "-N DOCKER",
            "-N DOCKER-ISOLATION-STAGE-1",
            "-N DOCKER-ISOLATION-STAGE-2",
            "-N DOCKER-USER",
            "-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2",
            "-A DOCKER-ISOLATION-STAGE-1 -j RETURN",
            "-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP",
            "-A DOCKER-ISOLATION-STAGE-2 -j RETURN",
            "-A DOCKER-USER -j RETURN",
            "-A FORWARD -j DOCKER-USER",
            "-A FORWARD -j DOCKER-ISOLATION-STAGE-1",
            "-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            "-A FORWARD -o docker0 -j DOCKER",
            "-A FORWARD -i docker0 ! -o docker0 -j ACCEPT",
            "-A FORWARD -i docker0 -o docker0 -j ACCEPT",
        ] {
            iptables(rule);
        }
        iptables("-I DOCKER-USER -i dz+ -j ACCEPT");
        // That is half of it, and no connection is made by it.
        assert_refused(host, &[ANSWERS, QUEUED], "half of it");
        iptables("-D DOCKER-USER -i dz+ -j ACCEPT");
        iptables("-I DOCKER-USER -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT");
        assert_refused(host, &[SENT, QUEUED], "answers to all");
        iptables("-D DOCKER-USER -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT");
        let words = "drops by its policy packets from sandboxes, answers to sandboxes and packets \
                     queued for a wake; for Docker: `iptables -I DOCKER-USER";
        assert_judged_right(host, words, &shell);
        nft("delete table ip filter");
        // Another's, with a last rule as iptables-services has it.
        iptables("-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT");
        iptables("-A FORWARD -j REJECT --reject-with icmp-host-prohibited");
        assert_refused(host, &[SENT, QUEUED], "a last rule");
        for command in commands(&says(host)) {
            shell(command);
        }
        assert_refused(host, &[], "a last rule after the remedy");
        nft("delete table ip filter");
    });
}

fn iptables(args: &str) {
    run("iptables-nft", &args.split(' ').collect::<Vec<_>>());
}

/// The settings of ufw for one test, beside those of the machine.
struct Ufw(TempDir);

impl Ufw {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let settings = dir.path().join("ufw");
        shell(&format!("cp -a /etc/ufw {}", settings.display()));
        let default = "IPV6=no\nDEFAULT_INPUT_POLICY=DROP\nDEFAULT_OUTPUT_POLICY=ACCEPT\n\
                       DEFAULT_FORWARD_POLICY=DROP\nDEFAULT_APPLICATION_POLICY=SKIP\n\
                       MANAGE_BUILTINS=no\nIPT_SYSCTL=/etc/ufw/sysctl.conf\nIPT_MODULES=\n";
        fs::write(dir.path().join("default"), default).unwrap();
        let this = Self(dir);
        this.tell("ufw --force reset");
        this
    }

    /// Runs a command in a mount namespace in which these are ufw's settings.
    fn tell(&self, command: &str) {
        let dir = self.0.path().display();
        let script = format!(
            "mount --bind {dir}/ufw /etc/ufw && mount --bind {dir}/default /etc/default/ufw && \
             {command}"
        );
        run("unshare", &["--mount", "sh", "-c", &script]);
    }
}

#[test]
fn ufw_is_judged_right() {
    on_a_host(|host| {
        let ufw = Ufw::new();
        ufw.tell("ufw --force enable");
        let words = "Chain FORWARD of table ip filter drops by its policy";
        assert_judged_right(host, words, &|command| ufw.tell(command));
        // What is said outlives a reload, and is of use where ufw rejects, too.
        ufw.tell("ufw default reject routed");
        ufw.tell("ufw reload");
        assert_refused(host, &[], "after a reload");
        ufw.tell("ufw route delete allow in on dz+");
        assert_refused(host, &[SENT], "half of it");
        assert!(says(host).contains("refuses by a rule"), "{}", says(host));
        ufw.tell("ufw disable");
        nft("flush ruleset");
    });
}

/// What firewalld 1.3 has of what is forwarded, with no zone but the default one. It is not
/// installed for tests, as installing it starts it and has it start at each boot.
const FIREWALLD: &str = r#"
table inet firewalld {
    chain filter_FWD_trusted { jump policies_pre; jump policies_post; accept; }
    chain filter_FWD_public {
        jump policies_pre
        jump policies_post
        reject with icmpx admin-prohibited
    }
    chain policies_pre { }
    chain policies_post { }
    chain filter_FORWARD_ZONES { goto filter_FWD_public; }
    chain filter_FORWARD {
        type filter hook forward priority filter + 10; policy accept;
        ct state { established, related } accept
        ct status dnat accept
        iifname "lo" accept
        ct state invalid drop
        ip6 daddr { ::/96, 2002::/24 } reject with icmpv6 addr-unreachable
        jump filter_FORWARD_ZONES
        reject with icmpx admin-prohibited
    }
}
"#;

/// Returns what takes firewalld's place: `reload` does what its reload did with the zone of
/// trusted interfaces.
fn firewalld(reload: impl Fn()) -> impl Fn(&str) {
    move |command| {
        const ADD: &str = "firewall-cmd --permanent --zone=trusted --add-interface=dz+ \
                           --add-interface=dozed+";
        match command {
            ADD => {}
            "firewall-cmd --reload" => reload(),
            other => panic!("{other}"),
        }
    }
}

#[test]
fn firewalld_is_judged_right() {
    on_a_host(|host| {
        nft_file(FIREWALLD);
        let zone = |links: &str| {
            let rule = format!("iifname \"{links}\" goto filter_FWD_trusted");
            nft(&format!("insert rule inet firewalld filter_FORWARD_ZONES {rule}"));
        };
        zone("lan0");
        assert_refused(host, &[SENT, QUEUED], "a zone of others");
        let words = "Chain filter_FORWARD of table inet firewalld refuses by a rule packets from \
                     sandboxes and packets queued for a wake; for firewalld: ";
        assert_judged_right(
            host,
            words,
            &firewalld(|| ["dz*", "dozed*"].into_iter().for_each(zone)),
        );
        nft("flush chain inet firewalld filter_FORWARD_ZONES");
        nft("add rule inet firewalld filter_FORWARD_ZONES goto filter_FWD_public");
        zone("dz*");
        assert_refused(host, &[QUEUED], "without the device");
        nft("delete table inet firewalld");
    });
}

#[test]
fn firewalld_that_uses_iptables_is_judged_right() {
    on_a_host(|host| {
        for rule in [
            "-N FORWARD_direct",
            "-N FORWARD_ZONES",
            "-N FWD_public",
            "-N FWD_trusted",
            "-A FWD_public -j REJECT",
            "-A FWD_trusted -j ACCEPT",
            "-A FORWARD_ZONES -g FWD_public",
            "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT",
            "-A FORWARD -i lo -j ACCEPT",
            "-A FORWARD -m conntrack --ctstate INVALID -j DROP",
            "-A FORWARD -j FORWARD_direct",
            "-A FORWARD -j FORWARD_ZONES",
            "-A FORWARD -j REJECT --reject-with icmp-host-prohibited",
        ] {
            iptables(rule);
        }
        let zone = |links: &str| iptables(&format!("-I FORWARD_ZONES -i {links} -g FWD_trusted"));
        let words = "Chain FORWARD of table ip filter refuses by a rule packets from \
                     sandboxes and packets queued for a wake; for firewalld: ";
        assert_judged_right(
            host,
            words,
            &firewalld(|| ["dz+", "dozed+"].into_iter().for_each(zone)),
        );
        nft("delete table ip filter");
    });
}
