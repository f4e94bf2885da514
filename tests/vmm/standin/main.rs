//! A strict stand-in for the program `cloud-hypervisor`, for the tests of its driver.
//!
//! It is started and spoken to exactly as the real one, and refuses what the real one was
//! measured to refuse, in the same words and with the same codes. What it does not have is
//! a CPU: its guest is a thread that counts aloud as `tests/guest/counter.S` does, with
//! its count in guest memory and in a register, so that a test sees whether a wake went on
//! from the sleep. Nothing of it is in a release.
//!
//! A file `standin.json` beside the program says which version it is and what goes wrong
//! when; `knobs.rs` has its keys. Landlock is played and not applied, the CPU is not
//! checked, and a tap that is missing is noted and not made where the real one may make it.

mod api;
mod arguments;
mod config;
mod confinement;
mod events;
mod failure;
mod guest;
mod http;
mod knobs;
mod memory;
mod restore;
mod serial;
mod server;
mod snapshot;
mod tap;
mod vm;
mod vmm;
mod vsock;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use self::{arguments::Arguments, knobs::Knobs, server::Server, vmm::Vmm};

fn main() -> ExitCode {
    // As the real one: sockets and snapshots are for this user only.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let knobs = match Knobs::load() {
        Ok(knobs) => knobs,
        Err(error) => return complain(&error),
    };
    let arguments = match Arguments::parse(&knobs) {
        Ok(arguments) => arguments,
        Err(error) => return complain(&error),
    };
    if arguments.version {
        return tell_version(&knobs);
    }
    match run(knobs, &arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => complain(&error),
    }
}

fn run(knobs: Knobs, arguments: &Arguments) -> Result<(), String> {
    let events = events::Monitor::open(arguments.event_monitor.as_ref())?;
    events.tell("vmm", "starting");
    let mut server = Server::open(arguments.api_socket.as_ref(), &knobs)?;
    let mut vmm = Vmm::new(knobs, events, arguments.no_shutdown, server.waker());
    server.serve(&mut vmm);
    Ok(())
}

fn tell_version(knobs: &Knobs) -> ExitCode {
    let mut text = format!("cloud-hypervisor {}\n", knobs.build_version());
    if knobs.has(knobs::PROTOCOL_VERSIONS) {
        text.push_str("Migration Protocol Versions: 1, 2\n");
    }
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Prints a chain of errors as the real one does, and fails.
fn complain(chain: &str) -> ExitCode {
    let text = format!("Error: Cloud Hypervisor exited with the following error:\n  {chain}\n");
    io::stderr().write_all(text.as_bytes()).ok();
    ExitCode::FAILURE
}
