//! Requests to the kernel and its answers, of any family.

use std::{borrow::Cow, io};

use netlink_packet_core::{
    DecodeError, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NetlinkDeserializable,
    NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};

use super::{Family, NetlinkSocket, is_missing, is_unsupported};

/// A request that failed.
#[derive(Debug, thiserror::Error)]
#[error("{doing}")]
pub struct RequestError {
    /// What it was to do, such as `adding the default route`.
    pub doing: Cow<'static, str>,
    /// What the kernel said.
    pub source: io::Error,
}

/// A request, and what it does, for the message of its failure.
#[derive(Debug)]
pub struct Request<M> {
    /// What it does, such as `adding the default route`.
    pub doing: Cow<'static, str>,
    /// The message, without its number and without the flags of every request.
    pub message: NetlinkMessage<M>,
    /// Which refusal is no failure.
    pub accepts: Accepts,
}

/// Which refusals of the kernel are none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accepts {
    /// Every refusal is one.
    Success,
    /// What was to be removed may be gone.
    Missing,
    /// What was to be switched off may be unknown to the kernel.
    Unsupported,
    /// What was to be added may be there.
    Existing,
}

impl Accepts {
    fn accepts(self, error: &io::Error) -> bool {
        match self {
            Self::Success => false,
            Self::Missing => is_missing(error),
            Self::Unsupported => is_unsupported(error),
            Self::Existing => error.kind() == io::ErrorKind::AlreadyExists,
        }
    }
}

/// How the kernel answers a list of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answers {
    /// One by one: each is done or not.
    Each,
    /// All or nothing: the first and the last of the list are the brackets of a
    /// transaction, and have no answer of their own unless all of it fails.
    Transaction,
}

/// A socket in one namespace, for messages of one family.
#[derive(Debug)]
pub struct Kernel {
    socket: NetlinkSocket,
}

impl Kernel {
    /// Opens a socket in this thread's namespace.
    pub fn here(family: Family) -> Result<Self, RequestError> {
        let socket = NetlinkSocket::open(family)
            .map_err(|source| RequestError { doing: "opening a netlink socket".into(), source })?;
        Ok(Self { socket })
    }

    /// Sends all of `requests`, if there are any, at once and returns when the kernel has acted on
    /// them.
    pub fn apply<M>(&self, requests: Vec<Request<M>>, answers: Answers) -> Result<(), RequestError>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        let count = requests.len();
        if count == 0 {
            // An empty message is an error.
            return Ok(());
        }
        let bracket = |at: usize| answers == Answers::Transaction && (at == 0 || at + 1 == count);
        let mut waiting = Vec::with_capacity(count);
        let mut bytes = Vec::new();
        for (at, Request { doing, mut message, accepts }) in requests.into_iter().enumerate() {
            let ack = if bracket(at) { 0 } else { NLM_F_ACK };
            message.header.flags |= NLM_F_REQUEST | ack;
            message.header.sequence_number = sequence(at);
            append(&mut bytes, message);
            waiting.push((doing, accepts, bracket(at)));
        }
        let said = |source| RequestError { doing: "telling the kernel".into(), source };
        let no_answer = |source| RequestError { doing: "waiting for the kernel".into(), source };
        self.socket.send(&bytes).map_err(said)?;
        let mut left = waiting.iter().filter(|(_, _, is_bracket)| !is_bracket).count();
        let mut first_error: Option<(usize, io::Error)> = None;
        while left > 0 {
            for answer in self.receive::<M>().map_err(no_answer)? {
                let (sequence, NetlinkPayload::Error(error)) =
                    (answer.header.sequence_number, answer.payload)
                else {
                    continue;
                };
                let at = usize::try_from(sequence).unwrap_or(0).saturating_sub(1);
                let Some((_, accepts, is_bracket)) = waiting.get(at) else { continue };
                let refused = error.code.map(|_| error.to_io());
                if let Some(source) = refused.filter(|source| !accepts.accepts(source))
                    && first_error.as_ref().is_none_or(|(earlier, _)| at < *earlier)
                {
                    first_error = Some((at, source));
                }
                // Of a transaction that failed as a whole nothing else need be said.
                left = if *is_bracket { 0 } else { left - 1 };
            }
        }
        match first_error {
            None => Ok(()),
            Some((at, source)) => {
                let doing = waiting.swap_remove(at).0;
                Err(RequestError { doing, source })
            }
        }
    }

    /// Asks for one thing. `None`: there is no such thing.
    pub fn get<M>(
        &self,
        doing: &'static str,
        message: NetlinkMessage<M>,
    ) -> Result<Option<M>, RequestError>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        match self.ask(message, NLM_F_ACK, Some) {
            Ok(mut found) => Ok(found.pop()),
            Err(source) if Accepts::Missing.accepts(&source) => Ok(None),
            Err(source) => Err(RequestError { doing: doing.into(), source }),
        }
    }

    /// Asks for all things of a kind.
    pub fn list<M>(
        &self,
        doing: &'static str,
        message: NetlinkMessage<M>,
    ) -> Result<Vec<M>, RequestError>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        self.list_some(doing, message, Some)
    }

    /// Asks for all things of a kind and returns what `keep` makes of them: there may be many, of
    /// which few are wanted.
    pub fn list_some<M, T>(
        &self,
        doing: &'static str,
        message: NetlinkMessage<M>,
        keep: impl Fn(M) -> Option<T>,
    ) -> Result<Vec<T>, RequestError>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        self.ask(message, NLM_F_DUMP, keep)
            .map_err(|source| RequestError { doing: doing.into(), source })
    }

    fn ask<M, T>(
        &self,
        mut message: NetlinkMessage<M>,
        flags: u16,
        keep: impl Fn(M) -> Option<T>,
    ) -> io::Result<Vec<T>>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        message.header.flags |= NLM_F_REQUEST | flags;
        message.header.sequence_number = sequence(0);
        let mut bytes = Vec::new();
        append(&mut bytes, message);
        self.socket.send(&bytes)?;
        let mut found = Vec::new();
        loop {
            for answer in self.receive::<M>()? {
                if let NetlinkPayload::InnerMessage(message) = answer.payload {
                    found.extend(keep(message));
                } else if let NetlinkPayload::Error(error) = answer.payload {
                    return if error.code.is_some() { Err(error.to_io()) } else { Ok(found) };
                } else if let NetlinkPayload::Done(_) = answer.payload {
                    return Ok(found);
                }
            }
        }
    }

    /// Returns the messages of the next datagram.
    fn receive<M: NetlinkDeserializable>(&self) -> io::Result<Vec<NetlinkMessage<M>>> {
        parsed(&self.socket.receive()?)
    }
}

/// Returns the messages of a datagram.
pub fn parsed<M: NetlinkDeserializable>(datagram: &[u8]) -> io::Result<Vec<NetlinkMessage<M>>> {
    let invalid = |why: DecodeError| io::Error::new(io::ErrorKind::InvalidData, why);
    let mut messages = Vec::new();
    let mut rest = datagram;
    while !rest.is_empty() {
        let header = NetlinkBuffer::new_checked(rest).map_err(invalid)?;
        let length = usize::try_from(header.length()).unwrap_or(usize::MAX).min(rest.len());
        let (message, _) = rest.split_at(length);
        messages.push(NetlinkMessage::deserialize(message).map_err(invalid)?);
        rest = rest.get(length.next_multiple_of(ALIGNMENT)..).unwrap_or_default();
    }
    Ok(messages)
}

/// Messages begin at multiples of this (`NLMSG_ALIGNTO`).
const ALIGNMENT: usize = 4;

/// Zero is the number of the kernel's own notifications.
fn sequence(at: usize) -> u32 {
    u32::try_from(at + 1).expect("no list of requests is as long")
}

fn append<M: NetlinkSerializable>(bytes: &mut Vec<u8>, mut message: NetlinkMessage<M>) {
    message.finalize();
    let at = bytes.len();
    bytes.resize((at + message.buffer_len()).next_multiple_of(ALIGNMENT), 0);
    message.serialize(&mut bytes[at..]);
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::RouteNetlinkMessage;

    use super::*;

    #[test]
    fn no_requests_are_no_error() {
        let kernel = Kernel::here(Family::Route).unwrap();
        kernel.apply::<RouteNetlinkMessage>(Vec::new(), Answers::Each).unwrap();
    }
}
