//! The files that it saves a machine to, by their names.

/// The file that it writes memory to, which we call as all drivers do.
pub(super) const MEMORY_FILE: &str = "memory-ranges";
/// The file that it writes its configuration to.
pub(super) const CONFIG_FILE: &str = "config.json";
/// The file that it writes the state of CPUs and devices to.
pub(super) const STATE_FILE: &str = "state.json";
/// The largest file that it writes beside the memory; one of a large machine has some MiB.
pub(super) const SMALL_FILE_MAX_BYTES: u64 = 64 << 20;
