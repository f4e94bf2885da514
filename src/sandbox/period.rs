//! How long to wait before doing something, or that it is never to be done.

use std::{fmt, str::FromStr, time::Duration};

/// A value of `idle_after` or `delete_after`: `90s`, `5m`, `2h`, `7d`, `never`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Period {
    /// It is not to happen by itself.
    Never,
    /// It happens after this long; whole seconds, more than nought.
    After(Duration),
}

/// Why some text is no period.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a duration; write `90s`, `5m`, `2h`, `7d` or `never`")]
pub struct PeriodError {
    text: String,
}

/// The longest period. A century is as good as never and far from every overflow.
const PERIOD_MAX: Duration = Duration::from_secs(100 * 365 * 86_400);

/// Our units in seconds, the largest first.
const UNITS: [(u64, char); 4] = [(86_400, 'd'), (3_600, 'h'), (60, 'm'), (1, 's')];

impl Period {
    /// Returns the duration, unless it is never.
    #[must_use]
    pub fn duration(self) -> Option<Duration> {
        match self {
            Self::Never => None,
            Self::After(duration) => Some(duration),
        }
    }
}

impl FromStr for Period {
    type Err = PeriodError;

    fn from_str(text: &str) -> Result<Self, PeriodError> {
        // The message is one line, whatever was written.
        let shown = |c: char| if c.is_control() { '?' } else { c };
        let refused = || PeriodError { text: text.chars().take(64).map(shown).collect() };
        if text == "never" {
            return Ok(Self::Never);
        }
        // The library also reads `5M` (months), `1y` and fractions of seconds, which
        // nobody means here.
        let ours = |c: char| c.is_ascii_digit() || UNITS.iter().any(|(_, unit)| *unit == c);
        if !text.chars().all(ours) {
            return Err(refused());
        }
        // It also adds up units that come twice, as in `5m5m`.
        let units: Vec<_> = text.chars().filter(|c| !c.is_ascii_digit()).collect();
        let place = |c: &char| UNITS.iter().position(|(_, unit)| unit == c);
        let is_falling = units.windows(2).all(|pair| place(&pair[0]) < place(&pair[1]));
        if !is_falling {
            return Err(refused());
        }
        match humantime::parse_duration(text) {
            Ok(duration) if duration.subsec_nanos() != 0 || duration.is_zero() => Err(refused()),
            Ok(duration) if duration <= PERIOD_MAX => Ok(Self::After(duration)),
            Ok(_) | Err(_) => Err(refused()),
        }
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::After(duration) = self else {
            return f.write_str("never");
        };
        let seconds = duration.as_secs();
        let (size, unit) = UNITS
            .into_iter()
            .find(|(size, _)| seconds.is_multiple_of(*size))
            .expect("every whole number of seconds is a multiple of one second");
        write!(f, "{}{unit}", seconds / size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn periods_read_back_in_the_form_they_were_written_in() {
        for text in ["90s", "5m", "2h", "7d", "never", "1s", "15m", "36h"] {
            assert_eq!(text.parse::<Period>().map(|p| p.to_string()), Ok(text.to_owned()));
        }
        assert_eq!("1h30m".parse::<Period>().map(|p| p.to_string()), Ok("90m".to_owned()));
    }

    #[test]
    fn other_text_is_refused_with_what_is_accepted() {
        for bad in
            ["", "5", "0s", "5M", "1y", "-5m", "5 m", "5min", "Never", "1.5h", "1ms", "m", "5\nm"]
                .into_iter()
                .chain(["5m5m", "1h1h", "30s5m", "1h5m1h", "1h5", "5mm", "+5m", "h1m"])
        {
            let error = bad.parse::<Period>().expect_err(bad).to_string();
            assert!(error.contains("`90s`, `5m`, `2h`, `7d` or `never`"), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
        assert!("99999999999999999999d".parse::<Period>().is_err());
        assert!("40000d".parse::<Period>().is_err());
    }
}
