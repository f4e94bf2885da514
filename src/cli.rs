//! What the command line and the environment ask for.
//!
//! The only room that knows clap, and the only one that reads the environment. It does
//! nothing by itself: it says what is to be done.

use std::{env, ffi::OsString, path::PathBuf};

use clap::{Args, Parser, Subcommand, builder::PossibleValuesParser, builder::TypedValueParser};
use tracing::level_filters::LevelFilter;

use crate::{
    config::{Config, ConfigError},
    sys::{mount::Device, opener::Rights},
};

/// What the program is to do.
#[derive(Debug)]
pub enum Task {
    /// Run the daemon until it is told to stop.
    Run {
        /// Its settings.
        config: Config,
        /// What it is to say.
        log: Log,
    },
    /// Tell inotify of the daemon's changes.
    Announce {
        /// Where the tree is mounted.
        mount: PathBuf,
        /// The number of its device.
        device: Device,
    },
    /// Open the files that somebody named.
    Open {
        /// With whose rights.
        rights: Rights,
    },
    /// Look at the host.
    Doctor {
        /// The settings of the daemon that would run here.
        config: Config,
    },
}

/// What the daemon says of its work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// The least weighty messages to write.
    pub level: LevelFilter,
    /// Device and inode of the journal's socket, `DEVICE:INODE`, where the service manager
    /// connected some of our outputs to it (systemd.exec(5), `$JOURNAL_STREAM`).
    pub journal: Option<String>,
}

/// Why there is nothing to do, or nothing that can be done.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The command line makes no sense, or it asks for help or for the version.
    #[error(transparent)]
    Usage(clap::Error),
    /// The settings are not accepted.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

impl CliError {
    /// Writes a help or usage text to where it belongs, and says whether this was one.
    pub fn print_usage(&self) -> bool {
        let Self::Usage(usage) = self else {
            return false;
        };
        // Where the output is closed nobody is left to tell.
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

/// The exit code for what the user has to mend before trying again.
const USAGE_EXIT: u8 = 2;

#[derive(Parser)]
#[command(
    name = "dozed",
    version,
    about = "Puts idle microVMs to sleep and wakes them again, through a filesystem",
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
        /// The least weighty messages to write
        #[arg(long, value_name = "LEVEL", default_value = "info", value_parser = level_parser())]
        log: LevelFilter,
    },
    /// Tell inotify of changes; the daemon starts this itself
    #[command(hide = true)]
    Announce { mount: PathBuf, device: Device },
    /// Open files that somebody named; the daemon starts this itself
    #[command(hide = true)]
    Open { rights: Rights },
    /// Say what this host can do, and how to mend the rest
    Doctor {
        #[command(flatten)]
        config: ConfigArgument,
    },
}

#[derive(Args)]
struct ConfigArgument {
    /// The settings [default: /etc/dozed.toml if there is one]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Returns what the program was asked to do.
///
/// # Errors
/// `Usage` where the command line makes no sense or asks for a text, `Config` where the
/// settings are not accepted.
pub fn task() -> Result<Task, CliError> {
    #[allow(clippy::disallowed_methods, reason = "this is the room that the ban points to")]
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
        .map(|word| word.parse().expect("each of these words is a level of tracing"))
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
