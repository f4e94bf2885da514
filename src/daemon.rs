//! The composition root: what is opened in which order, and closed in reverse.
//!
//! ```text
//! lock the store → index → clock → lifecycle → reconcile, 3 s → mount → reaper → ready
//! signal: no new operations → reaper ends → those under way end → unmount → index
//! ```
//!
//! Each step of the end is bounded, and so is all of it together: whatever does not end is
//! left behind, and the process ends.
//!
//! Guests are not touched by any of it: they outlive the daemon.

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
    net::{self, RealNetwork},
    reaper::Reaper,
    sandbox::VmmChoice,
    sync::Arc,
    sys::{
        clock::{Clock, ClockBasis, Deadline, HostClock},
        files::{LockFile, Reserve, lock_file, lock_holder, make_private_dir},
        host::is_root,
        kvm,
        mount::Device,
        opener::{self, Openers, Rights},
        pool::Pool,
        process::{Program, forbid_core_files, reserve_places},
        thread::join_by,
    },
    tree::Tree,
    vmm::{Vmm, cloud_hypervisor::CloudHypervisor, qemu::Qemu},
};

/// How long operations that are under way at the end may still take. A sleep of a large
/// guest on a slow disk takes a while; what is cut off is finished at the next start.
const CLOSE_LIMIT: Duration = Duration::from_secs(60);
/// How long the tree is not served because VMMs have yet to be taken over. One that runs answers
/// in some milliseconds, also on a busy host in less than this.
const SETTLE_LIMIT: Duration = Duration::from_secs(3);
/// How long the whole end may take. systemd kills us after 90 s (`TimeoutStopSec` of our unit).
const END_LIMIT: Duration = Duration::from_secs(80);
/// How long the reaper may take to end. What it has begun has had [`CLOSE_LIMIT`] by then.
const REAPER_END_LIMIT: Duration = Duration::from_secs(2);
/// How often we look whether somebody has unmounted the tree, or the index has failed.
const SERVING_LOOK: Duration = Duration::from_secs(1);
/// The subcommand by which we start ourselves as the announcer.
const ANNOUNCE: &str = "announce";

/// The subcommand by which we start ourselves to open files.
const OPEN: &str = "open";

/// Why the daemon did not run, or did not end well.
#[derive(Debug, thiserror::Error)]
#[allow(clippy::error_impl_error, reason = "it is written `daemon::Error` wherever it is used")]
pub enum Error {
    /// Only root mounts, and sees every sandbox's processes.
    #[error("only root can mount the tree of sandboxes; run dozed as root")]
    NotRoot,
    /// The kernel's FUSE module, or its device in this container, is missing.
    #[error(
        "there is no /dev/fuse, so the tree cannot be mounted; run `modprobe fuse`, or pass the \
         device to the container"
    )]
    NoFuse,
    /// Another daemon has the same directory.
    #[error(
        "{} is in use by another dozed{}; each needs a `{key}` of its own",
        .dir.display(), .pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
    )]
    InUse {
        /// The configuration's key.
        key: &'static str,
        /// The directory.
        dir: PathBuf,
        /// The other daemon, where it says.
        pid: Option<u32>,
    },
    /// Something else is mounted where the tree is to be.
    #[error("{} has a {fs_type} file system mounted; choose another `mount`", .dir.display())]
    Mounted {
        /// The mount point.
        dir: PathBuf,
        /// Such as `tmpfs`.
        fs_type: String,
    },
    /// The mount point has files, which the tree would hide.
    #[error(
        "{} has files in it, which the tree would hide; choose another `mount`", .dir.display()
    )]
    NotEmpty {
        /// The mount point.
        dir: PathBuf,
    },
    /// The host did not let us.
    #[error("{doing}")]
    Host {
        /// Such as `mounting /run/sandboxes`.
        doing: String,
        /// What the system said.
        source: io::Error,
    },
    /// The index cannot be used.
    #[error("opening the index {}", .path.display())]
    Index {
        /// Where it is.
        path: PathBuf,
        /// What is wrong with it.
        source: index::Error,
    },
    /// The store shows more than the index knows.
    #[error(transparent)]
    Contradicted(#[from] Contradicted),
    /// Another daemon on this host has the addresses that this one's sandboxes have.
    #[error("taking the addresses of sandboxes")]
    Range(#[source] net::Error),
    /// The disk did not take what was written to the index.
    #[error(
        "the index {} cannot be written any more, so dozed ends: its next start goes on from what \
         is on the disk; the guests run on",
        .path.display()
    )]
    IndexFailed {
        /// Where it is.
        path: PathBuf,
        /// What the disk said.
        source: index::Error,
    },
    /// Somebody took the tree away.
    #[error("{} was unmounted by somebody else; the guests run on", .dir.display())]
    Unmounted {
        /// The mount point.
        dir: PathBuf,
    },
}

fn host(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let doing = doing.into();
    move |source| Error::Host { doing, source }
}

/// Runs the daemon until it is told to stop by SIGTERM or SIGINT.
///
/// # Errors
/// Where it cannot start, or the tree was unmounted under it.
pub fn run(config: Config) -> Result<(), Error> {
    if !is_root() {
        return Err(Error::NotRoot);
    }
    // Before the start changes anything on the host.
    if !Path::new("/dev/fuse").exists() {
        return Err(Error::NoFuse);
    }
    // Memory of guests passes through us too.
    forbid_core_files().map_err(host("forbidding core files"))?;
    // Before much is open, as what is open may have these numbers.
    reserve_places().map_err(host("reserving numbers for the files of VMMs"))?;
    // From here on a signal is an orderly end, however early it comes.
    let signals = listen().map_err(host("listening for signals"))?;
    let _locks = take_directories(&config)?;
    check_mount_point(&config.mount)?;

    // To open the index is to write to it.
    Reserve::new(&config.store).give_up_if_full();
    let index_path = config.store.join("index.db");
    check_index_file(&config.store, &index_path)?;
    let bad_index = |source| Error::Index { path: index_path.clone(), source };
    let index = Index::open(&index_path).map_err(bad_index)?;
    tell_malformed(&index, &config.store);
    let clock = start_clock(&index)?;
    let pool = Arc::new(Pool::new());
    let vmms = find_vmms(&config.vmm);
    let (ring, rings) = mpsc::channel();
    let listener = move |address, what| {
        // With nobody left to hear it, the daemon is ending.
        ring.send((address, what)).ok();
    };
    let network = RealNetwork::new(config.network.range, &config.runtime)
        .of_store(&config.store)
        .ignoring(config.network.ignore.clone())
        .ringing(Arc::new(listener));
    let parts = Parts {
        index,
        auto: auto(&vmms),
        vmms,
        network: Arc::new(network),
        clock: Arc::clone(&clock) as Arc<dyn Clock>,
        pool: Arc::clone(&pool),
        openers: Openers::new(own_program(OPEN)).map_err(host("preparing to open files"))?,
    };
    let lifecycle = Lifecycle::new(parts, settings(&config))
        .map_err(host(format!("opening the store {}", config.store.display())))?;
    lifecycle.check_index()?;
    lifecycle.attend_rings(rings).map_err(host("hearing of packets"))?;
    // Before anything is taken for what a crash left.
    lifecycle.claim_addresses().map_err(Error::Range)?;
    let found = lifecycle.reconcile(SETTLE_LIMIT);
    lifecycle.keep_reserve();
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
        .map_err(host("starting to look over networks"))?;
    tell_ready(&config);

    let serving = serve(&signals, lifecycle.index(), &mounted, &config.mount);
    end(move || shut_down(&lifecycle, reaper, mounted, clock.as_ref()));
    serving
}

/// Returns what this daemon is forbidden, and says so in the log.
fn missing_privileges() -> Vec<String> {
    let missing = net::missing_privileges();
    for what in &missing {
        tracing::warn!("sandboxes get no network, as the daemon may not use {what}");
    }
    missing
}

/// Has SIGTERM and SIGINT told. The second one ends the daemon at once: the next
/// start finishes what was cut off.
fn listen() -> io::Result<mpsc::Receiver<i32>> {
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    let (tell, told) = mpsc::channel();
    std::thread::Builder::new().name("dozed-signal".to_owned()).spawn(move || {
        for (count, signal) in signals.forever().enumerate() {
            if count == 0 && tell.send(signal).is_ok() {
                continue;
            }
            tracing::warn!("a second signal: ending at once");
            // The default action of either signal is what was asked for.
            drop(signal_hook::low_level::emulate_default_handler(signal));
        }
    })?;
    Ok(told)
}

/// Makes the directories of this daemon and takes them for itself.
fn take_directories(config: &Config) -> Result<Vec<LockFile>, Error> {
    let mut locks = Vec::new();
    for (key, dir) in [("store", &config.store), ("runtime", &config.runtime)] {
        make_private_dir(dir).map_err(host(format!("making {}", dir.display())))?;
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

/// Looks whether the tree can be mounted.
fn check_mount_point(dir: &Path) -> Result<(), Error> {
    fuse::check_mount_point(dir).map_err(|unfit| match unfit {
        Unfit::InUse => Error::InUse { key: "mount", dir: dir.to_owned(), pid: None },
        Unfit::Mounted(fs_type) => Error::Mounted { dir: dir.to_owned(), fs_type },
        Unfit::HasFiles => Error::NotEmpty { dir: dir.to_owned() },
        Unfit::Io(source) => {
            Error::Host { doing: format!("looking at the mount point {}", dir.display()), source }
        }
    })
}

/// Returns the program that we are, also after another was put in its place, and what has it
/// do one thing only.
fn own_program(subcommand: &str) -> Program {
    Program { path: "/proc/self/exe".into(), args: vec![subcommand.into()] }
}

/// Runs a process that opens files for its daemon, until that needs no more.
///
/// # Errors
/// Where it was not started by a daemon.
pub fn open(rights: &Rights) -> io::Result<()> {
    opener::serve(rights)
}

/// Runs the process that tells inotify of changes, until its daemon is gone.
///
/// # Errors
/// Where it was not started by a daemon, or that does not know it.
pub fn announce(mount: PathBuf, device: Device) -> io::Result<()> {
    events::announce(mount, device)
}

/// Tells of the rows of the index that make no sense. Their files and VMMs are left alone.
fn tell_malformed(index: &Index, store: &Path) {
    for row in index.malformed() {
        let id = row.id.as_ref().map(|id| format!(" ({id})")).unwrap_or_default();
        let (number, path) = (row.row, index.path().display());
        let dir = store.join("sandboxes").join(number.to_string());
        tracing::error!(
            "row {number}{id} of the index {path} makes no sense and is left out: {}; its VMM and \
             its files in {} stay as they are; mend the row and start dozed anew",
            row.why,
            dir.display()
        );
    }
}

/// Goes on with the time line of the index.
fn start_clock(index: &Index) -> Result<Arc<HostClock>, Error> {
    let stored = index.meta(CLOCK_KEY).ok().flatten();
    let stored = stored.and_then(|text| ClockBasis::from_text(&text));
    let clock = HostClock::start(stored.as_ref()).map_err(host("reading the clocks"))?;
    keep_clock(index, &clock);
    Ok(Arc::new(clock))
}

fn keep_clock(index: &Index, clock: &HostClock) {
    if let Err(error) = index.set_meta(CLOCK_KEY, &clock.basis().to_text()) {
        tracing::warn!(error = chain(&error), "keeping the basis of the clock");
    }
}

/// Returns the VMMs of this host. Without any, sandboxes can be looked at and deleted.
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
        Err(error) => tracing::info!(error = chain(&error), "doing without cloud-hypervisor"),
    }
    match config.qemu.clone().map_or_else(Qemu::find, Qemu::at) {
        Ok(qemu) => vmms.push(Arc::new(qemu)),
        Err(error) => tracing::info!(error = chain(&error), "doing without QEMU"),
    }
    if vmms.is_empty() {
        tracing::warn!("no sandbox can run; see `dozed doctor`");
    }
    for vmm in &vmms {
        let version = vmm.identity().map(|is| is.version.clone()).unwrap_or_default();
        for lack in vmm.lacks(&version) {
            tracing::warn!("{}: {lack}", vmm.name());
        }
    }
    vmms
}

/// Returns the one that `auto` means: Cloud Hypervisor where that runs guests. It cannot
/// without hardware virtualisation; QEMU can.
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

/// Says on standard error, and to systemd where it waits for it, that the tree is there.
fn tell_ready(config: &Config) {
    let line = format!("serving {}", config.mount.display());
    // Where standard error is closed nobody reads it.
    writeln!(io::stderr(), "dozed: {line}").ok();
    tracing::info!(store = %config.store.display(), "{line}");
    let states = [sd_notify::NotifyState::Ready, sd_notify::NotifyState::Status(&line)];
    if let Err(error) = sd_notify::notify(&states) {
        tracing::warn!(%error, "telling systemd that we are ready");
    }
}

/// Waits for a signal, or until there is no point in going on.
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

/// Runs the end of the daemon, for at most [`END_LIMIT`]. What has not ended by then ends with
/// the process.
fn end(shut_down: impl FnOnce() + Send + 'static) {
    match std::thread::Builder::new().name("dozed-end".to_owned()).spawn(shut_down) {
        Ok(ending) => drop(join_by(ending, &Deadline::after(END_LIMIT), "the end of the daemon")),
        Err(error) => tracing::error!(%error, "ending without order; the next start finishes it"),
    }
}

fn shut_down(lifecycle: &Lifecycle, reaper: Reaper, mounted: Mounted, clock: &HostClock) {
    drop(sd_notify::notify(&[sd_notify::NotifyState::Stopping]));
    let left = lifecycle.close(CLOSE_LIMIT);
    if left > 0 {
        tracing::warn!(left, "operations are still under way; the next start finishes them");
    }
    reaper.stop(REAPER_END_LIMIT);
    if let Err(error) = mounted.unmount() {
        tracing::error!(%error, "unmounting");
    }
    lifecycle.retire_networks();
    if lifecycle.index().check().is_err() {
        return; // It is told, and nothing can be written any more.
    }
    keep_clock(lifecycle.index(), clock);
    if let Err(error) = lifecycle.flush_activity() {
        tracing::error!(error = chain(&error), "writing activity to the index");
    }
    if let Err(error) = lifecycle.index().close() {
        tracing::error!(error = chain(&error), "closing the index");
    }
    tracing::info!("done");
}
