//! What counts as activity of a sandbox, and from when on.

use std::{fmt, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use super::Period;

/// All CPUs that a sandbox may have.
const CPU_PERCENT_MAX: u32 = 6400;
/// More than any disk or network that we have heard of.
const BYTES_PER_SECOND_MAX: u64 = 1 << 40;

/// A kind of activity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Signal {
    /// A verb written to `state` that was understood.
    Control,
    /// `touch activity`, or a write to it.
    Touch,
    /// A boot.
    Boot,
    /// A wake.
    Wake,
    /// Guest CPU above the threshold.
    Cpu,
    /// Something typed on the console.
    Console,
    /// An open `awake`.
    Hold,
    /// Bytes of the guest's disks above the threshold.
    Disk,
    /// Bytes of the guest's network above the threshold.
    Network,
}

impl Signal {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Control,
        Self::Touch,
        Self::Boot,
        Self::Wake,
        Self::Cpu,
        Self::Console,
        Self::Hold,
        Self::Disk,
        Self::Network,
    ];

    /// Those that can be told not to count. What came to life just now, or is held, is active
    /// whatever anybody says.
    pub const CHOICE: [Self; 6] =
        [Self::Control, Self::Touch, Self::Console, Self::Cpu, Self::Disk, Self::Network];

    /// Returns the word that the signal goes by.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Touch => "touch",
            Self::Boot => "boot",
            Self::Wake => "wake",
            Self::Cpu => "cpu",
            Self::Console => "console",
            Self::Hold => "hold",
            Self::Disk => "disk",
            Self::Network => "network",
        }
    }
}

/// Which signals count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SignalSet(u16);

impl SignalSet {
    /// The empty set.
    pub const NONE: Self = Self(0);

    /// Returns this set and `signal`.
    #[must_use]
    pub fn with(self, signal: Signal) -> Self {
        Self(self.0 | 1 << signal as u16)
    }

    /// Returns what is in both sets.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Says whether nothing is in it.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Makes a set of `signals`, and those that always count.
    #[must_use]
    pub fn of(signals: &[Signal]) -> Self {
        let always = Signal::ALL.iter().filter(|signal| !Signal::CHOICE.contains(signal));
        Self(always.chain(signals).fold(0, |bits, signal| bits | 1 << *signal as u16))
    }

    /// Says whether `signal` counts.
    #[must_use]
    pub fn contains(self, signal: Signal) -> bool {
        self.0 & 1 << signal as u16 != 0
    }

    fn words(self) -> impl Iterator<Item = &'static str> {
        Signal::CHOICE.into_iter().filter(move |signal| self.contains(*signal)).map(Signal::word)
    }
}

impl fmt::Display for SignalSet {
    /// Lists those that could be told not to count, and do.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.words().collect::<Vec<_>>().join(" "))
    }
}

impl Serialize for SignalSet {
    fn serialize<S: Serializer>(&self, output: S) -> Result<S::Ok, S::Error> {
        output.collect_seq(self.words())
    }
}

impl<'de> Deserialize<'de> for SignalSet {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        let value = toml::Value::deserialize(input)?;
        let quoted = Signal::CHOICE.map(|signal| format!("\"{}\"", signal.word())).join(", ");
        let refused = |given: &toml::Value| {
            D::Error::custom(format!(
                "{given} is not accepted; write a list with any of {quoted}; boots, wakes \
                 and holds always count"
            ))
        };
        let signal = |given: &toml::Value| {
            let known = |signal: &Signal| given.as_str() == Some(signal.word());
            Signal::CHOICE.into_iter().find(known).ok_or_else(|| refused(given))
        };
        let list = value.as_array().ok_or_else(|| refused(&value))?;
        list.iter().map(signal).collect::<Result<Vec<_>, _>>().map(|list| Self::of(&list))
    }
}

/// How long a sandbox stays awake after a wake, at the least, whatever its idle time is.
/// Nought switches this off, and what grows from it too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AwakeMin(pub Duration);

impl AwakeMin {
    const OFF: &str = "off";
}

impl fmt::Display for AwakeMin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_zero() { f.write_str(Self::OFF) } else { Period::After(self.0).fmt(f) }
    }
}

impl Serialize for AwakeMin {
    fn serialize<S: Serializer>(&self, output: S) -> Result<S::Ok, S::Error> {
        output.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for AwakeMin {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        let value = toml::Value::deserialize(input)?;
        let read = |text: &str| match text {
            Self::OFF => Some(Duration::ZERO),
            text => text.parse::<Period>().ok().and_then(Period::duration),
        };
        value.as_str().and_then(read).map(Self).ok_or_else(|| {
            let accepted = "write it as \"10s\" or \"5m\", or \"off\"";
            D::Error::custom(format!("{value} is not accepted; {accepted}"))
        })
    }
}

/// What counts as activity of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Activity {
    /// The use of CPU above which a guest is active, in percent of one CPU of the host.
    pub cpu_percent: u32,
    /// What a guest reads from its disks and writes to them, above which it is active.
    pub disk_bytes_per_second: u64,
    /// What passes a guest's firewall that is a sign of use, above which it is active.
    pub network_bytes_per_second: u64,
    /// Which signals count.
    pub signals: SignalSet,
    /// How long it stays awake after a wake, at the least.
    pub awake_min: AwakeMin,
}

impl Default for Activity {
    fn default() -> Self {
        Self {
            cpu_percent: 5,
            // A guest that does nothing writes some hundred bytes a second, one that logs a
            // line a second some KiB, and one that works does far more than this.
            disk_bytes_per_second: 64 << 10,
            // Whoever types by ssh is above this, and one request over TLS in a tick of 30 s.
            // Who only asks for the time now and then is far below it.
            network_bytes_per_second: 100,
            signals: SignalSet::of(&Signal::CHOICE),
            awake_min: AwakeMin(Duration::from_secs(10)),
        }
    }
}

/// What is said of a sandbox's activity, as the keys of `[activity]`; the rest is as the
/// daemon's own `[activity]` has it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ActivityKeys {
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "cpu_percent")]
    cpu_percent: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "bytes_per_second")]
    disk_bytes_per_second: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "bytes_per_second")]
    network_bytes_per_second: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    signals: Option<SignalSet>,
    #[serde(skip_serializing_if = "Option::is_none")]
    awake_min: Option<AwakeMin>,
}

impl ActivityKeys {
    /// Returns what counts where these keys say nothing but what `base` says.
    #[must_use]
    pub fn over(self, base: Activity) -> Activity {
        Activity {
            cpu_percent: self.cpu_percent.unwrap_or(base.cpu_percent),
            disk_bytes_per_second: self.disk_bytes_per_second.unwrap_or(base.disk_bytes_per_second),
            network_bytes_per_second: self
                .network_bytes_per_second
                .unwrap_or(base.network_bytes_per_second),
            signals: self.signals.unwrap_or(base.signals),
            awake_min: self.awake_min.unwrap_or(base.awake_min),
        }
    }

    /// Returns these keys, and of `base` those that they do not have.
    #[must_use]
    pub fn or(self, base: Self) -> Self {
        Self {
            cpu_percent: self.cpu_percent.or(base.cpu_percent),
            disk_bytes_per_second: self.disk_bytes_per_second.or(base.disk_bytes_per_second),
            network_bytes_per_second: self
                .network_bytes_per_second
                .or(base.network_bytes_per_second),
            signals: self.signals.or(base.signals),
            awake_min: self.awake_min.or(base.awake_min),
        }
    }

    /// Says whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

fn number<'de, D: Deserializer<'de>>(input: D, max: u64) -> Result<u64, D::Error> {
    let value = toml::Value::deserialize(input)?;
    let number = value.as_integer().and_then(|number| u64::try_from(number).ok());
    number.filter(|number| *number <= max).ok_or_else(|| {
        D::Error::custom(format!("`{value}` is not accepted; write a whole number from 0 to {max}"))
    })
}

fn cpu_percent<'de, D: Deserializer<'de>>(input: D) -> Result<Option<u32>, D::Error> {
    let percent = number(input, CPU_PERCENT_MAX.into())?;
    Ok(Some(u32::try_from(percent).expect("it was held against a smaller limit")))
}

fn bytes_per_second<'de, D: Deserializer<'de>>(input: D) -> Result<Option<u64>, D::Error> {
    number(input, BYTES_PER_SECOND_MAX).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ActivityKeys, String> {
        toml::from_str(text).map_err(|error: toml::de::Error| error.message().to_owned())
    }

    #[test]
    fn what_is_not_said_is_as_in_the_base() {
        let keys = parse("cpu_percent = 20\nsignals = [\"touch\"]").unwrap();
        let base = Activity { disk_bytes_per_second: 7, ..Activity::default() };
        let signals = SignalSet::of(&[Signal::Touch]);
        assert_eq!(keys.over(base), Activity { cpu_percent: 20, signals, ..base });
        let template = parse("cpu_percent = 1\nawake_min = \"off\"").unwrap();
        let awake_min = AwakeMin(Duration::ZERO);
        let want = Activity { cpu_percent: 20, signals, awake_min, ..base };
        assert_eq!(keys.or(template).over(base), want);
    }

    #[test]
    fn what_is_said_reads_back() {
        let text = "cpu_percent = 0\ndisk_bytes_per_second = 1\n\
                    network_bytes_per_second = 2\nsignals = [\"touch\", \"cpu\"]\n\
                    awake_min = \"90s\"\n";
        assert_eq!(toml::to_string(&parse(text).unwrap()).unwrap(), text);
        assert_eq!(toml::to_string(&ActivityKeys::default()).unwrap(), "");
        assert_eq!(
            parse("awake_min = \"off\"").map(|keys| toml::to_string(&keys).unwrap()),
            Ok("awake_min = \"off\"\n".to_owned())
        );
    }

    #[test]
    fn what_is_not_accepted_is_told_with_what_is() {
        for (text, says) in [
            ("cpu = 1", "unknown field `cpu`, expected one of `cpu_percent`"),
            ("cpu_percent = 6401", "`6401` is not accepted; write a whole number from 0 to 6400"),
            ("cpu_percent = -1", "write a whole number from 0"),
            ("disk_bytes_per_second = \"1KiB\"", "write a whole number from 0"),
            ("signals = \"cpu\"", "\"cpu\" is not accepted; write a list with any of \"control\""),
            ("signals = [\"cpu\", \"ram\"]", "\"ram\" is not accepted; write a list with any of"),
            ("signals = [\"hold\"]", "\"network\"; boots, wakes and holds always count"),
            ("awake_min = \"never\"", "\"never\" is not accepted; write it as \"10s\" or \"5m\""),
            ("awake_min = \"0s\"", "or \"off\""),
            ("awake_min = 10", "10 is not accepted"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn what_came_to_life_or_is_held_always_counts() {
        let none = SignalSet::of(&[]);
        let counted = Signal::ALL.into_iter().filter(|signal| none.contains(*signal));
        assert!(counted.eq([Signal::Boot, Signal::Wake, Signal::Hold]));
        assert_eq!(none.to_string(), "");
        let all = SignalSet::of(&Signal::CHOICE);
        assert!(Signal::ALL.into_iter().all(|signal| all.contains(signal)));
        assert_eq!(all.to_string(), "control touch console cpu disk network");
    }
}
