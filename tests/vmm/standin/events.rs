//! The event monitor: JSON objects with an empty line behind each.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    sync::Mutex,
};

use dozed::sys::clock::Stopwatch;
use serde_json::json;

use crate::arguments::Target;

/// Where events go, if anywhere.
#[derive(Debug)]
pub(crate) struct Monitor {
    /// A leaf lock: held for one write.
    file: Option<Mutex<File>>,
    since: Stopwatch,
}

impl Monitor {
    /// Opens the file, empty.
    pub(crate) fn open(target: Option<&Target>) -> Result<Self, String> {
        let file = match target {
            None => None,
            Some(Target::Fd(number)) => Some(File::from(Target::inherited(*number)?)),
            Some(Target::Path(path)) => {
                let file = OpenOptions::new().write(true).create(true).truncate(true).open(path);
                Some(file.map_err(|error| format!("Error doing event monitor I/O: {error}"))?)
            }
        };
        Ok(Self { file: file.map(Mutex::new), since: Stopwatch::start() })
    }

    /// Tells of an event. What cannot be written is lost.
    pub(crate) fn tell(&self, source: &str, event: &str) {
        let Some(file) = &self.file else {
            return;
        };
        let at = self.since.elapsed();
        let told = json!({
            "timestamp": { "secs": at.as_secs(), "nanos": at.subsec_nanos() },
            "source": source,
            "event": event,
            "properties": null,
        });
        let text = serde_json::to_string_pretty(&told).expect("it is JSON");
        let mut file = file.lock().expect("nobody panics with it");
        file.write_all(format!("{text}\n\n").as_bytes()).ok();
    }
}
