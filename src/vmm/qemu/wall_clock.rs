//! The register for KVM's wall clock, in the state that QEMU saved.
//!
//! Whoever sets it has KVM write the time to where the guest wants it, at once, and QEMU
//! sets it when it loads. The memory is the snapshot's own and must not change before
//! the guest runs, so what is saved of the register is nought, for which KVM does nothing.
//! A guest that wants to know the time that way sets it anew each time.
//!
//! Where it is says the description that QEMU writes after the state. Everything that the
//! way there leads past is held against it, and nothing is guessed.

use std::{fs::File, io, os::unix::fs::FileExt};

use serde::Deserialize;

/// What a section of a device's whole state begins with.
const SECTION_FULL: u8 = 0x04;
/// What a section ends with, before its number once more.
const SECTION_FOOTER: u8 = 0x7e;
/// What comes after the last section.
const END: u8 = 0x00;
/// What comes after that: the length of the description, and the description.
const DESCRIPTION: u8 = 0x06;
/// The bytes of a number: of a section, a device, a version or a length.
const NUMBER: usize = 4;
/// The bytes of a register.
const REGISTER: usize = 8;

/// The device that a vCPU is.
const CPU: &str = "cpu";
/// What the names of the fields begin with. The old and the new number of the register
/// are one to KVM and to QEMU 7.2, which may become two.
const WALL_CLOCK: &str = "env.wall_clock";

/// No state is a tenth as large: it has some hundred KiB, and 2 KiB for each vCPU.
const STATE_MAX_BYTES: u64 = 16 << 20;

/// What a state has, in the order in which it is there.
#[derive(Debug, Deserialize)]
struct Description {
    devices: Vec<Part>,
}

/// A device, or a part of its state that is not always there.
#[derive(Debug, Deserialize)]
struct Part {
    /// The device's name; parts of one have none.
    #[serde(default)]
    name: String,
    #[serde(default)]
    instance_id: u32,
    /// The part's name.
    #[serde(default)]
    vmsd_name: String,
    fields: Vec<Field>,
    #[serde(default)]
    subsections: Vec<Part>,
}

#[derive(Debug, Deserialize)]
struct Field {
    name: String,
    /// The bytes of one element.
    size: usize,
    #[serde(default)]
    array_len: Option<usize>,
}

/// Reads the whole of a saved state.
pub(super) fn read(state: &File) -> io::Result<Vec<u8>> {
    let bytes = state.metadata()?.len();
    if bytes > STATE_MAX_BYTES {
        return Err(io::Error::other(format!("it has more than {STATE_MAX_BYTES} bytes")));
    }
    let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
    let mut stream = vec![0; bytes];
    // QEMU has left the position of its descriptor, which is ours, at the end.
    state.read_exact_at(&mut stream, 0)?;
    Ok(stream)
}

/// Sets the registers at `places` to nought in `state`, of which `stream` is what it has.
pub(super) fn forget(state: &File, stream: &[u8], places: &[usize]) -> io::Result<()> {
    for &place in places {
        let set = stream.iter().skip(place).take(REGISTER).any(|byte| *byte != 0);
        if set {
            state.write_all_at(&[0; REGISTER], u64::try_from(place).map_err(io::Error::other)?)?;
        }
    }
    Ok(())
}

/// Returns where in `stream` the registers of each of `vcpus` are.
///
/// # Errors
/// Says in what the stream is not of the form that we know.
pub(super) fn places(stream: &[u8], vcpus: u8) -> Result<Vec<usize>, &'static str> {
    let (mut end, text) = description(stream).ok_or("no description at its end")?;
    let Description { devices } =
        serde_json::from_slice(text).map_err(|_| "a description of another form")?;
    let mut cpus_left = devices.iter().filter(|device| device.name == CPU).count();
    if cpus_left != usize::from(vcpus) {
        return Err("another count of CPUs");
    }
    let mut places = Vec::new();
    // From the end, as what is before the devices is not described.
    for device in devices.iter().rev() {
        if cpus_left == 0 {
            break;
        }
        let mut clocks = Vec::new();
        let length = device.measure(0, &mut clocks)?;
        let section = section(stream, end, device, length).ok_or("a device in another place")?;
        if device.name == CPU {
            if clocks.is_empty() {
                return Err("a CPU without wall clock");
            }
            places.extend(clocks.iter().map(|clock| section.data + clock));
            cpus_left -= 1;
        }
        end = section.start;
    }
    Ok(places)
}

/// Returns where the state ends, and the description that comes after it.
fn description(stream: &[u8]) -> Option<(usize, &[u8])> {
    let mut before = stream;
    loop {
        // JSON has no such byte, so the last one whose length fits is the right one.
        let mark = before.iter().rposition(|byte| *byte == DESCRIPTION)?;
        before = stream.get(..mark)?;
        let (length, text) = stream.get(mark + 1..)?.split_first_chunk::<NUMBER>()?;
        let fits = usize::try_from(u32::from_be_bytes(*length)) == Ok(text.len());
        if fits && before.last() == Some(&END) {
            return Some((mark - 1, text));
        }
    }
}

/// Where a device's section begins, and in it the data.
struct Section {
    start: usize,
    data: usize,
}

/// Finds the section of `device`, with `length` bytes of data, that ends at `end`. None
/// where there is another thing.
fn section(stream: &[u8], end: usize, device: &Part, length: usize) -> Option<Section> {
    let footer = end.checked_sub(1 + NUMBER)?;
    let data = footer.checked_sub(length)?;
    // Its kind, its number, the name with its length, which device of that name, a version.
    let start = data.checked_sub(1 + NUMBER + 1 + device.name.len() + NUMBER + NUMBER)?;
    let (kind, rest) = stream.get(start..data)?.split_first()?;
    let (number, rest) = rest.split_at_checked(NUMBER)?;
    let (name_length, rest) = rest.split_first()?;
    let (name, rest) = rest.split_at_checked(device.name.len())?;
    let is_it = *kind == SECTION_FULL
        && usize::from(*name_length) == device.name.len()
        && name == device.name.as_bytes()
        && rest.starts_with(&device.instance_id.to_be_bytes());
    let (mark, again) = stream.get(footer..end)?.split_first()?;
    (is_it && *mark == SECTION_FOOTER && again == number).then_some(Section { start, data })
}

impl Part {
    /// Returns where this ends if it begins at `at`, and notes where wall clocks are.
    fn measure(&self, mut at: usize, clocks: &mut Vec<usize>) -> Result<usize, &'static str> {
        const TOO_LONG: &str = "a field of no length";
        for field in &self.fields {
            if field.name.starts_with(WALL_CLOCK) {
                if field.size != REGISTER || field.array_len.is_some() {
                    return Err("a wall clock of another size");
                }
                clocks.push(at);
            }
            let bytes = field.size.checked_mul(field.array_len.unwrap_or(1));
            at = bytes.and_then(|bytes| at.checked_add(bytes)).ok_or(TOO_LONG)?;
        }
        for part in &self.subsections {
            // Its kind, its name with the length, its version.
            let head = 1 + 1 + part.vmsd_name.len() + NUMBER;
            at = part.measure(at.checked_add(head).ok_or(TOO_LONG)?, clocks)?;
        }
        Ok(at)
    }
}
