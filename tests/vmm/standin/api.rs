//! The endpoints, and what of them goes wrong because a test says so.

use std::{collections::HashMap, thread, time::Duration};

use dozed::sys::clock::Stopwatch;
use rustix::process::{Signal, getpid, kill_process};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    config::{RestoreConfig, VmConfig},
    failure::{Failure, Kind, Within},
    http::{Request, Response},
    knobs::{Act, CONFIG_400, ERROR_ARRAY, Knobs, NOT_FOUND},
    snapshot,
    vmm::Vmm,
};

const ROOT: &str = "/api/v1/";
/// What the real one has and this one does not.
const ABSENT: [&str; 15] = [
    "vm.add-device",
    "vm.add-disk",
    "vm.add-fs",
    "vm.add-generic-vhost-user",
    "vm.add-net",
    "vm.add-pmem",
    "vm.add-user-device",
    "vm.add-vdpa",
    "vm.add-vsock",
    "vm.nmi",
    "vm.reboot",
    "vm.remove-device",
    "vm.resize-disk",
    "vm.resize-zone",
    "vm.send-migration",
];

/// What is sent back.
#[derive(Debug)]
pub(crate) enum Reply {
    Whole(Vec<u8>),
    /// And then the connection ends.
    Last(Vec<u8>),
}

/// How often each endpoint was asked.
#[derive(Debug, Default)]
pub(crate) struct Calls(HashMap<String, u32>);

#[derive(Debug, Deserialize)]
struct SnapshotConfig {
    destination_url: String,
}

#[derive(Debug, Deserialize)]
struct Resize {
    desired_balloon: Option<u64>,
}

/// Does what a request asks for, or what a test wants instead.
pub(crate) fn answer(vmm: &mut Vmm, calls: &mut Calls, request: &Request) -> Reply {
    let endpoint = request.path.strip_prefix(ROOT).unwrap_or(&request.path);
    let body = request.body.as_deref().map(String::from_utf8_lossy).unwrap_or_default();
    vmm.knobs.note(&format!("{} {endpoint} {body}", request.method));
    let count = calls.0.entry(endpoint.to_owned()).or_default();
    *count += 1;
    let act = match vmm.knobs.act(endpoint, *count) {
        Ok(act) => act,
        Err(error) => return Reply::Last(format!("HTTP/1.1 500 {error}\r\n\r\n").into_bytes()),
    };
    let mut done = || response(vmm, endpoint, request).bytes();
    match act {
        None => Reply::Whole(done()),
        Some(Act::Error { status, chain }) => {
            let body = Some(serde_json::to_string(&chain).expect("it is JSON"));
            Reply::Whole(Response { status, body }.bytes())
        }
        Some(Act::Hang) => hang(),
        Some(Act::HangAfter) => {
            done();
            hang()
        }
        Some(Act::Half) => {
            let mut bytes = done();
            bytes.truncate(bytes.len() / 2);
            Reply::Last(bytes)
        }
        Some(Act::Say(text)) => Reply::Last(text.into_bytes()),
        Some(Act::Die) => die(),
        Some(Act::DieAfter) => {
            done();
            die()
        }
        Some(Act::Leave(leave)) => {
            let bytes = done();
            let left = snapshot::leave(request.body.as_deref().unwrap_or_default(), &leave);
            left.expect("its own directory is its own");
            Reply::Whole(bytes)
        }
        Some(Act::Slow(millis)) => {
            stall(Duration::from_millis(millis));
            Reply::Whole(done())
        }
    }
}

/// Waits for ever, and with it all other requests: there is one thread.
fn hang() -> ! {
    loop {
        thread::park();
    }
}

/// Lets that much time pass, however long it is.
pub(crate) fn stall(time: Duration) {
    let watch = Stopwatch::start();
    while let Some(left) = time.checked_sub(watch.elapsed()) {
        thread::park_timeout(left.max(Duration::from_millis(1)));
    }
}

fn die() -> ! {
    kill_process(getpid(), Signal::KILL).expect("we may");
    hang()
}

fn response(vmm: &mut Vmm, endpoint: &str, request: &Request) -> Response {
    let bare = |status| Response { status, body: None };
    let is_put = request.method == "PUT";
    match endpoint {
        "vmm.shutdown" if is_put => {
            vmm.end();
            return bare(200);
        }
        "vm.create" if is_put && request.body.is_none() => return bare(400),
        "vm.create" | "vm.info" | "vmm.ping" | "vmm.shutdown" => {}
        _ if request.method == "PATCH" && is_known(endpoint) => return bare(400),
        _ => {}
    }
    match dispatch(vmm, endpoint, request) {
        Ok(None) => bare(204),
        Ok(Some(value)) => Response { status: 200, body: Some(value.to_string()) },
        Err(failure) => refusal(&vmm.knobs, &failure),
    }
}

fn is_known(endpoint: &str) -> bool {
    let others = ["vm.boot", "vm.pause", "vm.resume", "vm.snapshot", "vm.restore", "vm.resize"];
    let rest = ["vm.shutdown", "vm.delete", "vm.power-button", "vm.counters"];
    ABSENT.contains(&endpoint) || others.contains(&endpoint) || rest.contains(&endpoint)
}

fn dispatch(vmm: &mut Vmm, endpoint: &str, request: &Request) -> Result<Option<Value>, Failure> {
    let nothing = |(): ()| None;
    let around = |result: Result<(), Failure>, said: &str| {
        result.within(said).within("Error from API").map(nothing)
    };
    match (request.method.as_str(), endpoint) {
        ("GET", "vmm.ping") => Ok(Some(vmm.ping())),
        ("GET", "vm.info") => {
            let info = vmm.info().within("The VM info is not available");
            info.within("Error from API").map(Some)
        }
        ("GET", "vm.counters") => {
            let counters = vmm.counters().within("The VM info is not available");
            counters.within("Error from API").map(Some)
        }
        ("PUT", "vm.create") => {
            let config: VmConfig = parsed(request)?;
            around(vmm.create(config), "The VM could not be created")
        }
        ("PUT", "vm.boot") => {
            no_body(request)?;
            around(vmm.boot(), "The VM could not boot")
        }
        ("PUT", "vm.pause") => {
            no_body(request)?;
            around(vmm.pause(), "The VM could not be paused")
        }
        ("PUT", "vm.resume") => {
            no_body(request)?;
            around(vmm.resume(), "The VM could not resume")
        }
        ("PUT", "vm.snapshot") => {
            let SnapshotConfig { destination_url } = parsed(request)?;
            around(vmm.snapshot(&destination_url), "The VM could not be snapshotted")
        }
        ("PUT", "vm.restore") => {
            let wanted: RestoreConfig = parsed(request)?;
            let mode = vmm.restore_mode(&wanted).within("Failed to deserialize JSON")?;
            around(vmm.restore(&wanted, mode), "The VM could not be restored")
        }
        ("PUT", "vm.resize") => {
            let Resize { desired_balloon } = parsed(request)?;
            around(vmm.resize(desired_balloon), "The VM could not be resized")
        }
        ("PUT", "vm.shutdown") => {
            no_body(request)?;
            around(vmm.shut_down(), "The VM could not shutdown")
        }
        ("PUT", "vm.delete") => {
            no_body(request)?;
            vmm.delete();
            Ok(None)
        }
        ("PUT", "vm.power-button") => {
            no_body(request)?;
            around(vmm.power_button(), "The VM could not be powered off")
        }
        ("PUT", name) if ABSENT.contains(&name) => {
            Err(Failure::new("the stand-in does not have this"))
        }
        (_, "vm.create" | "vm.info" | "vmm.ping" | "vmm.shutdown") => Err(bad_request()),
        (_, name) if is_known(name) => Err(bad_request()),
        _ => Err(Failure::of(Kind::Endpoint, "Not Found")),
    }
}

fn parsed<T: DeserializeOwned>(request: &Request) -> Result<T, Failure> {
    let body = request.body.as_deref().ok_or_else(bad_request)?;
    serde_json::from_slice(body)
        .map_err(|error| Failure::of(Kind::Request, &error.to_string()))
        .within("Failed to deserialize JSON")
}

fn no_body(request: &Request) -> Result<(), Failure> {
    if request.body.is_some() { Err(bad_request()) } else { Ok(()) }
}

fn bad_request() -> Failure {
    Failure::of(Kind::Request, "Bad Request")
}

fn refusal(knobs: &Knobs, failure: &Failure) -> Response {
    let status = match failure.kind {
        Kind::Request => 400,
        Kind::Endpoint => 404,
        Kind::NoVm if knobs.has(NOT_FOUND) => 404,
        Kind::Config if knobs.has(CONFIG_400) => 400,
        Kind::NoVm | Kind::Config | Kind::Internal => 500,
    };
    let body = if knobs.has(ERROR_ARRAY) {
        serde_json::to_string(&failure.chain).expect("it is JSON")
    } else {
        failure.to_string()
    };
    Response { status, body: Some(body) }
}
