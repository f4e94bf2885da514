//! The guest: a thread that counts aloud, as `tests/guest/counter.S` does in assembly.
//!
//! The count is in a register, which is saved with the devices, and in memory; a guest
//! whose two counts differ says that it is torn and ends. The sum is taken anew for each
//! line over memory that never changes after boot. What is typed is printed with `heard`
//! before it.
//!
//! As every Linux does, it has told KVM where it wants to find the wall clock. KVM writes it
//! there whenever that is set, also by the VMM for a guest that is paused.
//!
//! Words of the kernel's command line, others being skipped:
//!
//! - `quit=N` powers the machine off after N lines
//! - `seed=N` starts the pattern elsewhere
//! - `touch=N` dirties a word in each page of N MiB from 16 MiB on, at boot
//! - `garbage=N` does so with the N MiB behind those, and has no use for them: a balloon
//!   takes them, and so does the host where free pages are reported

use std::{
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{memory::Memory, serial::Serial, server::Waker};

/// Between two lines.
const TICK: Duration = Duration::from_millis(20);
const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
const COUNT_AT: u64 = MIB;
const WALL_CLOCK_AT: u64 = MIB + PAGE;
const MARKER_AT: u64 = 2 * MIB;
const MARKER_BYTES: usize = 256 * 1024;
const TOUCH_FROM: u64 = 16 * MIB;
/// How much a balloon grows or shrinks in a tick.
const BALLOON_STEP: u64 = 64 * MIB;
/// What a guest does not give to a balloon, besides what it touched.
const KEEP_BYTES: u64 = 32 * MIB;

/// What a guest was booted with.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Options {
    quit: Option<u32>,
    seed: u32,
    touch: u64,
    garbage: u64,
}

/// The registers that say where the wall clock is wanted, which are one.
const WALL_CLOCK_MSRS: [u32; 2] = [0x11, 0x4b56_4d00];

/// A register that is known by a number.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Msr {
    index: u32,
    data: u64,
}

/// What of a guest is not in memory. It is saved with the devices.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Registers {
    pub(crate) options: Options,
    count: u32,
    /// Whether the first line is printed.
    ready: bool,
    /// How much the balloon has, and is to have.
    pub(crate) balloon: u64,
    pub(crate) balloon_wanted: u64,
    /// Where KVM is to write the wall clock; nought is nowhere.
    #[serde(skip)]
    wall_clock: u64,
}

/// A guest and the thread that is its CPU.
#[derive(Debug)]
pub(crate) struct Guest {
    shared: Arc<Shared>,
    thread: Option<thread::JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    /// Held for as long as a line takes, so that whoever has it knows that the guest
    /// does nothing. Above the locks of the serial port.
    control: Mutex<Control>,
    changed: Condvar,
}

#[derive(Debug)]
struct Control {
    running: bool,
    ended: bool,
    registers: Registers,
}

/// Tells whether a guest runs.
#[derive(Debug, Clone)]
pub(crate) struct Awake(Arc<Shared>);

impl Awake {
    /// Waits until the guest runs, or is no more.
    pub(crate) fn wait(&self) {
        let control = self.0.control.lock().expect("the CPU does not panic");
        let asleep = |control: &mut Control| !control.running && !control.ended;
        drop(self.0.changed.wait_while(control, asleep).expect("nobody panics with it"));
    }
}

/// What the CPU's thread works with.
struct Machine {
    shared: Arc<Shared>,
    memory: Arc<Memory>,
    serial: Arc<Serial>,
    waker: Waker,
    reports_free_pages: bool,
}

impl Options {
    /// Reads the kernel's command line.
    pub(crate) fn read(cmdline: &str) -> Self {
        let mut options = Self::default();
        for word in cmdline.split(' ') {
            let Some((name, value)) = word.split_once('=') else {
                continue;
            };
            match name {
                "quit" => options.quit = value.parse().ok(),
                "seed" => options.seed = value.parse().unwrap_or_default(),
                "touch" => options.touch = value.parse::<u64>().unwrap_or_default() * MIB,
                "garbage" => options.garbage = value.parse::<u64>().unwrap_or_default() * MIB,
                _ => {}
            }
        }
        options
    }
}

impl Registers {
    /// Those of a guest that has not run.
    pub(crate) fn at_boot(options: Options, balloon_wanted: u64) -> Self {
        Self { options, count: 0, ready: false, balloon: 0, balloon_wanted, wall_clock: 0 }
    }

    /// Returns what has a number.
    pub(crate) fn msrs(&self) -> Vec<Msr> {
        WALL_CLOCK_MSRS.map(|index| Msr { index, data: self.wall_clock }).into()
    }

    /// Takes over what has a number.
    pub(crate) fn set_msrs(&mut self, msrs: &[Msr]) {
        let clock = msrs.iter().find(|msr| WALL_CLOCK_MSRS.contains(&msr.index));
        self.wall_clock = clock.map_or(0, |msr| msr.data);
    }

    /// Does what KVM does when the registers are set: the number of times that it did goes
    /// up by two, and the time is behind it.
    pub(crate) fn write_wall_clock(&self, memory: &Memory) -> io::Result<()> {
        if self.wall_clock == 0 {
            return Ok(());
        }
        let mut version = [0; 4];
        memory.read(self.wall_clock, &mut version)?;
        let version = u32::from_le_bytes(version).wrapping_add(2);
        memory.write(self.wall_clock, &version.to_le_bytes())
    }
}

impl Guest {
    /// Makes a guest that does not run.
    pub(crate) fn new(
        registers: Registers,
        memory: Arc<Memory>,
        serial: Arc<Serial>,
        waker: Waker,
        reports_free_pages: bool,
    ) -> io::Result<Self> {
        let control = Mutex::new(Control { running: false, ended: false, registers });
        let shared = Arc::new(Shared { control, changed: Condvar::new() });
        let machine =
            Machine { shared: Arc::clone(&shared), memory, serial, waker, reports_free_pages };
        let thread =
            thread::Builder::new().name("vcpu0".to_owned()).spawn(move || machine.run())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Lets it run, or stops it. When this returns it does no more.
    pub(crate) fn set_running(&self, running: bool) {
        self.shared.control.lock().expect("the CPU does not panic").running = running;
        self.shared.changed.notify_all();
    }

    /// Returns what tells whether it runs.
    pub(crate) fn awake(&self) -> Awake {
        Awake(Arc::clone(&self.shared))
    }

    /// Returns what is not in memory.
    pub(crate) fn registers(&self) -> Registers {
        self.shared.control.lock().expect("the CPU does not panic").registers.clone()
    }

    /// Returns what keeps the guest from doing anything.
    pub(crate) fn brake(&self) -> Brake {
        Brake(Arc::clone(&self.shared))
    }

    /// Has the balloon take so much. A paused guest does it when it runs again.
    pub(crate) fn want_balloon(&self, bytes: u64) {
        let mut control = self.shared.control.lock().expect("the CPU does not panic");
        control.registers.balloon_wanted = bytes;
    }
}

/// Keeps a guest from doing anything for as long as something takes.
#[derive(Debug)]
pub(crate) struct Brake(Arc<Shared>);

impl Brake {
    pub(crate) fn hold<T>(&self, act: impl FnOnce() -> T) -> T {
        let _held = self.0.control.lock().expect("the CPU does not panic");
        act()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.shared.control.lock().expect("the CPU does not panic").ended = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the CPU does not panic");
        }
    }
}

impl Machine {
    fn run(&self) {
        let mut control = self.lock();
        loop {
            control = self
                .shared
                .changed
                .wait_while(control, |control| !control.running && !control.ended)
                .expect("nobody panics with it");
            if control.ended {
                return;
            }
            if !control.registers.ready {
                self.boot(&mut control.registers).expect("the memory is there");
            }
            if !self.print_line(&mut control.registers).expect("the memory is there") {
                control.running = false;
                self.waker.power_off();
                continue;
            }
            self.move_balloon(&mut control.registers).expect("the memory is there");
            // Ends early when the guest is paused or ended; it is no line early then, as the
            // loop waits.
            let (woken, _) = self
                .shared
                .changed
                .wait_timeout_while(control, TICK, |control| control.running && !control.ended)
                .expect("nobody panics with it");
            control = woken;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Control> {
        self.shared.control.lock().expect("nobody panics with it")
    }

    fn boot(&self, registers: &mut Registers) -> io::Result<()> {
        let mut marker = Vec::with_capacity(MARKER_BYTES);
        let mut word = (0x2545_f491 ^ registers.options.seed).max(1);
        while marker.len() < MARKER_BYTES {
            word ^= word << 13;
            word ^= word >> 17;
            word ^= word << 5;
            marker.extend_from_slice(&word.to_le_bytes());
        }
        self.memory.write(MARKER_AT, &marker)?;
        self.memory.write(COUNT_AT, &0_u32.to_le_bytes())?;
        registers.wall_clock = WALL_CLOCK_AT;
        registers.write_wall_clock(&self.memory)?;
        let (touch, garbage) = (registers.options.touch, registers.options.garbage);
        for page in 0..(touch + garbage) / PAGE {
            let at = TOUCH_FROM + page * PAGE;
            self.memory.write(at, &(at | 1).to_le_bytes())?;
        }
        if self.reports_free_pages && garbage > 0 {
            self.memory.punch(TOUCH_FROM + touch, garbage)?;
        }
        self.say(&format!("counter guest ready sum {:08x}", self.sum()?));
        registers.ready = true;
        Ok(())
    }

    /// Counts; returns whether the guest goes on.
    fn print_line(&self, registers: &mut Registers) -> io::Result<bool> {
        for heard in self.serial.heard() {
            self.say(&format!("heard {heard}"));
        }
        let mut in_memory = [0; 4];
        self.memory.read(COUNT_AT, &mut in_memory)?;
        if u32::from_le_bytes(in_memory) != registers.count {
            self.say("counter guest torn");
            return Ok(false);
        }
        registers.count += 1;
        self.memory.write(COUNT_AT, &registers.count.to_le_bytes())?;
        self.say(&format!("count {:08x} sum {:08x}", registers.count, self.sum()?));
        if registers.options.quit == Some(registers.count) {
            self.say("counter guest quits");
            return Ok(false);
        }
        Ok(true)
    }

    fn sum(&self) -> io::Result<u32> {
        let mut marker = vec![0; MARKER_BYTES];
        self.memory.read(MARKER_AT, &mut marker)?;
        let (words, _) = marker.as_chunks::<4>();
        let add = |sum: u32, word| sum.rotate_left(1).wrapping_add(u32::from_le_bytes(word));
        Ok(words.iter().copied().fold(0, add))
    }

    /// Brings the balloon nearer to what it is to be. What it takes the host has back.
    fn move_balloon(&self, registers: &mut Registers) -> io::Result<()> {
        let touched = TOUCH_FROM + registers.options.touch;
        let free = self.memory.bytes().saturating_sub(touched + KEEP_BYTES);
        let target = registers.balloon_wanted.min(free);
        let now = registers.balloon;
        registers.balloon = if target > now {
            let taken = (target - now).min(BALLOON_STEP);
            self.memory.punch(touched + now, taken)?;
            now + taken
        } else {
            now - (now - target).min(BALLOON_STEP)
        };
        Ok(())
    }

    fn say(&self, line: &str) {
        self.serial.write(format!("{line}\n").as_bytes());
    }
}
