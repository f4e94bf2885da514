//! The composition root: starts the parts in order, and stops them in reverse.
//!
//! ```text
//! lock the store → index → clock → lifecycle → reconcile, 3 s → mount → reaper → ready
//! signal: no new operations → reaper ends → current operations end → unmount → index
//! ```
//!
//! The shutdown is bounded, step by step and as a whole: what does not end in time is left
//! behind. Guests outlive the daemon.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    sync::mpsc::{self, RecvTimeoutError},
    time::Duration,
};

use signal_hook::{
    consts::{SIGINT, SIGTERM},
    iterator::Signals,
};

use crate::{
    config::{self, Config, Verify},
    events,
    fuse::{self, Mounted, Unfit},
    index::{self, Index},
    lifecycle::{CLOCK_KEY, Contradicted, Lifecycle, Parts, Settings, chain, check_index_file},
    net::{self, LinuxNetwork},
    reaper::Reaper,
    sandbox::VmmChoice,
    sync::Arc,
    sys::{
        clock::{Clock, ClockBasis, Deadline, HostClock},
        files::{LockFile, Reserve, lock_file, lock_holder, make_private_dir},
        host::is_root,
        kvm,
        mount::{self, Device},
        opener::{self, Openers, Rights},
        pool::Pool,
        process::{Program, forbid_core_files, reserve_fixed_fds},
        thread::join_by,
    },
    tree::Tree,
    vmm::{Vmm, cloud_hypervisor::CloudHypervisor, qemu::Qemu},
};

/// How long a shutdown waits for current operations, such as the sleep of a large guest on a slow
/// disk. The next start finishes those that take longer.
const CLOSE_LIMIT: Duration = Duration::from_secs(60);
/// How long the mount waits for VMMs to be adopted. A healthy one answers within milliseconds.
const SETTLE_LIMIT: Duration = Duration::from_secs(3);
/// How long the shutdown may take. systemd kills the daemon after 90 s (`TimeoutStopSec`).
const END_LIMIT: Duration = Duration::from_secs(80);
const REAPER_END_LIMIT: Duration = Duration::from_secs(2);
/// How often the daemon checks whether the tree was unmounted or the index failed.
const SERVING_LOOK: Duration = Duration::from_secs(1);
/// Hidden subcommands, by which the daemon starts its helpers.
const ANNOUNCE: &str = "announce";
const OPEN: &str = "open";

/// Why the daemon did not start, or failed.
#[derive(Debug, thiserror::Error)]
#[allow(clippy::error_impl_error, reason = "it is written `daemon::Error` wherever it is used")]
pub enum Error {
    /// The user is not root.
    #[error("only root can mount the tree of sandboxes; run dozed as root")]
    NotRoot,
    /// There is no FUSE device.
    #[error(
        "there is no /dev/fuse, so the tree cannot be mounted; run `modprobe fuse`, or pass the \
         device to the container"
    )]
    NoFuse,
    /// Another daemon uses the same directory.
    #[error(
        "{} is in use by another dozed{}; each needs a `{key}` of its own",
        .dir.display(), .pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
    )]
    InUse {
        /// The configuration's key.
        key: &'static str,
        /// The directory.
        dir: PathBuf,
        /// The other daemon, if known.
        pid: Option<u32>,
    },
    /// To make a directory in a tree of sandboxes is to make a sandbox.
    #[error(
        "`{key}` = \"{}\" is in the tree of sandboxes {}; choose a directory that is in no tree",
        .dir.display(), .tree.display()
    )]
    InTree {
        /// The configuration's key.
        key: &'static str,
        /// The directory.
        dir: PathBuf,
        /// Where the tree is mounted, another daemon's or what a killed one left.
        tree: PathBuf,
    },
    /// Another file system is mounted on the mount point.
    #[error("{} has a {fs_type} file system mounted; choose another `mount`", .dir.display())]
    Mounted {
        /// The mount point.
        dir: PathBuf,
        /// Such as `tmpfs`.
        fs_type: String,
    },
    /// The mount point has files.
    #[error(
        "{} has files in it, which the tree would hide; choose another `mount`", .dir.display()
    )]
    NotEmpty {
        /// The mount point.
        dir: PathBuf,
    },
    /// A path that has to be a directory is not one.
    #[error("{} is not a directory; choose another `{key}`", .path.display())]
    NotADirectory {
        /// The configuration's key.
        key: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("{doing}")]
    Host {
        /// Such as `mounting /run/sandboxes`.
        doing: String,
        /// Its error.
        source: io::Error,
    },
    /// The index cannot be opened.
    #[error("opening the index {}", .path.display())]
    Index {
        /// Its file.
        path: PathBuf,
        /// What is wrong with it.
        source: index::Error,
    },
    /// The store has sandboxes that are missing in the index.
    #[error(transparent)]
    Contradicted(#[from] Contradicted),
    /// Another daemon on this host uses the same addresses.
    #[error("reserving the addresses of sandboxes")]
    Range(#[source] net::Error),
    /// Writing the index failed.
    #[error(
        "writing the index {} failed, so dozed exits; its next start continues with what is on the \
         disk, and guests keep running",
        .path.display()
    )]
    IndexFailed {
        /// Its file.
        path: PathBuf,
        /// The error.
        source: index::Error,
    },
    /// The tree was unmounted.
    #[error("{} was unmounted by somebody else; guests keep running", .dir.display())]
    Unmounted {
        /// The mount point.
        dir: PathBuf,
    },
}

fn host(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let doing = doing.into();
    move |source| Error::Host { doing, source }
}

/// Runs the daemon until SIGTERM or SIGINT.
///
/// # Errors
/// When it cannot start, the index fails, or the tree is unmounted.
pub fn run(config: Config) -> Result<(), Error> {
    if !is_root() {
        return Err(Error::NotRoot);
    }
    // Before the start changes anything on the host.
    if !Path::new("/dev/fuse").exists() {
        return Err(Error::NoFuse);
    }
    // A core file would contain memory of guests.
    forbid_core_files().map_err(host("disabling core files"))?;
    // Early, while these fd numbers are free.
    reserve_fixed_fds().map_err(host("reserving fd numbers for VMMs"))?;
    let signals = listen().map_err(host("handling signals"))?;
    check_directories(&config)?;
    let _locks = take_directories(&config)?;
    check_mount_point(&config.mount)?;

    // Opening the index writes to it.
    Reserve::new(&config.store).give_up_if_full();
    let index_path = config.store.join("index.db");
    check_index_file(&config.store, &index_path)?;
    let bad_index = |source| Error::Index { path: index_path.clone(), source };
    let index = Index::open(&index_path).map_err(bad_index)?;
    tell_malformed(&index, &config.store);
    let clock = start_clock(&index)?;
    let pool = Arc::new(Pool::new());
    let vmms = find_vmms(&config.vmm);
    let (trigger, triggers) = mpsc::channel();
    let listener = move |address, what| {
        // The receiver is gone only at the shutdown.
        trigger.send((address, what)).ok();
    };
    let network = LinuxNetwork::new(config.network.range, &config.runtime)
        .of_store(&config.store)
        .ignoring(config.network.ignore.clone())
        .on_trigger(Arc::new(listener));
    let parts = Parts {
        index,
        auto: auto(&vmms),
        vmms,
        network: Arc::new(network),
        clock: Arc::clone(&clock) as Arc<dyn Clock>,
        pool: Arc::clone(&pool),
        openers: Openers::new(own_program(OPEN))
            .map_err(host("starting the process that opens files"))?,
    };
    let lifecycle = Lifecycle::new(parts, settings(&config))
        .map_err(host(format!("opening the store {}", config.store.display())))?;
    lifecycle.check_index()?;
    lifecycle.wake_on_packets(triggers).map_err(host("starting to wake sandboxes on packets"))?;
    // Before `reconcile`, which removes links of this range that no sandbox has.
    lifecycle.networks().claim(&lifecycle.settings().template).map_err(Error::Range)?;
    let found = lifecycle.reconcile(SETTLE_LIMIT);
    lifecycle.records().keep_reserve();
    tracing::info!(
        sandboxes = lifecycle.index().len(),
        adopted = found.adopted,
        settled = found.settled,
        failed = found.failed,
        orphans = found.orphans,
        late = found.late,
        "reconciled"
    );

    let tree = Tree::new(Arc::clone(&lifecycle)).map_err(bad_index)?;
    let tree = Arc::new(tree.lacking(missing_privileges()));
    let announcing = Some(own_program(ANNOUNCE));
    let mounted = Mounted::mount(tree, &config.mount, Arc::clone(&pool), announcing)
        .map_err(host(format!("mounting {}", config.mount.display())))?;
    let reaper =
        Reaper::start(Arc::clone(&lifecycle), config.reaper.tick, config.reaper.concurrency)
            .map_err(host("starting the reaper"))?;
    lifecycle
        .attend_networks(config.reaper.tick)
        .map_err(host("starting the checks of networks"))?;
    tell_ready(&config);

    let serving = serve(&signals, lifecycle.index(), &mounted, &config.mount);
    end(move || shut_down(&lifecycle, reaper, mounted, clock.as_ref()));
    serving
}

/// Returns and logs the privileges that networks need and this daemon lacks.
fn missing_privileges() -> Vec<String> {
    let missing = net::missing_privileges();
    for what in &missing {
        tracing::warn!("sandboxes get no network: the daemon lacks {what}");
    }
    missing
}

/// Returns a channel with the first SIGTERM or SIGINT. The second one ends the process at
/// once; the next start finishes interrupted operations.
fn listen() -> io::Result<mpsc::Receiver<i32>> {
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    let (tell, told) = mpsc::channel();
    std::thread::Builder::new().name("dozed-signal".to_owned()).spawn(move || {
        for (count, signal) in signals.forever().enumerate() {
            if count == 0 && tell.send(signal).is_ok() {
                continue;
            }
            tracing::warn!("exiting at once on a second signal");
            drop(signal_hook::low_level::emulate_default_handler(signal));
        }
    })?;
    Ok(told)
}

/// Refuses directories in a tree of sandboxes, before any is made.
fn check_directories(config: &Config) -> Result<(), Error> {
    for (key, dir) in
        [("store", &config.store), ("runtime", &config.runtime), ("mount", &config.mount)]
    {
        // `check_mount_point` looks at what is mounted on `mount` itself.
        let looked_at = if key == "mount" { dir.parent().unwrap_or(dir) } else { dir };
        let found = mount::tree_that_has(looked_at)
            .map_err(host(format!("resolving {}", dir.display())))?;
        if let Some(tree) = found {
            return Err(Error::InTree { key, dir: dir.clone(), tree });
        }
    }
    Ok(())
}

/// Creates and locks the directories of this daemon.
fn take_directories(config: &Config) -> Result<Vec<LockFile>, Error> {
    let mut locks = Vec::new();
    for (key, dir) in [("store", &config.store), ("runtime", &config.runtime)] {
        make_private_dir(dir).map_err(|source| unusable(key, dir, source))?;
        let path = dir.join("lock");
        match lock_file(&path).map_err(host(format!("locking {}", path.display())))? {
            Some(lock) => locks.push(lock),
            None => {
                let pid = lock_holder(&path);
                return Err(Error::InUse { key, dir: dir.clone(), pid });
            }
        }
    }
    Ok(locks)
}

fn unusable(key: &'static str, dir: &Path, source: io::Error) -> Error {
    if matches!(source.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory) {
        return Error::NotADirectory { key, path: dir.to_owned() };
    }
    Error::Host { doing: format!("creating {}, the `{key}`", dir.display()), source }
}

fn check_mount_point(dir: &Path) -> Result<(), Error> {
    fuse::check_mount_point(dir).map_err(|unfit| match unfit {
        Unfit::InUse => Error::InUse { key: "mount", dir: dir.to_owned(), pid: None },
        Unfit::Mounted(fs_type) => Error::Mounted { dir: dir.to_owned(), fs_type },
        Unfit::HasFiles => Error::NotEmpty { dir: dir.to_owned() },
        Unfit::Io(source) => unusable("mount", dir, source),
    })
}

/// Returns this program, even if its file was replaced, with a subcommand.
fn own_program(subcommand: &str) -> Program {
    Program { path: "/proc/self/exe".into(), args: vec![subcommand.into()] }
}

/// Runs the helper that opens files for the daemon.
///
/// # Errors
/// When a daemon did not start it.
pub fn open(rights: &Rights) -> io::Result<()> {
    opener::serve(rights)
}

/// Runs the helper that triggers inotify events.
///
/// # Errors
/// When a daemon did not start it.
pub fn announce(mount: PathBuf, device: Device) -> io::Result<()> {
    events::announce(mount, device)
}

/// Logs the rows of the index that cannot be decoded. Their files and VMMs are left alone.
fn tell_malformed(index: &Index, store: &Path) {
    for row in index.malformed() {
        let id = row.id.as_ref().map(|id| format!(" ({id})")).unwrap_or_default();
        let (number, path) = (row.row, index.path().display());
        let dir = store.join("sandboxes").join(number.to_string());
        tracing::error!(
            "row {number}{id} of the index {path} cannot be decoded and is skipped: {}; its VMM \
             and its files in {} are kept; repair the row and restart dozed",
            row.why,
            dir.display()
        );
    }
}

/// Continues the time line that is stored in the index.
fn start_clock(index: &Index) -> Result<Arc<HostClock>, Error> {
    let stored = index.meta(CLOCK_KEY).ok().flatten();
    let stored = stored.and_then(|text| ClockBasis::from_text(&text));
    let clock = HostClock::start(stored.as_ref()).map_err(host("reading the clocks"))?;
    keep_clock(index, &clock);
    Ok(Arc::new(clock))
}

fn keep_clock(index: &Index, clock: &HostClock) {
    if let Err(error) = index.set_meta(CLOCK_KEY, &clock.basis().to_text()) {
        tracing::warn!(error = chain(&error), "storing the basis of the clock");
    }
}

/// Returns the VMMs of this host. Without any, sandboxes can be read and deleted.
fn find_vmms(config: &config::Vmm) -> Vec<Arc<dyn Vmm>> {
    let mut vmms: Vec<Arc<dyn Vmm>> = Vec::new();
    let cloud = config.cloud_hypervisor.clone();
    match cloud.map_or_else(CloudHypervisor::find, CloudHypervisor::at) {
        Ok(cloud) => {
            if let Some(lack) = cloud.why_no_users().filter(|_| config.users.is_some()) {
                tracing::warn!("cloud-hypervisor: {lack}");
            }
            vmms.push(Arc::new(cloud));
        }
        Err(error) => tracing::info!(error = chain(&error), "Cloud Hypervisor is not available"),
    }
    match config.qemu.clone().map_or_else(Qemu::find, Qemu::at) {
        Ok(qemu) => vmms.push(Arc::new(qemu)),
        Err(error) => tracing::info!(error = chain(&error), "QEMU is not available"),
    }
    if vmms.is_empty() {
        tracing::warn!("no sandbox can run without a VMM; see `dozed doctor`");
    }
    for vmm in &vmms {
        let version = vmm.identity().map(|is| is.version.clone()).unwrap_or_default();
        for lack in vmm.lacks(&version) {
            tracing::warn!("{}: {lack}", vmm.name());
        }
    }
    vmms
}

/// Returns the VMM that `auto` selects: Cloud Hypervisor where it can run guests, which needs
/// hardware virtualisation.
fn auto(vmms: &[Arc<dyn Vmm>]) -> VmmChoice {
    let has_cloud = vmms.iter().any(|vmm| vmm.choice() == VmmChoice::CloudHypervisor);
    if has_cloud && kvm::usable().is_ok() { VmmChoice::CloudHypervisor } else { VmmChoice::Qemu }
}

fn settings(config: &Config) -> Settings {
    Settings {
        store: config.store.clone(),
        runtime: config.runtime.clone(),
        template: Arc::new(config.template.clone()),
        idle_after: config.defaults.idle_after,
        delete_after: config.defaults.delete_after,
        sandboxes_max: config.limits.sandboxes,
        wakes_max: config.limits.wakes,
        sleeps_max: config.limits.sleeps,
        holds_max: config.limits.holds,
        memory_budget_bytes: config.limits.memory_bytes,
        activity: config.activity,
        users: config.vmm.users,
        addresses: config.network.range,
        linger: config.network.linger,
        verify_memory: config.snapshot.verify == Verify::Full,
    }
}

/// Reports on standard error and to systemd that the tree is served.
fn tell_ready(config: &Config) {
    let line = format!("serving {}", config.mount.display());
    writeln!(io::stderr(), "dozed: {line}").ok();
    tracing::info!(store = %config.store.display(), "{line}");
    let states = [sd_notify::NotifyState::Ready, sd_notify::NotifyState::Status(&line)];
    if let Err(error) = sd_notify::notify(&states) {
        tracing::warn!(%error, "notifying systemd");
    }
}

/// Waits for a signal, a failure of the index, or an unmount.
fn serve(
    signals: &mpsc::Receiver<i32>,
    index: &Index,
    mounted: &Mounted,
    dir: &Path,
) -> Result<(), Error> {
    loop {
        let signal = signals.recv_timeout(SERVING_LOOK);
        if let Err(source) = index.check() {
            return Err(Error::IndexFailed { path: index.path().to_owned(), source });
        }
        match signal {
            Ok(signal) => {
                tracing::info!(signal, "shutting down");
                return Ok(());
            }
            Err(RecvTimeoutError::Timeout) if mounted.is_serving() => {}
            Err(_) => {
                return Err(Error::Unmounted { dir: dir.to_owned() });
            }
        }
    }
}

/// Runs the shutdown, for at most [`END_LIMIT`].
fn end(shut_down: impl FnOnce() + Send + 'static) {
    match std::thread::Builder::new().name("dozed-end".to_owned()).spawn(shut_down) {
        Ok(ending) => drop(join_by(ending, &Deadline::after(END_LIMIT), "the shutdown")),
        Err(error) => {
            tracing::error!(%error, "exiting without a shutdown; the next start finishes its work");
        }
    }
}

fn shut_down(lifecycle: &Lifecycle, reaper: Reaper, mounted: Mounted, clock: &HostClock) {
    drop(sd_notify::notify(&[sd_notify::NotifyState::Stopping]));
    let left = lifecycle.close(CLOSE_LIMIT);
    if left > 0 {
        tracing::warn!(left, "operations are still running; the next start finishes them");
    }
    reaper.stop(REAPER_END_LIMIT);
    if let Err(error) = mounted.unmount() {
        tracing::error!(%error, "unmounting");
    }
    lifecycle.networks().retire();
    if lifecycle.index().check().is_err() {
        return; // `serve` reports it.
    }
    keep_clock(lifecycle.index(), clock);
    if let Err(error) = lifecycle.activity().flush() {
        tracing::error!(error = chain(&error), "writing activity to the index");
    }
    if let Err(error) = lifecycle.index().close() {
        tracing::error!(error = chain(&error), "closing the index");
    }
    tracing::info!("done");
}
