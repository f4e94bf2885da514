//! Looks at the host and says what `dozed` can do here, and how to mend what it cannot.
//!
//! It only looks: nothing is started, mounted or left behind, and it works without a
//! running daemon. Each check is one line of the report, in [`checks`].

use std::fmt;

use crate::config::Config;

mod checks;

/// What a host was found to be good for.
#[derive(Debug, Clone)]
pub struct Report {
    findings: Vec<Finding>,
}

/// What one check found.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Finding {
    verdict: Verdict,
    subject: &'static str,
    /// One sentence, and how to mend it where it is not well.
    says: String,
}

/// How well it is with one subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// All is well.
    Well,
    /// Sandboxes run, but something is missing.
    Lacking,
    /// No sandbox can run.
    Failed,
}

/// Looks at this host with the eyes of a daemon that has these settings.
#[must_use]
pub fn examine(config: &Config) -> Report {
    let networks = checks::networks(&config.network.range);
    Report {
        findings: [
            checks::kernel(),
            checks::user(),
            checks::fuse(),
            checks::qemu(&config.vmm),
            checks::cloud_hypervisor(&config.vmm),
            checks::virtualisation(),
            checks::store(&config.store),
            checks::space(&config.store, config.template.memory_bytes),
            checks::reflink(&config.store),
            checks::cgroups(),
            checks::tun(),
        ]
        .into_iter()
        .chain(checks::daemon(&config.mount))
        .chain(networks)
        .collect(),
    }
}

impl Report {
    /// Says whether sandboxes can run here.
    #[must_use]
    pub fn sandboxes_can_run(&self) -> bool {
        !self.any(Verdict::Failed)
    }

    fn any(&self, verdict: Verdict) -> bool {
        self.findings.iter().any(|finding| finding.verdict == verdict)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            writeln!(f, "{finding}")?;
        }
        let summary = if self.any(Verdict::Failed) {
            "Sandboxes cannot run here until each FAIL is mended."
        } else if self.any(Verdict::Lacking) {
            "Sandboxes can run here, with what the warnings say."
        } else {
            "Sandboxes can run here."
        };
        writeln!(f, "\n{summary}")
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self.verdict {
            Verdict::Well => "ok",
            Verdict::Lacking => "warn",
            Verdict::Failed => "FAIL",
        };
        write!(f, "{word:<4}  {:<16}  {}", self.subject, self.says)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(verdicts: &[Verdict]) -> Report {
        let finding = |verdict: &Verdict| Finding {
            verdict: *verdict,
            subject: "fuse",
            says: "so it is".to_owned(),
        };
        Report { findings: verdicts.iter().map(finding).collect() }
    }

    #[test]
    fn one_failure_is_enough_and_a_warning_is_not() {
        assert!(report(&[Verdict::Well, Verdict::Lacking]).sandboxes_can_run());
        let failed = report(&[Verdict::Well, Verdict::Failed, Verdict::Lacking]);
        assert!(!failed.sandboxes_can_run());
        assert_eq!(
            failed.to_string(),
            "ok    fuse              so it is\n\
             FAIL  fuse              so it is\n\
             warn  fuse              so it is\n\n\
             Sandboxes cannot run here until each FAIL is mended.\n"
        );
    }

    #[test]
    fn every_subject_has_its_line_and_nothing_is_left_behind() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config { store: dir.path().join("not/yet"), ..Config::default() };
        let report = examine(&config);
        let lines = report.to_string();
        for subject in ["kernel", "/dev/fuse", "qemu", "virtualisation", "reflink", "nf_tables"] {
            assert!(lines.contains(subject), "{subject}: {lines}");
        }
        for finding in &report.findings {
            assert!(finding.says.ends_with('.'), "{finding}");
            assert!(!finding.says.contains('\n'), "{finding}");
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
