//! What a `config` may say, and what is said of one that may not.

use super::*;

fn parse(text: &str) -> Result<Spec, SpecError> {
    Spec::parse(text, &Spec::default(), &|_, _| None)
}

#[test]
fn a_spec_reads_back_as_it_was_written() {
    let text = "vmm = \"qemu\"\nvcpus = 2\nmemory = \"2GiB\"\nmemory_mode = \"file\"\n\
                restore_mode = \"copy\"\nkernel = \"/k\"\n\
                cmdline = \"quiet\"\nnet = \"isolated\"\n\
                nameservers = [\"9.9.9.9\"]\ndenied = [\"10.0.0.0/8\", \"1.2.3.4\"]\n\
                allowed = []\nwake_on = \"packet\"\nwake_ports = [\"tcp/22\", \"udp/53\"]\n\
                balloon = true\n\
                inflate_before_sleep = true\nvsock = false\n\n\
                [[disks]]\npath = \"/d\"\nreadonly = true\n";
    let spec = parse(text).unwrap();
    assert_eq!(spec.to_toml(), text);
    assert_eq!(parse(&Spec::default().to_toml()), Ok(Spec::default()));
}

#[test]
fn a_unit_may_be_one_letter_and_is_binary_then() {
    for (text, mib) in [("512M", 512), ("2G", 2048), ("1T", 1 << 20), ("8192K", 8), ("64m", 64)] {
        let spec = parse(&format!("memory = \"{text}\""));
        assert_eq!(spec.map(|spec| spec.memory_bytes), Ok(mib << 20), "{text}");
    }
    for text in
        ["M", "iB", "512", "512Q", "512MM", "512 M iB", "500MB", "1.5M", "1G1G", "1G 1G", "-1G"]
    {
        let error = parse(&format!("memory = \"{text}\"")).expect_err(text);
        assert!(error.message.contains("\"256MiB\", \"256M\" or"), "{text}: {error}");
    }
}

#[test]
fn what_a_document_leaves_out_is_as_in_the_base() {
    let base = Spec { vcpus: 3, kernel: Some("/k".into()), ..Spec::default() };
    let spec = Spec::parse("memory = \"64MiB\"", &base, &|_, _| None).unwrap();
    assert_eq!(spec, Spec { memory_bytes: 64 << 20, ..base });
}

#[test]
fn each_bad_key_is_named_with_its_line_and_what_is_accepted() {
    for (text, line, says) in [
        ("\nbogus = 1", 2, "unknown key `bogus`, expected one of `vmm`"),
        ("memory = \"256\"", 1, "write it with a unit"),
        ("memory = 256", 1, "a text in quotes"),
        ("vcpus = 1\nmemory = \"1KiB\"", 2, "whole number of MiB"),
        ("memory = \"1MiB\"", 1, "from 8MiB to 16TiB"),
        ("memory = \"lots of GiB\"", 1, "is not a size"),
        ("vcpus = 0", 1, "from 1 to 64, not 0"),
        ("vcpus = 65", 1, "from 1 to 64, not 65"),
        ("vmm = \"xen\"", 1, "expected one of `auto`, `qemu`, `cloud-hypervisor`"),
        ("kernel = \"k\"", 1, "write an absolute one"),
        ("memory_mode = \"tmpfs\"", 1, "expected one of `auto`, `shared`, `file`"),
        ("restore_mode = \"lazy\"", 1, "expected one of `auto`, `copy`, `on-demand`"),
        ("vmm = \"qemu\"\nmemory_mode = \"shared\"", 2, "qemu keeps guest memory"),
        ("vmm = \"qemu\"\nrestore_mode = \"on-demand\"", 2, "in a file is not read at a wake"),
        ("restore_mode = \"on-demand\"\nmemory_mode = \"file\"", 1, "is not read at a wake"),
        ("restore_mode = \"copy-on-write\"", 1, "takes a Cloud Hypervisor later than v53.0"),
        ("[[disks]]\npath = \"/d\"\nsize = 1", 3, "unknown key `size`"),
        ("vcpus = \n", 1, ""),
        ("kernel = 3", 1, "`kernel`: integer `3` is not accepted; write an absolute path"),
        ("vcpus = \"two\"", 1, "`vcpus`: string \"two\" is not accepted; write a whole number"),
        ("cmdline = true", 1, "`cmdline`: boolean `true` is not accepted; write a text in"),
        ("wake_ports = \"tcp\"", 1, "`wake_ports`: string \"tcp\" is not accepted; write a list"),
        ("denied = [\n  \"10.0.0.0/8\",\n  7,\n]", 3, "`denied`: integer `7` is not"),
        ("net = true", 1, "`net`: a value without quotes is not accepted"),
        ("vmm = \"xen\"", 1, "`vmm`: unknown value `xen`, expected one of"),
        ("[disks]\npath = \"/d\"", 1, "`disks`: a table is not accepted; write a list"),
        ("vcpus = 1\nvcpus = 2", 2, "`vcpus`: duplicate key"),
    ] {
        let error = parse(text).expect_err(text);
        assert!(error.message.contains(says), "{text:?}: {error}");
        assert_eq!(error.line, Some(line), "{text:?}: {error}");
    }
}

#[test]
fn what_a_guest_may_reach_changes_no_machine_and_having_an_interface_does() {
    let spec = |text| parse(text).unwrap();
    let (none, isolated) = (Spec::default(), spec("net = \"isolated\""));
    for (a, b, same) in [
        (&isolated, &spec("net = \"internet\"\ndenied = [\"10.0.0.0/8\"]"), true),
        (&none, &spec("nameservers = []\nallowed = [\"10.0.0.0/8\"]"), true),
        (&none, &isolated, false),
        (&isolated, &spec("net = \"isolated\"\nvcpus = 2"), false),
    ] {
        assert_eq!((a.is_same_machine(b), b.is_same_machine(a)), (same, same), "{a:?} {b:?}");
    }
    assert_eq!(none.network_policy(), None);
    assert_eq!(isolated.network_policy().unwrap().reach, Reach::Isolated);
}

#[test]
fn a_machine_has_room_for_five_disks_beside_an_interface() {
    let disks = "[[disks]]\npath = \"/d\"\n".repeat(6);
    parse(&disks).unwrap();
    let error = parse(&format!("vcpus = 1\nnet = \"internet\"\n{disks}")).unwrap_err();
    assert_eq!(error.to_string(), "line 2: `disks`: a sandbox with a network has at most 5 disks");
}

#[test]
fn devices_that_do_not_go_together_are_refused_by_the_line_to_mend() {
    let inflating = Spec { inflate_before_sleep: true, ..Spec::default() };
    let connected = Spec { vsock: true, ..Spec::default() };
    let translated = Spec { vmm: VmmChoice::Qemu, ..Spec::default() };
    for (base, text, line, says) in [
        (Spec::default(), "balloon = false\ninflate_before_sleep = true", 2, "needs `balloon"),
        (inflating, "vcpus = 1\nballoon = false", 2, "needs `balloon = true`"),
        (Spec::default(), "vsock = true\nvmm = \"qemu\"", 1, "needs Cloud Hypervisor"),
        (connected, "\nvmm = \"qemu\"", 2, "needs Cloud Hypervisor"),
        (translated, "\n\nvsock = true", 3, "needs Cloud Hypervisor"),
        (Spec::default(), "\nwake_on = \"packet\"", 2, "needs a network; write `net = "),
        (Spec::default(), "wake_on = \"packet\"\nnet = \"none\"", 1, "needs a network"),
        (Spec::default(), "\nwake_ports = [\"x\"]", 2, "`wake_ports` `x` begins with neither"),
        (Spec::default(), "balloon = \"yes\"", 1, "`balloon` is true or false, not \"yes\""),
        (Spec::default(), "\nvsock = 1", 2, "`vsock` is true or false, not 1"),
    ] {
        let error = Spec::parse(text, &base, &|_, _| None).expect_err(text);
        assert!(error.message.contains(says), "{text:?}: {error}");
        assert_eq!(error.line, Some(line), "{text:?}: {error}");
    }
    let text = "vsock = true\nvmm = \"cloud-hypervisor\"\nballoon = false";
    let spec = parse(text).unwrap();
    assert!(spec.vsock && !spec.balloon);
}

#[test]
fn a_mode_that_does_not_fit_what_the_template_says_is_refused_too() {
    let base = Spec { memory_mode: MemoryMode::Shared, ..Spec::default() };
    let over = |text| Spec::parse(text, &base, &|_, _| None);
    let error = over("vmm = \"qemu\"").unwrap_err();
    assert_eq!(error.line, None);
    assert!(error.message.starts_with("`memory_mode`: qemu keeps"), "{error}");
    over("vmm = \"qemu\"\nmemory_mode = \"auto\"").unwrap();
    over("vmm = \"cloud-hypervisor\"\nrestore_mode = \"on-demand\"").unwrap();
}

#[test]
fn a_missing_file_is_named_with_its_line() {
    let text = "vcpus = 1\nkernel = \"/no/such\"";
    let missing = |_: &Path, _: FileRole| Some("no such file".to_owned());
    let error = Spec::parse(text, &Spec::default(), &missing).unwrap_err();
    assert_eq!(error.to_string(), "line 2: `kernel`: /no/such: no such file");
}

#[test]
fn the_first_lines_of_a_good_document_are_never_refused() {
    let text = "# a machine\nvmm = \"cloud-hypervisor\"\nrestore_mode = \"on-demand\"\n\
                memory_mode = \"shared\"\ncmdline = \"\"\"\nquiet \\\n  splash\"\"\"\n\
                kernel = '''\n/k'''\ninflate_before_sleep = true\nballoon = true\n\
                denied = [ # two\n  \"10.0.0.0/8\", # one\n\n  \"1.2.3.4\"\n]\n\
                wake_ports = [\n\"tcp/22\",\n]\nactivity = { # all\n  signals = [\n\"cpu\"\n]\n}\n\
                [[disks]]\nreadonly = true\npath = \"\"\"/d\"\"\"\n\n[[disks]]\n\
                # the second\n path = \"/e\"\n";
    let base = Spec { balloon: false, ..Spec::default() };
    assert_eq!(parse(text).map(|spec| spec.disks.len()), Ok(2));
    for (end, _) in text.match_indices('\n') {
        let lines = &text[..=end];
        let begun = Spec::parse_beginning(lines, &base, &|_, _| None);
        assert!(begun.is_ok(), "{lines}: {begun:?}");
    }
}

#[test]
fn first_lines_that_nothing_can_mend_are_refused() {
    for text in [
        "bogus = 1\n",
        "vcpus = \n",
        "vcpus\n",
        "vcpus = 1\nvcpus = 1\n",
        "memory = \"512Q\"\n",
        "cmdline = \"quiet\n",
        "[[disks]\n",
        "[[disks]]\nreadonly = true\n[[disks]]\n",
        "denied = [\"x\"]\n",
        "balloon = 1\n",
        "= 3\n",
    ] {
        let begun = Spec::parse_beginning(text, &Spec::default(), &|_, _| None);
        assert!(begun.is_err(), "{text}: {begun:?}");
        assert!(parse(text).is_err(), "{text}");
    }
}
