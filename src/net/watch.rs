//! Notifications of the kernel about changes of what is ours on the host.
//!
//! They only say when to look: what is there is then compared with what is to be. A host's
//! firewall and links change all the time, so what is not about a name, an address or a table
//! of ours is passed over. Every IPv4 address of the host is about us, as guests are not to
//! reach it, and so is whether the host forwards.

use std::thread::{self, JoinHandle};

use netlink_packet_core::{
    DecodeError, NetlinkDeserializable, NetlinkHeader, NetlinkPayload, NlasIterator,
};
use netlink_packet_route::{
    RouteNetlinkMessage,
    route::{RouteAddress, RouteAttribute},
};

use super::{Changed, Error, firewall, link};
use crate::{
    sandbox::network::AddressPlan,
    sync::Arc,
    sys::netlink::{Family, Notification, Notifications, parsed},
};

/// Links, IPv4 addresses, IPv4 routes and settings of IPv4: the bits of groups 1, 5, 7 and 24
/// (linux/rtnetlink.h).
const ROUTE_GROUPS: u32 = 1 | 1 << 4 | 1 << 6 | 1 << 23;
/// Tables and what is in them: the bit of group 7 (linux/netfilter/nfnetlink.h).
const FIREWALL_GROUPS: u32 = 1 << 6;
/// How the names of all devices and links of ours begin.
const NAMES: [&str; 2] = ["dz", "dozed"];

/// The thread that listens for changes, until this is dropped.
#[derive(Debug)]
pub(super) struct Watch {
    notifications: Arc<Notifications>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Has `changed` be called for each change in the namespace of this thread.
    ///
    /// # Errors
    /// Where the kernel does not tell, or there can be no thread.
    pub(super) fn start(plan: AddressPlan, changed: Arc<Changed>) -> Result<Self, Error> {
        let groups = [(Family::Route, ROUTE_GROUPS), (Family::Netfilter, FIREWALL_GROUPS)];
        let notifications = Notifications::listen(&groups)
            .map_err(Error::host("listening for changes of the host's network"))?;
        let notifications = Arc::new(notifications);
        let listening = Arc::clone(&notifications);
        let thread = thread::Builder::new()
            .name("dozed-netwatch".to_owned())
            .spawn(move || listen(&listening, plan, changed.as_ref()))
            .map_err(Error::host("starting the thread that listens for changes"))?;
        Ok(Self { notifications, thread: Some(thread) })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.notifications.stop();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
        {
            // A panic was reported where it happened.
            let _ended = thread.join();
        }
    }
}

fn listen(notifications: &Notifications, plan: AddressPlan, changed: &Changed) {
    let table = firewall::host_table(&plan);
    loop {
        let is_ours = match notifications.wait() {
            Ok(Notification::Stop) => return,
            Ok(Notification::Lost) => true,
            Ok(Notification::Messages(Family::Netfilter, bytes)) => {
                bytes.windows(table.len()).any(|part| part == table.as_bytes())
            }
            Ok(Notification::Messages(Family::Route, bytes)) => is_of_ours(&plan, &bytes),
            Err(error) => {
                tracing::error!(%error, "changes of the host's network are noticed only at ticks");
                return;
            }
        };
        if is_ours {
            changed();
        }
    }
}

fn is_of_ours(plan: &AddressPlan, bytes: &[u8]) -> bool {
    // What we cannot read may be about anything.
    let Ok(messages) = parsed::<Change>(bytes) else { return true };
    messages.into_iter().any(|message| {
        let NetlinkPayload::InnerMessage(message) = message.payload else { return false };
        match message {
            Change::Route(message) => is_about(plan, message),
            Change::Forwarding => true,
            Change::OtherSetting => false,
        }
    })
}

fn is_about(plan: &AddressPlan, message: RouteNetlinkMessage) -> bool {
    if let RouteNetlinkMessage::NewLink(message) | RouteNetlinkMessage::DelLink(message) = message {
        let link = link::as_link(RouteNetlinkMessage::NewLink(message));
        return link.is_some_and(|link| NAMES.iter().any(|name| link.name.starts_with(name)));
    }
    if let RouteNetlinkMessage::NewRoute(message) | RouteNetlinkMessage::DelRoute(message) = message
    {
        return message.attributes.iter().any(|it| {
            matches!(it, RouteAttribute::Destination(RouteAddress::Inet(to))
                if plan.range().contains(to))
        });
    }
    matches!(message, RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::DelAddress(_))
}

/// A message of the groups that are listened to.
#[derive(Debug)]
enum Change {
    Route(RouteNetlinkMessage),
    /// Whether the host, or a link of it, forwards has changed.
    Forwarding,
    /// Another setting has, or a link is new or gone with all of its own.
    OtherSetting,
}

impl NetlinkDeserializable for Change {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        const NEW_SETTINGS: u16 = 80; // RTM_NEWNETCONF
        const SETTINGS_GONE: u16 = 81; // RTM_DELNETCONF
        const HEADER_BYTES: usize = 4;
        const IFINDEX: u16 = 1;
        const FORWARDING: u16 = 2;
        if header.message_type == SETTINGS_GONE {
            return Ok(Self::OtherSetting);
        }
        if header.message_type != NEW_SETTINGS {
            return RouteNetlinkMessage::deserialize(header, payload).map(Self::Route);
        }
        let attributes = payload.get(HEADER_BYTES..).unwrap_or_default();
        let kinds = NlasIterator::new(attributes)
            .map(|attribute| attribute.map(|attribute| attribute.kind()))
            .collect::<Result<Vec<_>, _>>()?;
        // It has what has changed, and of which link.
        let others = kinds.iter().filter(|kind| ![IFINDEX, FORWARDING].contains(kind)).count();
        let is_change = kinds.contains(&FORWARDING) && others == 0;
        Ok(if is_change { Self::Forwarding } else { Self::OtherSetting })
    }
}
