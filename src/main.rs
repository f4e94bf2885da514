//! The `dozed` program: arguments, logging, the daemon, and the exit code.
//!
//! 0 is success, 1 a failure, reported in one line on standard error, and 2 an invalid command
//! line or configuration.

use std::{
    error::Error,
    fmt,
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
use tracing::{Event, Level, Subscriber, error};
use tracing_subscriber::{
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::{Compact, Format, Writer},
    },
    registry::LookupSpan,
};

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
        Ok(Task::Open { rights }) => match daemon::open(&rights) {
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

/// Prints the error with all its causes in one line.
fn fail(error: &dyn Error, code: u8) -> ExitCode {
    let mut line = format!("dozed: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        line = format!("{line}: {error}");
        cause = error.source();
    }
    writeln!(io::stderr(), "{line}").ok();
    ExitCode::from(code)
}

/// Logs to standard error, in the format of the journal if that is the journal's socket.
fn start_logging(log: &Log) {
    let format = tracing_subscriber::fmt()
        .with_max_level(log.level)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .compact();
    if is_stderr(log.journal.as_deref()) {
        format.event_format(JournalFormat::default()).init();
    } else {
        format.init();
    }
    panic::set_hook(Box::new(|panicked| {
        let thread = thread::current();
        // A panic has two lines, a log message one.
        let panicked = panicked.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        error!(thread = thread.name().unwrap_or("unnamed"), "this is a bug in dozed: {panicked}");
    }));
}

/// The format of the journal: the level as in sd-daemon(3), and fields in the text, because
/// `journalctl` does not show them.
struct JournalFormat(Format<Compact, ()>);

impl Default for JournalFormat {
    fn default() -> Self {
        let format = Format::default().compact().without_time();
        Self(format.with_level(false).with_target(false).with_ansi(false))
    }
}

impl<S, N> FormatEvent<S, N> for JournalFormat
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let priority = match *event.metadata().level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            Level::DEBUG | Level::TRACE => 7,
        };
        write!(writer, "<{priority}>")?;
        self.0.format_event(context, writer, event)
    }
}

/// Returns whether standard error is the socket that `journal` describes.
fn is_stderr(journal: Option<&str>) -> bool {
    let Some(journal) = journal else { return false };
    let metadata = || File::from(io::stderr().as_fd().try_clone_to_owned()?).metadata();
    metadata().is_ok_and(|meta| journal == format!("{}:{}", meta.st_dev(), meta.st_ino()))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Debug, Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_message_of_the_journal_has_level_id_and_error_in_one_line() {
        let written = Written::default();
        let writer = written.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || writer.clone())
            .compact()
            .event_format(JournalFormat::default())
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(id = %"web-1", uid = 7, "created");
            tracing::error!(id = %"web-1", error = "no\u{1b}[31m: disk full", "waking failed");
        });
        let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
        assert_eq!(
            text,
            "<6>created id=web-1 uid=7\n\
             <3>waking failed id=web-1 error=\"no\\u{1b}[31m: disk full\"\n"
        );
    }

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
