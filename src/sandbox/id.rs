//! The name of a sandbox.

use std::fmt;

/// The longest id, as for a DNS label (RFC 1035, section 2.3.4).
const ID_MAX_BYTES: usize = 63;

/// The name of a sandbox: a DNS label, `[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?`.
///
/// It has no dot, so that `dozed.*` files never collide with one.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SandboxId(Box<str>);

/// Why some bytes are no id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Longer than 63 bytes.
    #[error("an id has at most 63 characters")]
    TooLong,
    /// Not a DNS label.
    #[error("an id consists of lower-case letters, digits and inner hyphens, such as `web-1`")]
    Malformed,
}

impl SandboxId {
    /// Reads an id as the kernel hands it over, as bytes that may be anything.
    ///
    /// # Errors
    /// `TooLong` past 63 bytes, `Malformed` for whatever else is no DNS label.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, IdError> {
        if bytes.len() > ID_MAX_BYTES {
            return Err(IdError::TooLong);
        }
        let inner = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-';
        let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else {
            return Err(IdError::Malformed);
        };
        if !bytes.iter().all(inner) || *first == b'-' || *last == b'-' {
            return Err(IdError::Malformed);
        }
        let text = std::str::from_utf8(bytes).map_err(|_| IdError::Malformed)?;
        Ok(Self(text.into()))
    }

    /// Returns the id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::str::FromStr for SandboxId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        Self::from_bytes(text.as_bytes())
    }
}

impl fmt::Display for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dns_labels_are_ids() {
        let longest = "a".repeat(63);
        for good in ["a", "0", "web-1", "a--b", "1-a", longest.as_str()] {
            assert_eq!(good.parse::<SandboxId>().map(|id| id.to_string()), Ok(good.to_owned()));
        }
    }

    #[test]
    fn everything_else_is_refused() {
        for bad in ["", "-", "-a", "a-", "A", "a.b", "dozed.list", "a_b", "a b", "é", "a\n", "."] {
            assert_eq!(bad.parse::<SandboxId>(), Err(IdError::Malformed), "{bad:?}");
        }
        assert_eq!(SandboxId::from_bytes(b"\xff\xfe"), Err(IdError::Malformed));
        assert_eq!(SandboxId::from_bytes(&[b'a'; 64]), Err(IdError::TooLong));
    }
}
