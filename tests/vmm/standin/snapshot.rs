//! A snapshot: `config.json`, `state.json` and `memory-ranges`, written in this order into
//! a directory that has none of them, and not synced.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use rustix::fs::{CWD, FileType, Mode, mknodat};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    config::VmConfig,
    failure::{Failure, Within},
    guest::Registers,
    knobs::{Leave, Thing},
    memory::{Memory, copy_dense, copy_sparse},
};

pub(crate) const CONFIG: &str = "config.json";
pub(crate) const STATE: &str = "state.json";
pub(crate) const MEMORY: &str = "memory-ranges";

/// What of memory is in a snapshot's file, in its order.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Range {
    pub(crate) gpa: u64,
    pub(crate) length: u64,
}

/// Returns the directory that a URL names.
pub(crate) fn directory(url: &str) -> Result<PathBuf, Failure> {
    let path = url.strip_prefix("file://").map(PathBuf::from);
    let path = path.ok_or_else(|| Failure::new(&format!("Could not extract path from URL: {url}")));
    path.and_then(|path| {
        let said = format!("Destination is not a directory: {path:?}");
        if path.is_dir() { Ok(path) } else { Err(Failure::new(&said)) }
    })
    .within("Failed to send migratable component snapshot")
}

/// Returns what of memory has to be written.
pub(crate) fn ranges(memory: &Memory) -> Result<Vec<Range>, Failure> {
    let mut ranges = Vec::new();
    for region in &memory.regions {
        if !region.is_persistent()? {
            ranges.push(Range { gpa: region.start, length: region.bytes });
        }
    }
    Ok(ranges)
}

/// Writes all three files.
pub(crate) fn write(
    dir: &Path,
    config: &VmConfig,
    registers: &Registers,
    memory: &Memory,
    sparse: bool,
) -> Result<(), Failure> {
    let text = |value: &Value| value.to_string();
    let ranges = ranges(memory)?;
    let config = serde_json::to_string(config).expect("it is JSON");
    write_once(&dir.join(CONFIG), &config, "config")?;
    let cpu = json!({ "Kvm": { "msrs": registers.msrs(), "regs": registers } });
    let memory_state = json!({ "memory_ranges": { "data": ranges } });
    let part =
        |state: &Value| json!({ "snapshot_data": { "state": text(state) }, "snapshots": {} });
    let state = json!({
        "snapshot_data": { "state": text(&json!({ "clock": null })) },
        "snapshots": {
            "cpu-manager": { "snapshots": { "0": part(&cpu) } },
            "memory-manager": part(&memory_state),
        },
    });
    write_once(&dir.join(STATE), &text(&state), "state")?;
    if ranges.is_empty() {
        return Ok(());
    }
    write_memory(&dir.join(MEMORY), memory, &ranges, sparse)
        .within("Failed to send migratable component snapshot")
}

/// Puts something else in place of a file of a snapshot, which the request asked for.
pub(crate) fn leave(body: &[u8], leave: &Leave) -> io::Result<()> {
    let request: Value = serde_json::from_slice(body)?;
    let url = request["destination_url"].as_str().unwrap_or_default();
    let dir = Path::new(url.trim_start_matches("file://"));
    let path = dir.join(&leave.name);
    fs::remove_file(&path).ok();
    match leave.what {
        Thing::Symlink => symlink(&leave.to, path),
        Thing::Fifo => Ok(mknodat(CWD, path, FileType::Fifo, Mode::RUSR, 0)?),
        Thing::HardLink => {
            let other = if leave.name == STATE { CONFIG } else { STATE };
            fs::hard_link(dir.join(other), path)
        }
    }
}

fn write_once(path: &Path, text: &str, what: &str) -> Result<(), Failure> {
    create(path)
        .within(&format!("Error creating VM {what} snapshot file"))
        .and_then(|mut file| {
            // One write, whose count nobody looks at: so is the real one.
            file.write(text.as_bytes()).within(&format!("Error writing VM {what} snapshot"))
        })
        .within("Failed to send migratable component snapshot")?;
    Ok(())
}

fn create(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).open(path)
}

fn write_memory(
    path: &Path,
    memory: &Memory,
    ranges: &[Range],
    sparse: bool,
) -> Result<(), Failure> {
    let file = create(path).within(&format!("Error creating memory snapshot file {path:?}"))?;
    if sparse {
        file.set_len(ranges.iter().map(|range| range.length).sum())?;
    }
    let mut at = 0;
    for range in ranges {
        let region = memory.regions.iter().find(|region| region.start == range.gpa);
        let region = region.expect("the ranges are those of the regions");
        if sparse && region.shared {
            copy_sparse(&region.file, 0, &file, at, range.length)
                .within("Error writing sparse memory snapshot region")?;
        } else {
            copy_dense(&region.file, 0, &file, at, range.length)
                .within("Error writing dense memory snapshot region")?;
        }
        at += range.length;
    }
    Ok(())
}
