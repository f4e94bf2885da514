//! The `dozed` program: arguments, logging, the daemon, and the exit code.
//!
//! 0 is success, 1 a failure that one line on standard error tells, and 2 a command line
//! or configuration that has to be mended.

use std::{
    error::Error,
    fs::File,
    io::{self, IsTerminal, Write},
    os::{fd::AsFd, linux::fs::MetadataExt},
    panic,
    process::ExitCode,
    thread,
};

use dozed::{
    cli::{self, Log, Task},
    daemon, doctor,
};
use tracing::error;
use tracing_subscriber::{layer::SubscriberExt, util::SubscriberInitExt};

/// The exit code for what failed.
const FAILURE_EXIT: u8 = 1;

fn main() -> ExitCode {
    match cli::task() {
        Ok(Task::Run { config, log }) => {
            start_logging(&log);
            match daemon::run(config) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(&error, FAILURE_EXIT),
            }
        }
        Ok(Task::Announce { mount, device }) => match daemon::announce(mount, device) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error, FAILURE_EXIT),
        },
        Ok(Task::Doctor { config }) => {
            let report = doctor::examine(&config);
            let printed = write!(io::stdout(), "{report}");
            match printed {
                Ok(()) if report.sandboxes_can_run() => ExitCode::SUCCESS,
                Ok(()) => ExitCode::from(FAILURE_EXIT),
                Err(error) => fail(&error, FAILURE_EXIT),
            }
        }
        Err(error) if error.print_usage() => ExitCode::from(error.exit_code()),
        Err(error) => fail(&error, error.exit_code()),
    }
}

/// Tells the error with all its causes in one line.
fn fail(error: &dyn Error, code: u8) -> ExitCode {
    let mut line = format!("dozed: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        line = format!("{line}: {error}");
        cause = error.source();
    }
    // Where standard error is closed the exit code has to do.
    writeln!(io::stderr(), "{line}").ok();
    ExitCode::from(code)
}

/// Sends messages to the journal if standard error is connected to it, so that they keep
/// their fields, and otherwise to standard error.
fn start_logging(log: &Log) {
    let journal =
        is_stderr(log.journal.as_deref()).then(tracing_journald::layer).and_then(Result::ok);
    if let Some(journal) = journal {
        tracing_subscriber::registry().with(log.level).with(journal).init();
    } else {
        tracing_subscriber::fmt()
            .with_max_level(log.level)
            .with_writer(io::stderr)
            .with_ansi(io::stderr().is_terminal())
            .with_target(false)
            .compact()
            .init();
    }
    panic::set_hook(Box::new(|panicked| {
        let thread = thread::current();
        error!(
            thread = thread.name().unwrap_or("unnamed"),
            "a promise of our own code was broken: {panicked}"
        );
    }));
}

/// Says whether standard error is the socket that `journal` describes.
fn is_stderr(journal: Option<&str>) -> bool {
    let Some(journal) = journal else { return false };
    let metadata = || File::from(io::stderr().as_fd().try_clone_to_owned()?).metadata();
    metadata().is_ok_and(|meta| journal == format!("{}:{}", meta.st_dev(), meta.st_ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_journal_is_used_only_where_standard_error_is_its_socket() {
        let meta = std::fs::metadata("/proc/self/fd/2").unwrap();
        let ours = format!("{}:{}", meta.st_dev(), meta.st_ino());
        let other = format!("{}:{}", meta.st_dev(), meta.st_ino() + 1);
        assert!(is_stderr(Some(&ours)));
        assert!(!is_stderr(Some(&other)));
        assert!(!is_stderr(Some("")));
        assert!(!is_stderr(None));
    }
}
