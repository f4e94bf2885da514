//! A snapshot as Cloud Hypervisor wants to see it.
//!
//! It reads three files of fixed names from one directory, and one of them says which disks
//! to open. The snapshot itself must stay as it is until it is consumed, so the directory
//! is made anew for each wake, of links and one small file, on the tmpfs of the sockets.

use std::{
    fs::OpenOptions,
    io::{self, Write},
    os::unix::fs::{OpenOptionsExt, symlink},
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{
    body::adapt,
    confinement,
    saved::{CONFIG_FILE, MEMORY_FILE, SMALL_FILE_MAX_BYTES, STATE_FILE},
    told,
};
use crate::{
    sys::files::{let_pass, let_read, make_private_dir, read_regular, remove_tree},
    vmm::{Error, Plan, peer::host},
};

const VIEW: &str = "snapshot";

/// Returns where the view of a sandbox's snapshot is, while it is loaded.
fn path(plan: &Plan) -> PathBuf {
    plan.runtime_dir.join(VIEW)
}

/// Makes the view of the snapshot in `dir`, with the disks of today and the memory in
/// `memory_file`, if it is in one, for the user `uid`. Returns its name for the VMM.
pub(super) fn make(
    plan: &Plan,
    dir: &Path,
    memory_file: Option<&Path>,
    uid: u32,
) -> Result<PathBuf, Error> {
    let config = adapted(plan, dir, memory_file)?;
    let view = path(plan);
    let made = || -> io::Result<()> {
        remove_tree(&view)?;
        make_private_dir(&view)?;
        let_pass(&view, uid)?;
        let path = view.join(CONFIG_FILE);
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        file.write_all(config.to_string().as_bytes())?;
        let_read(&path, uid)?;
        // What it inherits of the snapshot.
        symlink(told::path(told::STATE), view.join(STATE_FILE))?;
        if memory_file.is_some() {
            return Ok(());
        }
        symlink(told::path(told::MEMORY), view.join(MEMORY_FILE))
    };
    made().map_err(host(format!("making {}", view.display())))?;
    Ok(told::path(told::RUNTIME).join(VIEW))
}

/// Removes the view. The snapshot stays.
pub(super) fn remove(plan: &Plan) -> Result<(), Error> {
    let view = path(plan);
    remove_tree(&view).map_err(host(format!("removing {}", view.display())))
}

fn adapted(plan: &Plan, dir: &Path, memory_file: Option<&Path>) -> Result<Value, Error> {
    let path = dir.join(CONFIG_FILE);
    let text = read_regular(&path, SMALL_FILE_MAX_BYTES)
        .map_err(host(format!("reading {}", path.display())))?;
    let mut config: Value = serde_json::from_slice(&text)
        .map_err(|error| host(format!("reading {}", path.display()))(error.into()))?;
    adapt(&mut config, plan, memory_file, confinement::rules().as_deref())
        .map_err(|said| Error::Refused { command: "vm.restore".to_owned(), said })?;
    Ok(config)
}
