//! What is said between a daemon and a process that opens files.

use std::{io, str};

use crate::sys::files::ImageSize;

/// What a message asks that comes with two files, an image and the file to copy it to: `BYTES`,
/// as text. Any other message is a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CopyRequest {
    pub(super) bytes: u64,
}

/// What an opener says of a path, or of a copy. A line of text, and then bytes up to the end of
/// the message.
#[derive(Debug)]
pub(super) enum Answer<'a> {
    /// `opened KIND DEVICE BYTES ALLOCATED_BYTES`, where the kind is `file` or `device`, and the
    /// first bytes of it. The file comes along.
    Opened { is_device: bool, size: ImageSize, start: &'a [u8] },
    /// `copying`: the next piece is being copied.
    Copying,
    /// `copied`: all of it is.
    Copied,
    /// `failed ERRNO`, and a sentence where that is zero.
    Failed(io::Error),
}

impl CopyRequest {
    pub(super) fn bytes(self) -> Vec<u8> {
        self.bytes.to_string().into_bytes()
    }

    pub(super) fn parse(message: &[u8]) -> Option<Self> {
        Some(Self { bytes: str::from_utf8(message).ok()?.parse().ok()? })
    }
}

impl<'a> Answer<'a> {
    pub(super) fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Opened { is_device, size, start } => {
                let ImageSize { device, bytes, allocated_bytes } = size;
                let kind = if *is_device { "device" } else { "file" };
                let head = format!("opened {kind} {device} {bytes} {allocated_bytes}\n");
                [head.as_bytes(), start].concat()
            }
            Self::Copying => b"copying\n".to_vec(),
            Self::Copied => b"copied\n".to_vec(),
            Self::Failed(error) => match error.raw_os_error() {
                Some(errno) => format!("failed {errno}\n").into_bytes(),
                None => format!("failed 0\n{error}").into_bytes(),
            },
        }
    }

    pub(super) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let end = bytes.iter().position(|byte| *byte == b'\n')?;
        let (head, rest) = (str::from_utf8(&bytes[..end]).ok()?, &bytes[end + 1..]);
        let mut words = head.split(' ');
        match words.next()? {
            "opened" => {
                let is_device = match words.next()? {
                    "device" => true,
                    "file" => false,
                    _ => return None,
                };
                let mut number = || words.next()?.parse().ok();
                let (device, bytes, allocated_bytes) = (number()?, number()?, number()?);
                let size = ImageSize { device, bytes, allocated_bytes };
                Some(Self::Opened { is_device, size, start: rest })
            }
            "copying" => Some(Self::Copying),
            "copied" => Some(Self::Copied),
            "failed" => match words.next()?.parse().ok()? {
                0 => {
                    let why = String::from_utf8_lossy(rest).into_owned();
                    Some(Self::Failed(io::Error::new(io::ErrorKind::InvalidInput, why)))
                }
                errno => Some(Self::Failed(io::Error::from_raw_os_error(errno))),
            },
            _ => None,
        }
    }
}
