//! The user ids that are kept for sandboxes.

use std::{fmt, str::FromStr};

/// Those below are of the system and its services, on every Linux.
const UID_MIN: u32 = 1000;
/// `nobody`: whoever cannot be named in a namespace or over a network.
const NOBODY: u32 = 65_534;
/// Means "no change" to the kernel, in the width of today and in the one of long ago.
const NOT_IDS: [u32; 2] = [65_535, u32::MAX];

/// A range of user ids, and of the groups of the same numbers, which nothing else on the
/// host uses: each sandbox gets one of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Users {
    first: u32,
    last: u32,
}

/// Why a text is no range of user ids.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UsersError {
    /// It is written in another way.
    #[error("write it as \"2010000000-2109999999\", the first and the last user id")]
    Form,
    /// It ends before it begins.
    #[error("its last user id is below its first")]
    Empty,
    /// It has ids that are no sandbox's.
    #[error("user ids below {UID_MIN} belong to the system")]
    System,
    /// It has an id that means something else.
    #[error("{id} cannot be a user id; write a range without it")]
    Special {
        /// The id.
        id: u32,
    },
}

impl Users {
    /// Says whether `uid` is one of them.
    #[must_use]
    pub fn contains(self, uid: u32) -> bool {
        (self.first..=self.last).contains(&uid)
    }

    /// Returns the first of them that is not `taken`, from a place on that `hint` leads to,
    /// so that who comes with ever higher hints need not look at many.
    #[must_use]
    pub fn free(self, hint: u64, taken: impl Fn(u32) -> bool) -> Option<u32> {
        let size = u64::from(self.last - self.first) + 1;
        let ids = (0..size).map(|step| self.nth((hint % size + step) % size));
        ids.into_iter().find(|uid| !taken(*uid))
    }

    fn nth(self, place: u64) -> u32 {
        let place = u32::try_from(place).expect("a range of ids has at most 2^32");
        self.first + place
    }
}

impl Default for Users {
    /// A range that Linux systems leave alone: above those that directories of users are
    /// mapped to, and in one that systemd's table of ids has as unused.
    fn default() -> Self {
        Self { first: 2_010_000_000, last: 2_109_999_999 }
    }
}

impl FromStr for Users {
    type Err = UsersError;

    fn from_str(text: &str) -> Result<Self, UsersError> {
        let (first, last) = text.split_once('-').ok_or(UsersError::Form)?;
        let id = |text: &str| {
            let plain = text.bytes().all(|byte| byte.is_ascii_digit());
            text.parse().ok().filter(|_| plain).ok_or(UsersError::Form)
        };
        let (first, last) = (id(first.trim())?, id(last.trim())?);
        if last < first {
            return Err(UsersError::Empty);
        }
        if first < UID_MIN {
            return Err(UsersError::System);
        }
        let users = Self { first, last };
        match NOT_IDS.into_iter().chain([NOBODY]).find(|id| users.contains(*id)) {
            Some(id) => Err(UsersError::Special { id }),
            None => Ok(users),
        }
    }
}

impl fmt::Display for Users {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_range_is_read_as_it_is_written() {
        let users: Users = "1000-1000".parse().unwrap();
        assert!(users.contains(1000) && !users.contains(1001) && !users.contains(999));
        assert_eq!(Users::default().to_string().parse(), Ok(Users::default()));
        assert_eq!("65536 - 4294967294".parse::<Users>().unwrap().to_string(), "65536-4294967294");
    }

    #[test]
    fn what_is_no_range_of_users_is_told_why() {
        for (text, says) in [
            ("", "write it as"),
            ("2000", "write it as"),
            ("2000-", "write it as"),
            ("+2000-3000", "write it as"),
            ("2000-4294967296", "write it as"),
            ("3000-2000", "its last user id is below its first"),
            ("0-2000", "user ids below 1000 belong to the system"),
            ("999-2000", "user ids below 1000 belong to the system"),
            ("2000-65534", "65534 cannot be a user id"),
            ("65535-70000", "65535 cannot be a user id"),
            ("70000-4294967295", "4294967295 cannot be a user id"),
        ] {
            let error = text.parse::<Users>().unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn each_gets_one_of_its_own_until_there_is_none() {
        let users: Users = "2000-2004".parse().unwrap();
        let mut taken = HashSet::new();
        for (hint, want) in [(7, 2002), (2, 2003), (7, 2004), (7, 2000), (7, 2001)] {
            let uid = users.free(hint, |uid| taken.contains(&uid)).unwrap();
            assert_eq!(uid, want);
            assert!(taken.insert(uid));
        }
        assert_eq!(users.free(7, |uid| taken.contains(&uid)), None);
        taken.remove(&2001);
        assert_eq!(users.free(3, |uid| taken.contains(&uid)), Some(2001));
    }

    #[test]
    fn a_million_ask_once_each() {
        let users = Users::default();
        let taken: HashSet<u32> = (1..=1_000_000).map(|row| users.nth(row)).collect();
        let asked = std::cell::Cell::new(0);
        let uid = users.free(1_000_001, |uid| {
            asked.set(asked.get() + 1);
            taken.contains(&uid)
        });
        assert_eq!((uid, asked.get()), (Some(2_011_000_001), 1));
    }
}
