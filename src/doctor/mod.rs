//! Examines the host and reports what dozed supports here, and how to fix the rest.
//!
//! It changes nothing and needs no running daemon. Each check is one line of the report.

use std::fmt;

use crate::config::Config;

mod checks;

/// The findings about a host.
#[derive(Debug, Clone)]
pub struct Report {
    findings: Vec<Finding>,
}

/// What one check found.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Finding {
    verdict: Verdict,
    subject: &'static str,
    /// One sentence; where something is missing, with what to do.
    says: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// Nothing is missing.
    Well,
    /// Sandboxes run, but something is missing.
    Lacking,
    /// No sandbox can run.
    Failed,
}

/// Examines this host for a daemon with this configuration.
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
            checks::template(&config.template),
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
            "Sandboxes cannot run here until each FAIL is fixed."
        } else if self.any(Verdict::Lacking) {
            "Sandboxes can run here. Each warning says what works less well."
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
             Sandboxes cannot run here until each FAIL is fixed.\n"
        );
    }

    #[test]
    fn every_subject_has_its_line_and_nothing_is_left_behind() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config { store: dir.path().join("not/yet"), ..Config::default() };
        let report = examine(&config);
        let lines = report.to_string();
        for subject in ["kernel", "/dev/fuse", "qemu", "virtualisation", "template", "nf_tables"] {
            assert!(lines.contains(subject), "{subject}: {lines}");
        }
        for finding in &report.findings {
            assert!(finding.says.ends_with('.'), "{finding}");
            assert!(!finding.says.contains('\n'), "{finding}");
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
