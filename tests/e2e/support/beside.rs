//! What is run beside a daemon, by its program.

use std::{
    fs,
    path::Path,
    process::{Output, Stdio},
};

use super::{Host, Setup, process::command};

impl Host {
    /// Runs the doctor for this daemon; returns its report.
    pub(crate) fn doctor(&self) -> String {
        let mut doctor = command(env!("CARGO_BIN_EXE_dozed"));
        let output = doctor.args(["doctor", "--config"]).arg(self.config_file()).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a second daemon with the same configuration to its end.
    pub(crate) fn second_start(&self) -> Output {
        let mut run = command(env!("CARGO_BIN_EXE_dozed"));
        run.args(["run", "--log", "error", "--config"]).arg(self.config_file());
        run.stdin(Stdio::null()).output().unwrap()
    }

    /// Runs a second daemon to its end that has only the mount in common with this one.
    pub(crate) fn start_beside(&self, setup: &Setup, store: &Path, runtime: &Path) -> Output {
        self.start_another(setup, self.mount(), store, runtime)
    }

    /// Runs a second daemon to its end that has these directories.
    pub(crate) fn start_another(
        &self,
        setup: &Setup,
        mount: &Path,
        store: &Path,
        runtime: &Path,
    ) -> Output {
        let file = self.config_file().with_file_name("beside.toml");
        fs::write(&file, setup.document(mount, store, runtime)).unwrap();
        let mut run = command(env!("CARGO_BIN_EXE_dozed"));
        run.args(["run", "--log", "error", "--config"]).arg(file);
        run.stdin(Stdio::null()).output().unwrap()
    }
}
