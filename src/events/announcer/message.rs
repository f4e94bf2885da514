//! What the daemon and the announcer say to each other: a line of words a message.

/// The longest message. A name has at most 63 characters.
pub(super) const MESSAGE_MAX_BYTES: usize = 1024;

/// What the daemon says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Order {
    /// The first: the name that each thread has to look up, and the files of a sandbox.
    Register { name: String, files: Vec<String> },
    /// Touch a file.
    Touch { number: u64, inode: u64, path: String },
    /// Remove a directory.
    Remove { number: u64, inode: u64, name: String },
}

/// What the announcer says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    /// All threads have registered.
    Ready,
    /// It was done, or what was meant is no longer there.
    Done { number: u64 },
    /// It could not be done.
    Failed { number: u64, why: String },
}

impl Order {
    pub(super) fn text(&self) -> String {
        match self {
            Self::Register { name, files } => format!("register {name} {}", files.join(" ")),
            Self::Touch { number, inode, path } => format!("touch {number} {inode} {path}"),
            Self::Remove { number, inode, name } => format!("remove {number} {inode} {name}"),
        }
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let verb = words.next()?;
        if verb == "register" {
            let name = words.next()?.to_owned();
            return Some(Self::Register { name, files: words.map(str::to_owned).collect() });
        }
        let (number, inode) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        let path = words.next().filter(|path| !path.is_empty())?.to_owned();
        if words.next().is_some() {
            return None;
        }
        match verb {
            "touch" => Some(Self::Touch { number, inode, path }),
            "remove" => Some(Self::Remove { number, inode, name: path }),
            _ => None,
        }
    }
}

impl Answer {
    pub(super) fn text(&self) -> String {
        match self {
            Self::Ready => "ready".to_owned(),
            Self::Done { number } => format!("done {number}"),
            Self::Failed { number, why } => format!("failed {number} {why}"),
        }
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        let (verb, rest) = text.split_once(' ').unwrap_or((text, ""));
        match verb {
            "ready" => Some(Self::Ready),
            "done" => Some(Self::Done { number: rest.parse().ok()? }),
            "failed" => {
                let (number, why) = rest.split_once(' ')?;
                Some(Self::Failed { number: number.parse().ok()?, why: why.to_owned() })
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_read_back_and_nonsense_does_not() {
        let path = "web-1/state".to_owned();
        for order in [
            Order::Register { name: "x".to_owned(), files: vec!["a".to_owned(), "b".to_owned()] },
            Order::Touch { number: 1, inode: 65, path: path.clone() },
            Order::Remove { number: u64::MAX, inode: 64, name: "web-1".to_owned() },
        ] {
            assert_eq!(Order::parse(&order.text()), Some(order));
        }
        for answer in [
            Answer::Ready,
            Answer::Done { number: 7 },
            Answer::Failed { number: 7, why: "no such thing".to_owned() },
        ] {
            assert_eq!(Answer::parse(&answer.text()), Some(answer));
        }
        for text in ["", "touch", "touch 1 2", "touch 1 2 ", "touch 1 2 a b", "dance 1 2 a"] {
            assert_eq!(Order::parse(text), None, "{text}");
        }
        for text in ["", "done", "done x", "failed 3"] {
            assert_eq!(Answer::parse(text), None, "{text}");
        }
    }
}
