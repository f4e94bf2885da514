//! The VMM: at most one VM, and what can be asked of it.

use std::{
    path::Path,
    sync::{Arc, atomic::Ordering},
};

use serde_json::{Value, json};

use crate::{
    config::{NewRestoreMode, RestoreConfig, RestoreMode, VmConfig},
    confinement::Confinement,
    events::Monitor,
    failure::{Failure, Kind, Within},
    guest::{Options, Registers},
    knobs::{COPY_ON_WRITE, Knobs, PREFAULT, RESTORE_MODES, SERIAL_BUFFER, SPARSE},
    memory::Memory,
    restore,
    serial::Serial,
    server::Waker,
    snapshot,
    vm::{Vm, VmState, check_payload},
};

/// Where the kernel is in a guest's memory.
const KERNEL_AT: u64 = 1 << 20;

/// A VMM.
#[derive(Debug)]
pub(crate) struct Vmm {
    pub(crate) knobs: Knobs,
    events: Monitor,
    no_shutdown: bool,
    waker: Waker,
    config: Option<VmConfig>,
    serial: Option<Arc<Serial>>,
    vm: Option<Vm>,
    confinement: Confinement,
    /// Whether the process is to end.
    pub(crate) over: bool,
}

impl Vmm {
    pub(crate) fn new(knobs: Knobs, events: Monitor, no_shutdown: bool, waker: Waker) -> Self {
        let confinement = Confinement::default();
        let (config, serial, vm, over) = (None, None, None, false);
        Self { knobs, events, no_shutdown, waker, config, serial, vm, confinement, over }
    }

    pub(crate) fn ping(&self) -> Value {
        json!({
            "build_version": self.knobs.build_version(),
            "version": self.knobs.package_version(),
            "pid": std::process::id(),
            "features": ["io_uring", "kvm"],
        })
    }

    /// Stores the description, opens the serial port and confines the process. A mistake
    /// found on the way leaves what was done.
    pub(crate) fn create(&mut self, config: VmConfig) -> Result<(), Failure> {
        if self.config.is_some() {
            return Err(Failure::new("VM is already created"));
        }
        self.config = Some(config);
        self.open_console()?;
        self.confinement.confine(self.config.as_ref().expect("it was just set"));
        Ok(())
    }

    /// Makes the VM and lets its guest run.
    pub(crate) fn boot(&mut self) -> Result<(), Failure> {
        if self.vm.is_some() {
            return Err(Failure::new("VM is already created"));
        }
        self.events.tell("vm", "booting");
        if self.config.is_none() {
            return Err(Failure::of(Kind::NoVm, "VM config is missing"));
        }
        let serial = match &self.serial {
            Some(serial) => Arc::clone(serial),
            None => self.open_console()?,
        };
        let config = self.config.as_ref().expect("it was just there");
        let memory = Memory::make(&config.memory).within("Memory manager error")?;
        let payload = config.payload.clone().unwrap_or_else(no_payload);
        let options = Options::read(payload.cmdline.as_deref().unwrap_or_default());
        let balloon = config.balloon.as_ref().map_or(0, |balloon| balloon.size);
        let registers = Registers::at_boot(options, balloon);
        if let Some(dir) = config.vsock.as_ref().and_then(|vsock| vsock.socket.parent())
            && dir.exists()
        {
            // One that was made after it confined itself is covered by no rule.
            self.confinement
                .check_write(dir)
                .within("Error binding to the host-side Unix socket")
                .within("Cannot create virtio-vsock backend")
                .within("Error from device manager")?;
        }
        let around = (&self.knobs, self.waker.clone());
        let vm = Vm::make(config, memory, registers, VmState::Created, serial, around)?;
        // What fails from here on leaves a VM that can be neither booted nor made again.
        let vm = self.vm.insert(vm);
        vm.lock_disks()?;
        check_payload(&payload)?;
        // The kernel is put there.
        vm.memory.read(KERNEL_AT, &mut [0])?;
        vm.go(VmState::Running);
        self.events.tell("vm", "booted");
        Ok(())
    }

    pub(crate) fn info(&self) -> Result<Value, Failure> {
        let config = self.config.as_ref().ok_or_else(not_created)?;
        let state = self.vm.as_ref().map_or(VmState::Created, |vm| vm.state);
        let ballooned = self.vm.as_ref().map_or(0, |vm| vm.guest.registers().balloon);
        Ok(json!({
            "config": config,
            "state": format!("{state:?}"),
            "memory_actual_size": config.ram_bytes() - ballooned,
            "device_tree": self.vm.as_ref().map(|_| json!({})),
        }))
    }

    pub(crate) fn counters(&self) -> Result<Value, Failure> {
        self.vm.as_ref().map(|_| json!({})).ok_or_else(not_running)
    }

    pub(crate) fn pause(&mut self) -> Result<(), Failure> {
        let vm = self.vm.as_mut().ok_or_else(not_running)?;
        self.events.tell("vm", "pausing");
        vm.state
            .check(VmState::Paused)
            .within("Failed to pause migratable component")
            .within("Cannot pause VM")?;
        vm.go(VmState::Paused);
        self.events.tell("vm", "paused");
        Ok(())
    }

    pub(crate) fn resume(&mut self) -> Result<(), Failure> {
        let vm = self.vm.as_mut().ok_or_else(not_running)?;
        self.events.tell("vm", "resuming");
        vm.state
            .check(VmState::Running)
            .within("Failed to resume migratable component")
            .within("Cannot resume VM")?;
        vm.go(VmState::Running);
        self.events.tell("vm", "resumed");
        Ok(())
    }

    /// Writes a snapshot. The event comes before its files, and also if they fail.
    pub(crate) fn snapshot(&mut self, url: &str) -> Result<(), Failure> {
        let vm = self.vm.as_ref().ok_or_else(not_running)?;
        if vm.filling.load(Ordering::SeqCst) {
            return Err(Failure::new("VM on-demand memory restore is still in progress"));
        }
        self.serial = None;
        self.events.tell("vm", "snapshotting");
        if vm.state != VmState::Paused {
            return Err(Failure::new("Trying to snapshot while VM is running"))
                .within("Failed to snapshot migratable component")
                .within("Cannot snapshot VM");
        }
        self.events.tell("vm", "snapshotted");
        let config = self.config.as_ref().ok_or_else(not_created)?;
        let sparse = self.knobs.has(SPARSE);
        snapshot::directory(url)
            .and_then(|dir| {
                self.confinement
                    .check_write(&dir)
                    .within("Error creating VM config snapshot file")
                    .within("Failed to send migratable component snapshot")?;
                snapshot::write(&dir, config, &vm.guest.registers(), &vm.memory, sparse)
            })
            .within("Cannot send VM snapshot")
    }

    /// Loads a snapshot. After an error there is no VM, and it can be tried again.
    pub(crate) fn restore(
        &mut self,
        wanted: &RestoreConfig,
        mode: RestoreMode,
    ) -> Result<(), Failure> {
        if self.vm.is_some() || self.config.is_some() {
            return Err(Failure::new("VM is already created"));
        }
        let dir = snapshot::directory(&wanted.source_url).within("Cannot restore VM")?;
        let config = restore::config(&dir).within("Cannot restore VM")?;
        if mode == RestoreMode::OnDemand && wanted.prefault {
            let said = "'prefault' cannot be combined with 'memory_restore_mode=ondemand'";
            return Err(Failure::config(said));
        }
        let mut restored = self.restore_from(&dir, config, mode);
        if restored.is_ok() && wanted.resume && self.knobs.has(RESTORE_MODES) {
            restored = self.resume();
        }
        if restored.is_err() {
            self.delete();
        }
        restored
    }

    fn restore_from(
        &mut self,
        dir: &Path,
        config: VmConfig,
        mode: RestoreMode,
    ) -> Result<(), Failure> {
        let state = restore::state(dir).within("Cannot restore VM")?;
        self.config = Some(config.clone());
        let serial = self.open_console()?;
        // What has its memory in files has nothing to load, however that is to be done.
        let on_demand = mode == RestoreMode::OnDemand && state.has_memory();
        if on_demand && !self.knobs.userfaultfd {
            return Err(Failure::new("Operation not permitted (os error 1)")
                .within("Failed to create userfaultfd")
                .within("On-demand restore failed")
                .within("Memory manager error"));
        }
        let sparse = self.knobs.has(SPARSE);
        let memory =
            restore::memory(dir, &config.memory, &state, sparse).within("Memory manager error")?;
        state.registers.write_wall_clock(&memory)?;
        let around = (&self.knobs, self.waker.clone());
        let vm = Vm::make(&config, memory, state.registers, VmState::Paused, serial, around)?;
        self.confinement.confine(&config);
        self.events.tell("vm", "restoring");
        let vm = self.vm.insert(vm);
        vm.lock_disks()?;
        if on_demand && self.knobs.has(PREFAULT) {
            vm.fill(self.knobs.clone())?;
        }
        self.events.tell("vm", "restored");
        Ok(())
    }

    /// Says how memory is to come back, in so far as this version is asked.
    pub(crate) fn restore_mode(&self, wanted: &RestoreConfig) -> Result<RestoreMode, Failure> {
        let Some(mode) = &wanted.memory_restore_mode else {
            return Ok(RestoreMode::Copy);
        };
        if !self.knobs.has(RESTORE_MODES) {
            return Ok(RestoreMode::Copy);
        }
        let parsed = if self.knobs.has(COPY_ON_WRITE) {
            serde_json::from_value::<NewRestoreMode>(mode.clone()).map(RestoreMode::from)
        } else {
            serde_json::from_value(mode.clone())
        };
        parsed.map_err(|error| Failure::of(Kind::Request, &error.to_string()))
    }

    /// Has the balloon take memory.
    pub(crate) fn resize(&mut self, balloon: Option<u64>) -> Result<(), Failure> {
        let config = self.config.as_mut().ok_or_else(not_created)?;
        let Some(bytes) = balloon else {
            return Err(Failure::new("the stand-in has a balloon and no hotplug"));
        };
        let missing = "Missing virtio-balloon, can't proceed as expected";
        match (&mut config.balloon, &self.vm) {
            (Some(balloon), vm) => {
                balloon.size = bytes;
                if let Some(vm) = vm {
                    vm.guest.want_balloon(bytes);
                }
                Ok(())
            }
            (None, Some(_)) => Err(Failure::new(missing).within("Error from device manager")),
            (None, None) => Ok(()),
        }
    }

    pub(crate) fn power_button(&mut self) -> Result<(), Failure> {
        self.vm.as_ref().ok_or_else(not_running)?;
        self.waker.power_off();
        Ok(())
    }

    pub(crate) fn shut_down(&mut self) -> Result<(), Failure> {
        self.serial = None;
        self.vm.take().ok_or_else(not_running)?.shut_down();
        self.events.tell("vm", "shutdown");
        Ok(())
    }

    /// Forgets the VM, if there is one.
    pub(crate) fn delete(&mut self) {
        if self.config.is_none() {
            return;
        }
        if self.vm.is_some() {
            self.shut_down().expect("it is there");
        }
        self.config = None;
        self.events.tell("vm", "deleted");
    }

    /// Ends it all.
    pub(crate) fn end(&mut self) {
        self.delete();
        self.events.tell("vmm", "shutdown");
        self.over = true;
    }

    /// The guest turned the machine off.
    pub(crate) fn powered_off(&mut self) {
        if self.no_shutdown {
            if let Some(vm) = &mut self.vm {
                vm.go(VmState::Shutdown);
            }
        } else {
            self.end();
        }
    }

    fn open_console(&mut self) -> Result<Arc<Serial>, Failure> {
        let config = self.config.as_ref().ok_or_else(not_created)?;
        let keeps = self.knobs.has(SERIAL_BUFFER);
        let opened = Serial::open(&config.console, false)
            .and_then(|_| Serial::open(&config.serial, keeps))
            .within("Error creating console device")
            .within("Error creating console devices")?;
        self.serial = Some(Arc::clone(&opened));
        Ok(opened)
    }
}

fn not_created() -> Failure {
    Failure::of(Kind::NoVm, "VM is not created")
}

fn not_running() -> Failure {
    Failure::new("VM is not running")
}

fn no_payload() -> crate::config::Payload {
    crate::config::Payload { firmware: None, kernel: None, cmdline: None, initramfs: None }
}
