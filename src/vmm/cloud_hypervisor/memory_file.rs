//! Memory that is in a file of the store.
//!
//! The VMM is told of the file by a descriptor that it inherits: the file is moved while the
//! VMM lives, and a guest that resets its machine has the VMM open it once more.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use super::told;
use crate::{
    sandbox::MemoryMode,
    sys::files::overwrite_regular,
    vmm::{Error, Plan, peer::host},
};

/// The name of the piece of memory that is the file. There is one, which is all of it.
const ZONE: &str = "mem0";
/// The register by which a guest tells where it wants to find when its clock began, by its
/// two numbers.
const WALL_CLOCK_REGISTERS: [u64; 2] = [0x11, 0x4b56_4d00];

/// Says whether the guest of `plan` has its memory in a file.
pub(super) fn is_wanted(mode: MemoryMode) -> bool {
    match mode {
        MemoryMode::File => true,
        MemoryMode::Auto | MemoryMode::Shared => false,
    }
}

/// Returns what the VMM is told of the file that the memory of `plan` is in, if it is in one.
/// A new one gets its size, as the VMM makes it no larger than it is.
pub(super) fn prepare(plan: &Plan) -> Result<Option<PathBuf>, Error> {
    if !is_wanted(plan.memory_mode) {
        return Ok(None);
    }
    let prepared = || {
        let file = File::options().read(true).write(true).open(&plan.memory)?;
        if file.metadata()?.len() == 0 {
            file.set_len(plan.memory_bytes)?;
        }
        Ok(told::path(told::MEMORY))
    };
    prepared().map(Some).map_err(host(format!("opening {}", plan.memory.display())))
}

/// Describes memory that is `file`.
pub(super) fn zones(bytes: u64, file: &Path) -> Value {
    json!([{ "id": ZONE, "size": bytes, "file": file, "shared": true }])
}

/// Has the description of the memory in a snapshot name the file of today.
///
/// # Errors
/// Says what does not fit: whether memory is in a file does not change while asleep.
pub(super) fn adapt(memory: &mut Value, file: Option<&Path>) -> Result<(), String> {
    let none = Vec::new();
    let zones = memory["zones"].as_array().unwrap_or(&none).len();
    match (zones, file) {
        (0, None) => Ok(()),
        (1, Some(file)) => {
            memory["zones"][0]["file"] = json!(file);
            Ok(())
        }
        (_, None) => Err("its memory was in a file, and is to be in none".to_owned()),
        (_, Some(_)) => Err("its memory was in no file, and is to be in one".to_owned()),
    }
}

/// Makes what the VMM wrote of the devices, in `path`, fit memory that is the snapshot's
/// own and must not change before the guest runs.
///
/// Whoever sets a vCPU's register for the wall clock has KVM write the time to where the
/// guest wants it, at once. So it is set to nothing. A guest that wants to know the time
/// that way sets it anew each time.
pub(super) fn keep_from_changing(path: &Path, text: &[u8]) -> Result<(), Error> {
    let quiet = without_wall_clock(text).map_err(|said| Error::Nonsense {
        command: "vm.snapshot".to_owned(),
        said: format!(
            "the CPU state that it wrote has an unknown format ({said}); use memory_mode = \
             \"shared\""
        ),
    })?;
    let Some(quiet) = quiet else {
        return Ok(());
    };
    overwrite_regular(path, quiet.as_bytes()).map_err(host(format!("writing {}", path.display())))
}

/// Returns the state without any vCPU's wall clock, or nothing where it has none anyway.
fn without_wall_clock(text: &[u8]) -> Result<Option<String>, String> {
    let mut state: Value = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    let cpus = state["snapshots"]["cpu-manager"]["snapshots"]
        .as_object_mut()
        .filter(|cpus| !cpus.is_empty())
        .ok_or("there are none")?;
    let mut changed = false;
    for cpu in cpus.values_mut() {
        let state = &mut cpu["snapshot_data"]["state"];
        let text = state.as_str().ok_or("no state")?;
        let mut parts: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if forget_wall_clock(&mut parts)? {
            *state = parts.to_string().into();
            changed = true;
        }
    }
    Ok(changed.then(|| state.to_string()))
}

/// Sets the registers of one vCPU to nothing; says whether they were something.
fn forget_wall_clock(cpu: &mut Value) -> Result<bool, String> {
    let registers = cpu["Kvm"]["msrs"].as_array_mut().ok_or("no registers")?;
    let mut changed = false;
    for register in registers {
        let index = register["index"].as_u64().ok_or("a register without a number")?;
        let data = register["data"].as_u64().ok_or("a register without a value")?;
        if WALL_CLOCK_REGISTERS.contains(&index) && data != 0 {
            register["data"] = json!(0);
            changed = true;
        }
    }
    Ok(changed)
}

/// Refuses a snapshot with memory of its own, in `path`, beside that which is in a file: one
/// of the two would not be what the guest had.
pub(super) fn refuse_copy(path: &Path) -> Result<(), Error> {
    match path.try_exists() {
        Ok(false) => Ok(()),
        Ok(true) => Err(Error::Nonsense {
            command: "vm.snapshot".to_owned(),
            said: "it wrote memory that is in a file already".to_owned(),
        }),
        Err(source) => Err(host(format!("looking for {}", path.display()))(source)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is written of a machine with one vCPU that has such registers.
    fn state(registers: &Value) -> String {
        let cpu = json!({ "Kvm": { "xsave": [u64::MAX, 7], "msrs": registers } }).to_string();
        json!({ "snapshots": { "cpu-manager": { "snapshots": {
            "0": { "snapshots": {}, "snapshot_data": { "state": cpu } },
        } } } })
        .to_string()
    }

    #[test]
    fn the_wall_clock_of_a_guest_is_forgotten_and_nothing_else() {
        let registers = |at: u64| {
            json!([
                { "index": 0x11, "data": at },
                { "index": 0x12, "data": 0x7001 },
                { "index": 0x4b56_4d00_u64, "data": at },
                { "index": 0x4b56_4d01_u64, "data": 0x7001 },
            ])
        };
        let quiet = without_wall_clock(state(&registers(0x5000)).as_bytes()).unwrap().unwrap();
        assert_eq!(quiet, state(&registers(0)));
        assert_eq!(without_wall_clock(quiet.as_bytes()), Ok(None));
    }

    #[test]
    fn what_is_not_known_of_the_cpus_is_no_reason_to_guess() {
        for text in [
            "{}".to_owned(),
            "no JSON".to_owned(),
            json!({ "snapshots": { "cpu-manager": { "snapshots": {} } } }).to_string(),
            json!({ "snapshots": { "cpu-manager": { "snapshots": { "0": {} } } } }).to_string(),
            state(&json!({})),
            state(&json!([{ "index": 17 }])),
            state(&json!([{ "number": 17, "data": 0 }])),
        ] {
            without_wall_clock(text.as_bytes()).expect_err(&text);
        }
    }

    #[test]
    fn the_memory_of_a_snapshot_is_where_it_is_now_and_stays_what_it_was() {
        let file = Path::new("/proc/self/fd/9");
        let mut memory = json!({ "size": 0, "zones": zones(64 << 20, Path::new("/old")) });
        adapt(&mut memory, Some(file)).unwrap();
        assert_eq!(memory["zones"], zones(64 << 20, file));
        adapt(&mut memory, None).unwrap_err();
        let mut own = json!({ "size": 64 << 20, "shared": true });
        adapt(&mut own, None).unwrap();
        assert_eq!(own, json!({ "size": 64 << 20, "shared": true }));
        adapt(&mut own, Some(file)).unwrap_err();
    }
}
