//! Where tests have their files, the stand-in for Cloud Hypervisor, and how to wait.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

use dozed::sys::{
    clock::{self, Deadline},
    command,
};
use serde_json::{Value, json};
use tempfile::TempDir;

/// No wait of these tests is as long on any machine.
pub(crate) const SOON: Duration = Duration::from_secs(180);

/// Waits for `found`, which looks at the world again each time.
pub(crate) fn eventually<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let deadline = Deadline::after(SOON);
    loop {
        if let Some(it) = found() {
            return it;
        }
        assert!(!deadline.passed(), "{what} does not come");
        clock::pause_for(Duration::from_millis(5));
    }
}

/// Makes a directory that users without privileges may enter.
pub(crate) fn open_dir(prefix: &str) -> TempDir {
    let dir = tempfile::Builder::new().prefix(prefix).tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

/// The stand-in, with knobs of its own.
#[derive(Debug, Clone)]
pub(crate) struct Standin {
    dir: Arc<TempDir>,
    version: String,
}

impl Standin {
    /// Puts the stand-in where a test can tell it that it is of `version`.
    pub(crate) fn new(version: &str) -> Self {
        let built = built_standin();
        let dir = open_dir("standin");
        let program = dir.path().join("cloud-hypervisor");
        if fs::hard_link(built, &program).is_err() {
            fs::copy(built, &program).unwrap();
        }
        let standin = Self { dir: Arc::new(dir), version: version.to_owned() };
        let calls = standin.dir.path().join("standin.calls");
        fs::write(&calls, "").unwrap();
        fs::set_permissions(&calls, fs::Permissions::from_mode(0o666)).unwrap();
        standin.set_faults(&json!([]));
        standin
    }

    /// Returns the path of the program.
    pub(crate) fn program(&self) -> PathBuf {
        self.dir.path().join("cloud-hypervisor")
    }

    /// Says what goes wrong from now on, as `standin/knobs.rs` has it.
    pub(crate) fn set_faults(&self, faults: &Value) {
        self.set_knobs(&json!({ "version": self.version, "faults": faults }));
    }

    /// Says all there is to say.
    pub(crate) fn set_knobs(&self, knobs: &Value) {
        // At once, as it may be reading them.
        let (whole, part) = (self.dir.path().join("standin.json"), self.dir.path().join("part"));
        fs::write(&part, knobs.to_string()).unwrap();
        rustix::fs::rename(&part, &whole).unwrap();
    }

    /// Returns what it was asked: the method, the endpoint and the body.
    pub(crate) fn calls(&self) -> Vec<String> {
        let text = fs::read_to_string(self.dir.path().join("standin.calls")).unwrap();
        text.lines().map(|line| line.split_once(' ').unwrap().1.to_owned()).collect()
    }
}

/// Returns the program that stands in, as the sources are now. `cargo test` alone builds
/// it; `cargo test --test vmm` does not, and would hold the driver against an old one.
fn built_standin() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        // The test's own program is target/debug/deps/vmm-…
        let own = std::env::current_exe().unwrap();
        let profile = own.ancestors().nth(2).unwrap();
        let target = profile.parent().unwrap().to_str().unwrap();
        let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
        let mut args = vec!["build", "--quiet", "--offline", "--example", "cloud-hypervisor"];
        args.extend(["--manifest-path", manifest, "--target-dir", target]);
        if profile.ends_with("release") {
            args.push("--release");
        }
        let output = command::output(Path::new(env!("CARGO")), &args, 5 * SOON).unwrap();
        assert!(output.status.success(), "the stand-in cannot be built: cargo {}", args.join(" "));
        profile.join("examples/cloud-hypervisor")
    })
}

/// Returns the guest that counts, which is built once.
pub(crate) fn counter_guest() -> PathBuf {
    static GUEST: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, guest) = GUEST.get_or_init(|| {
        let dir = open_dir("guest");
        let guest = dir.path().join("counter, .elf");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/counter-guest");
        let args = [script.to_str().unwrap(), guest.to_str().unwrap()];
        let output = command::output(Path::new("/bin/bash"), &args, 5 * SOON).unwrap();
        assert!(output.status.success(), "{}: {}", script.display(), output.stdout);
        (dir, guest)
    });
    guest.clone()
}
