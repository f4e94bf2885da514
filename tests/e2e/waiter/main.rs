//! Waits until a sandbox sleeps.

use std::{error::Error, fs, path::Path, sync::mpsc};

use notify::{RecursiveMode, Watcher};

fn main() -> Result<(), Box<dyn Error>> {
    let state = Path::new("web-1/state");
    let (tell, changes) = mpsc::channel();
    let mut watcher = notify::recommended_watcher(tell)?;
    watcher.watch(state, RecursiveMode::NonRecursive)?;
    while fs::read_to_string(state)? != "snapshotted\n" {
        changes.recv()??;
    }
    Ok(())
}
