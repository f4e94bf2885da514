//! Samples, what they are held against, and the line that says how it went.

use std::{fmt, time::Duration};

/// Durations that were measured alike.
#[derive(Debug, Default)]
pub(crate) struct Samples(Vec<Duration>);

impl Samples {
    pub(crate) fn add(&mut self, sample: Duration) {
        self.0.push(sample);
    }

    pub(crate) fn median(&self) -> Duration {
        self.percentile(50)
    }

    /// Returns the smallest sample that `percent` of all are not above.
    fn percentile(&self, percent: usize) -> Duration {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let rank = (sorted.len() * percent).div_ceil(100).max(1);
        sorted.get(rank - 1).copied().unwrap_or_default()
    }
}

impl fmt::Display for Samples {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [low, middle, high] = [10, 50, 90].map(|percent| shown(self.percentile(percent)));
        write!(f, "{middle} ({low} – {high})")
    }
}

/// How far ours may be from what it is held against.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Bound {
    /// So many times as long.
    Times(f64),
    /// So many times as long, and this much more.
    TimesPlus(f64, Duration),
    /// So many times as long, and no longer than this.
    TimesWithin(f64, Duration),
    /// No longer than this.
    Within(Duration),
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Times(times) => write!(f, "{times:.2} ×"),
            Self::TimesPlus(times, more) => write!(f, "{times:.2} × + {}", shown(*more)),
            Self::TimesWithin(times, most) => write!(f, "{times:.2} ×, {}", shown(*most)),
            Self::Within(most) => f.write_str(&shown(*most)),
        }
    }
}

/// What comes of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Its limit is kept.
    Met,
    /// It is not.
    Missed,
    /// There is nothing here to measure.
    NotHere,
}

impl From<bool> for Verdict {
    /// Says whether a limit is `met`.
    fn from(met: bool) -> Self {
        if met { Self::Met } else { Self::Missed }
    }
}

/// One line of the table.
#[derive(Debug)]
pub(crate) struct Line {
    /// The name of its row, by which it is chosen.
    pub(crate) row: &'static str,
    /// What was measured.
    pub(crate) what: String,
    /// What came out.
    pub(crate) ours: String,
    /// What it is held against, and what came out of that.
    pub(crate) against: String,
    /// How many times the one is the other.
    pub(crate) ratio: String,
    /// What is allowed.
    pub(crate) at_most: String,
    /// Whether it is.
    pub(crate) verdict: Verdict,
}

impl Line {
    /// Holds the median of `ours` against that of `theirs`, which is `whose`.
    pub(crate) fn held_against(
        row: &'static str,
        what: impl Into<String>,
        ours: &Samples,
        (whose, theirs): (&str, &Samples),
        bound: Bound,
    ) -> Self {
        let (median, limit) = (ours.median(), theirs.median());
        let met = match bound {
            Bound::Times(times) => median <= limit.mul_f64(times),
            Bound::TimesPlus(times, more) => median <= limit.mul_f64(times) + more,
            Bound::TimesWithin(times, most) => median <= limit.mul_f64(times) && median <= most,
            Bound::Within(most) => median <= most,
        };
        Self {
            row,
            what: what.into(),
            ours: ours.to_string(),
            against: format!("{whose}: {theirs}"),
            ratio: format!("{:.2} ×", median.as_secs_f64() / limit.as_secs_f64()),
            at_most: bound.to_string(),
            verdict: met.into(),
        }
    }

    /// Says why a row was not measured, which is no failure.
    pub(crate) fn not_here(row: &'static str, why: &str) -> Self {
        Self {
            row,
            what: format!("not here: {why}"),
            ours: String::new(),
            against: String::new(),
            ratio: String::new(),
            at_most: String::new(),
            verdict: Verdict::NotHere,
        }
    }

    /// Holds the median of `ours` against a fixed limit.
    pub(crate) fn within(
        row: &'static str,
        what: impl Into<String>,
        ours: &Samples,
        most: Duration,
    ) -> Self {
        Self {
            row,
            what: what.into(),
            ours: ours.to_string(),
            against: String::new(),
            ratio: String::new(),
            at_most: Bound::Within(most).to_string(),
            verdict: (ours.median() <= most).into(),
        }
    }
}

impl fmt::Display for Line {
    /// A row of a table in Markdown, which also reads well on a terminal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { row, what, ours, against, ratio, at_most, verdict } = self;
        let verdict = match verdict {
            Verdict::Met => "ok",
            Verdict::Missed => "MISSED",
            Verdict::NotHere => "not here",
        };
        write!(f, "| {row} | {what} | {ours} | {against} | {ratio} | {at_most} | {verdict} |")
    }
}

/// What is above the lines.
pub(crate) const HEAD: &str = "\
| row | what | ours | held against | ratio | at most | verdict |
|---|---|---|---|---|---|---|";

/// Shows a duration with three digits and its unit.
fn shown(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    let (value, unit) = match seconds {
        s if s >= 1.0 => (s, "s"),
        s if s >= 1e-3 => (s * 1e3, "ms"),
        s => (s * 1e6, "µs"),
    };
    let decimals = match value {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.decimals$} {unit}")
}
