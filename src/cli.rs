//! Parses the command line and the environment.
//!
//! The only room that uses clap or reads the environment.

use std::{env, ffi::OsString, path::PathBuf};

use clap::{Args, Parser, Subcommand, builder::PossibleValuesParser, builder::TypedValueParser};
use tracing::level_filters::LevelFilter;

use crate::{
    config::{Config, ConfigError},
    sys::{mount::Device, opener::Rights},
};

/// What the program does.
#[derive(Debug)]
pub enum Task {
    /// Run the daemon.
    Run {
        /// Its configuration.
        config: Config,
        /// What it logs.
        log: Log,
    },
    /// Trigger inotify events for the daemon.
    Announce {
        /// Where the tree is mounted.
        mount: PathBuf,
        /// Its device number.
        device: Device,
    },
    /// Open files for the daemon.
    Open {
        /// The user whose rights apply.
        rights: Rights,
    },
    /// Examine the host.
    Doctor {
        /// The configuration of the daemon that would run here.
        config: Config,
    },
}

/// What the daemon logs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// The lowest level that is logged.
    pub level: LevelFilter,
    /// `$JOURNAL_STREAM` (systemd.exec(5)): device and inode of the journal's socket.
    pub journal: Option<String>,
}

/// Why there is no task.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The command line is invalid, or asks for help or the version.
    #[error(transparent)]
    Usage(clap::Error),
    /// The configuration is invalid.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

impl CliError {
    /// Prints a help or usage text; returns whether there was one.
    pub fn print_usage(&self) -> bool {
        let Self::Usage(usage) = self else {
            return false;
        };
        usage.print().ok();
        true
    }

    /// Returns the program's exit code.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(usage) => u8::from(usage.use_stderr()) * USAGE_EXIT,
            Self::Config(_) => USAGE_EXIT,
        }
    }
}

/// The exit code for an invalid command line or configuration.
const USAGE_EXIT: u8 = 2;

#[derive(Parser)]
#[command(
    name = "dozed",
    version,
    about = "Puts idle microVMs to sleep and wakes them again, controlled through a file system",
    subcommand_required = true,
    arg_required_else_help = true
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the daemon in the foreground
    Run {
        #[command(flatten)]
        config: ConfigArgument,
        /// The lowest level of messages to log
        #[arg(long, value_name = "LEVEL", default_value = "info", value_parser = level_parser())]
        log: LevelFilter,
    },
    /// Trigger inotify events; the daemon starts this itself
    #[command(hide = true)]
    Announce { mount: PathBuf, device: Device },
    /// Open files; the daemon starts this itself
    #[command(hide = true)]
    Open { rights: Rights },
    /// Check what this host supports, and say how to fix the rest
    Doctor {
        #[command(flatten)]
        config: ConfigArgument,
    },
}

#[derive(Args)]
struct ConfigArgument {
    /// The configuration [default: /etc/dozed.toml if it exists]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Returns the task that the command line asks for.
///
/// # Errors
/// `Usage` when it is invalid or asks for a text, `Config` when the configuration is invalid.
pub fn task() -> Result<Task, CliError> {
    #[allow(clippy::disallowed_methods, reason = "this is the room that may read the environment")]
    let journal = env::var("JOURNAL_STREAM").ok();
    read(env::args_os(), journal)
}

fn read(
    arguments: impl IntoIterator<Item = OsString>,
    journal: Option<String>,
) -> Result<Task, CliError> {
    let arguments = Arguments::try_parse_from(arguments).map_err(CliError::Usage)?;
    match arguments.command {
        Command::Run { config, log } => {
            Ok(Task::Run { config: config.load()?, log: Log { level: log, journal } })
        }
        Command::Announce { mount, device } => Ok(Task::Announce { mount, device }),
        Command::Open { rights } => Ok(Task::Open { rights }),
        Command::Doctor { config } => Ok(Task::Doctor { config: config.load()? }),
    }
}

impl ConfigArgument {
    fn load(self) -> Result<Config, ConfigError> {
        match self.config {
            Some(file) => Config::load(&file),
            None => Config::load_default(),
        }
    }
}

fn level_parser() -> impl TypedValueParser<Value = LevelFilter> {
    PossibleValuesParser::new(["error", "warn", "info", "debug", "trace"])
        .map(|word| word.parse().expect("each word is a level of tracing"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn task(words: &str) -> Result<Task, CliError> {
        read(words.split(' ').map(OsString::from), None)
    }

    #[test]
    fn the_definition_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn the_log_level_is_read_and_what_is_no_level_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.toml");
        std::fs::write(&file, "[limits]\nwakes = 3").unwrap();
        let run = format!("dozed run --config {}", file.display());
        for (more, want) in [
            ("", LevelFilter::INFO),
            (" --log error", LevelFilter::ERROR),
            (" --log trace", LevelFilter::TRACE),
        ] {
            let Ok(Task::Run { config, log }) = task(&format!("{run}{more}")) else {
                panic!("{more} is not read");
            };
            assert_eq!((log.level, config.limits.wakes), (want, 3));
        }
        let error = task(&format!("{run} --log loud")).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("error, warn, info, debug, trace"));
    }

    #[test]
    fn the_announcer_is_told_its_mount_and_device_and_users_are_not_told_of_it() {
        let Ok(Task::Announce { mount, device }) = task("dozed announce /m 0:41") else {
            panic!("it is not read");
        };
        assert_eq!((mount, device), ("/m".into(), Device { major: 0, minor: 41 }));
        for bad in ["41", "0:", "0:x", ":41"] {
            let error = task(&format!("dozed announce /m {bad}")).unwrap_err();
            assert!(error.to_string().contains("MAJOR:MINOR"), "{error}");
        }
        assert!(!task("dozed --help").unwrap_err().to_string().contains("announce"));
    }

    #[test]
    fn an_opener_is_told_whose_rights_it_has_and_users_are_not_told_of_it() {
        for (word, rights) in [
            ("ours", Rights::Ours),
            ("7:8", Rights::Of("7:8".parse().unwrap())),
            ("7:8:9:10", Rights::Of("7:8:9:10".parse().unwrap())),
        ] {
            let Ok(Task::Open { rights: read }) = task(&format!("dozed open {word}")) else {
                panic!("{word} is not read");
            };
            assert_eq!((read.to_string().as_str(), &read), (word, &rights));
        }
        for bad in ["root", "7", "7:", "7:8:x"] {
            task(&format!("dozed open {bad}")).unwrap_err();
        }
        assert!(!task("dozed --help").unwrap_err().to_string().contains("open"));
    }

    #[test]
    fn texts_that_were_asked_for_are_no_failure() {
        for (words, code) in [
            ("dozed --version", 0),
            ("dozed --help", 0),
            ("dozed run --help", 0),
            ("dozed", 2),
            ("dozed sing", 2),
            ("dozed run --config", 2),
            ("dozed run --config /no/such", 2),
            ("dozed doctor --config /no/such", 2),
        ] {
            assert_eq!(task(words).unwrap_err().exit_code(), code, "{words}");
        }
    }
}
