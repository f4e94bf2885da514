//! Reading a snapshot back.

use std::{
    fs::{self, File},
    path::Path,
};

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{
    config::{MemoryConfig, VmConfig},
    failure::{Failure, Within},
    guest::{Msr, Registers},
    memory::{Memory, copy_dense, copy_sparse},
    snapshot::{CONFIG, MEMORY, Range, STATE},
};

/// What is not memory.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) registers: Registers,
    ranges: Vec<Range>,
}

impl State {
    /// Says whether there is memory to load.
    pub(crate) fn has_memory(&self) -> bool {
        !self.ranges.is_empty()
    }
}

/// Reads the description of the VM.
pub(crate) fn config(dir: &Path) -> Result<VmConfig, Failure> {
    read(&dir.join(CONFIG), "config")
}

/// Reads the state of the devices.
pub(crate) fn state(dir: &Path) -> Result<State, Failure> {
    let state: Value = read(&dir.join(STATE), "state")?;
    let cpu: Value = part(&state["snapshots"]["cpu-manager"], "0")?;
    let msrs = serde_json::from_value::<Vec<Msr>>(cpu["Kvm"]["msrs"].clone());
    let registers = serde_json::from_value(cpu["Kvm"]["regs"].clone());
    let mut registers: Registers = registers.map_err(|error| damaged(&error.to_string()))?;
    registers.set_msrs(&msrs.map_err(|error| damaged(&error.to_string()))?);
    let memory: Value = part(&state, "memory-manager")?;
    let ranges = serde_json::from_value(memory["memory_ranges"]["data"].clone());
    let ranges = ranges.map_err(|error| damaged(&error.to_string()))?;
    Ok(State { registers, ranges })
}

/// Makes the memory, and fills what the snapshot has of it. Until `sparse` is known every
/// byte is read, and one too few is an error; since then the end of a file is a hole.
pub(crate) fn memory(
    dir: &Path,
    config: &MemoryConfig,
    state: &State,
    sparse: bool,
) -> Result<Memory, Failure> {
    let memory = Memory::make(config)?;
    if state.ranges.is_empty() {
        return Ok(memory);
    }
    let file = File::open(dir.join(MEMORY)).within("Error opening snapshot file")?;
    let mut at = 0;
    for range in &state.ranges {
        let region = memory.regions.iter().find(|region| region.start == range.gpa);
        let region = region.filter(|region| region.bytes == range.length);
        let region = region.ok_or_else(|| damaged("a range that is no memory"))?;
        let copied = if sparse {
            copy_sparse(&file, at, &region.file, 0, range.length)
        } else {
            copy_dense(&file, at, &region.file, 0, range.length)
        };
        copied.within("Error reading from snapshot file")?;
        at += range.length;
    }
    Ok(memory)
}

fn read<T: DeserializeOwned>(path: &Path, what: &str) -> Result<T, Failure> {
    fs::read(path)
        .within(&format!("Error opening VM {what} snapshot file {path:?}"))
        .and_then(|bytes| {
            let parsed = serde_json::from_slice(&bytes);
            parsed
                .map_err(|error| Failure::new(&error.to_string()))
                .within(&format!("Error deserialising VM {what} snapshot"))
        })
        .within("Failed to receive migratable component snapshot")
}

fn part<T: DeserializeOwned>(state: &Value, name: &str) -> Result<T, Failure> {
    let text = state["snapshots"][name]["snapshot_data"]["state"].as_str();
    let text = text.ok_or_else(|| damaged(&format!("Missing {name} snapshot")))?;
    serde_json::from_str(text).map_err(|error| damaged(&error.to_string()))
}

fn damaged(said: &str) -> Failure {
    Failure::new(said).within("Failed to restore migratable component")
}
