//! Monitors: they report that an object of ours may have changed on the host.
//!
//! They are level-triggered: a message is only a reason to observe the state. Reports are gathered for a moment and
//! sent once each, so that a burst costs one pass. A lost message becomes [`Notification::Everything`]. Our own changes
//! cause reports too; the resulting pass finds nothing to do, so no loop arises.
//! Never: guesses state from a message, or polls.

use std::collections::BTreeSet;
use std::future::ready;
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use futures::stream::{self, BoxStream, Stream, StreamExt};
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};
use rtnetlink::{MulticastGroup, new_multicast_connection};
use stead_controllers::host::HostError;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::warn;

use super::marks::Scope;
use super::netlink::Netlink;
pub use super::report::Notification;
use super::{link_messages, netfilter_messages};

/// Time in which changes are gathered into one report. It is short against the second within which drift must be
/// noticed, and long against the steps of a reconciler.
const GATHER: Duration = Duration::from_millis(50);
/// Time before a broken socket is opened again.
const REOPEN: Duration = Duration::from_secs(1);
/// Size of a monitor's socket buffer, in bytes. It holds the messages of several hundred interfaces that come or go
/// while a busy host runs others (some ten messages each, 4 KiB of room for each). The kernel's default holds those
/// of ten.
const SOCKET_BYTES: usize = 16 << 20;
/// Limit on reports that wait for the reader. It is fast, and a burst waits in the socket meanwhile.
const REPORTS_MAX: usize = 64;

impl Netlink {
    /// Reports changes of our links and of the rules for their traffic by owner, and those of the host's addresses,
    /// routes and forwarding ([`Notification::Host`]). Runs until the receiver is dropped. The kernel does not report
    /// some changes of a link that is down; it always reports when a link is raised or removed. Rules that this adapter
    /// sets are not reported.
    ///
    /// # Errors
    /// Returns an error when the first socket cannot be opened.
    pub fn monitor(&self) -> Result<mpsc::Receiver<Notification>, HostError> {
        let links = self.clone();
        follow("links", move || links_source(links.clone()))
    }
}

/// Reports changes of the tables named `table`: [`Notification::Nic`] for a removed port rule, otherwise
/// [`Notification::Everything`]. Runs until the receiver is dropped.
///
/// # Errors
/// Returns an error when the first socket cannot be opened.
pub fn monitor_table(table: &str) -> Result<mpsc::Receiver<Notification>, HostError> {
    let table = table.to_owned();
    follow("tables", move || {
        let table = table.clone();
        datagrams(NETLINK_NETFILTER, NFNLGRP_NFTABLES, move |bytes| {
            netfilter_messages::of_table(bytes, &table)
        })
    })
}

/// The messages of a socket, as the objects that they may concern. It ends when the socket breaks.
type Source = BoxStream<'static, Option<Notification>>;

fn follow(
    subject: &'static str,
    open: impl Fn() -> io::Result<Source> + Send + 'static,
) -> Result<mpsc::Receiver<Notification>, HostError> {
    let first = open().map_err(|error| HostError::io("open a monitor of", subject, error))?;
    let (reports, receiver) = mpsc::channel(REPORTS_MAX);
    tokio::spawn(async move {
        let mut source = Some(first);
        loop {
            if let Some(open) = source.take().or_else(|| open().ok()) {
                if gather(&reports, open).await == End::ReaderGone {
                    return;
                }
                warn!(subject, "a monitor lost its socket");
            }
            sleep(REOPEN).await;
        }
    });
    Ok(receiver)
}

fn links_source(links: Netlink) -> io::Result<Source> {
    let groups =
        [MulticastGroup::Link, MulticastGroup::Tc, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv4Route];
    let (mut connection, handle, messages) = new_multicast_connection(&groups)?;
    make_room(connection.socket_mut().socket_mut());
    drop(handle);
    // Driving the connection yields one `None` when its socket breaks.
    let drive = stream::once(async move {
        connection.await;
        None
    });
    let messages = messages.map(|(message, _)| Some(message));
    let both = stream::select(drive, messages);
    let link_events = both.then(move |message| {
        let links = links.clone();
        async move {
            let message = message?;
            match shaped_link(&message) {
                // The answers to our own requests are sent to everybody by older kernels. They would have no end.
                Some(_) if message.header.port_number == links.port_number() => Some(None),
                Some(index) => Some(shaping_notification(&links, index).await),
                None => Some(link_notification(links.scope(), message.payload)),
            }
        }
    });
    // The crate does not know these messages.
    let forwarding_events = datagrams(NETLINK_ROUTE, RTNLGRP_IPV4_NETCONF, |bytes| {
        netfilter_messages::is_forwarding_switched(bytes).then_some(Notification::Host).into_iter().collect()
    })?;
    let all = stream::select(link_events, forwarding_events.map(Some).chain(broken()));
    Ok(all.take_while(|item| ready(item.is_some())).filter_map(ready).boxed())
}

/// Returns the index of the link whose rules for traffic a message is about.
fn shaped_link(message: &NetlinkMessage<RouteNetlinkMessage>) -> Option<u32> {
    let NetlinkPayload::InnerMessage(message) = &message.payload else { return None };
    match message {
        RouteNetlinkMessage::NewQueueDiscipline(message)
        | RouteNetlinkMessage::DelQueueDiscipline(message)
        | RouteNetlinkMessage::NewTrafficFilter(message)
        | RouteNetlinkMessage::DelTrafficFilter(message) => Some(message.header.index.cast_unsigned()),
        _ => None,
    }
}

/// Returns the owner of a link with changed rules for its traffic. The message does not name it.
async fn shaping_notification(links: &Netlink, index: u32) -> Option<Notification> {
    match links.by_index(index).await {
        Ok(link) => link?.owner(links.scope()).map(Notification::Owner),
        Err(_) => Some(Notification::Everything),
    }
}

fn link_notification(scope: &Scope, payload: NetlinkPayload<RouteNetlinkMessage>) -> Option<Notification> {
    match payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(message)) => {
            link_messages::notification(&message, scope)
        }
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(message)) => {
            link_messages::notification(&message, scope).map(|notification| match notification {
                Notification::Owner(uid) => Notification::Gone(uid),
                other => other,
            })
        }
        NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewAddress(_)
            | RouteNetlinkMessage::DelAddress(_)
            | RouteNetlinkMessage::NewRoute(_)
            | RouteNetlinkMessage::DelRoute(_),
        ) => Some(Notification::Host),
        NetlinkPayload::Overrun(_) => Some(Notification::Everything),
        _ => None,
    }
}

const RTNLGRP_IPV4_NETCONF: u32 = 24;
const NFNLGRP_NFTABLES: u32 = 7;
/// Error with which the kernel reports dropped messages.
const ENOBUFS: i32 = 105;

/// Enlarges a socket's buffer for the messages of a burst. A lost message costs a pass over everything, whose cost
/// grows with the number of objects. A socket with less room than requested only loses messages sooner.
fn make_room(socket: &impl AsFd) {
    let _ = rustix::net::sockopt::set_socket_recv_buffer_size_force(socket, SOCKET_BYTES);
}

/// Returns the last item of a source that broke.
fn broken() -> impl Stream<Item = Option<Option<Notification>>> {
    stream::once(ready(None))
}

/// Returns everything that `read` makes of each datagram of a group. It ends when the socket breaks.
fn datagrams(
    protocol: isize,
    group: u32,
    read: impl Fn(&[u8]) -> Vec<Notification> + Send + 'static,
) -> io::Result<Source> {
    let mut socket = TokioSocket::new(protocol)?;
    socket.socket_mut().bind(&SocketAddr::new(0, 0))?;
    make_room(socket.socket_mut());
    socket.socket_mut().add_membership(group)?;
    let notifications = stream::unfold((socket, read), async |(socket, read)| {
        let notifications = match socket.recv_from_full().await {
            Ok((bytes, _)) => read(&bytes),
            Err(error) if error.raw_os_error() == Some(ENOBUFS) => vec![Notification::Everything],
            Err(_) => return None,
        };
        Some((notifications, (socket, read)))
    });
    Ok(notifications.flat_map(|all| stream::iter(all.into_iter().map(Some))).boxed())
}

/// Adds a report. For a link the last report counts: a link that is removed is changed first, and its observer has
/// nothing to observe any more.
fn note(notifications: &mut BTreeSet<Notification>, item: Notification) {
    match &item {
        Notification::Gone(uid) => drop(notifications.remove(&Notification::Owner(uid.clone()))),
        Notification::Owner(uid) => drop(notifications.remove(&Notification::Gone(uid.clone()))),
        Notification::Nic(_) | Notification::Lane(_) | Notification::Host | Notification::Everything => {}
    }
    notifications.insert(item);
}

#[derive(Debug, PartialEq, Eq)]
enum End {
    ReaderGone,
    SourceGone,
}

/// Sends the gathered reports of the source until either end is gone.
async fn gather(reports: &mpsc::Sender<Notification>, mut source: Source) -> End {
    let mut notifications = BTreeSet::new();
    let mut due: Option<Instant> = None;
    loop {
        // Dropping any arm loses nothing: the source keeps what it has not yielded.
        tokio::select! {
            biased;
            () = reports.closed() => return End::ReaderGone,
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                due = None;
                let all = std::mem::take(&mut notifications);
                let is_everything = all.contains(&Notification::Everything);
                for item in all.into_iter().filter(|item| !is_everything || *item == Notification::Everything) {
                    if reports.send(item).await.is_err() {
                        return End::ReaderGone;
                    }
                }
            }
            reported = source.next() => match reported {
                Some(None) => {}
                Some(Some(item)) => {
                    note(&mut notifications, item);
                    due.get_or_insert_with(|| Instant::now() + GATHER);
                }
                None => {
                    // The missed changes are unknown. A reader that is gone is noticed at the next send.
                    let _ = reports.send(Notification::Everything).await;
                    return End::SourceGone;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use stead_schemas::names::Uid;

    use super::*;

    #[test]
    fn the_last_report_of_a_link_counts() {
        let uid: Uid = "a23456789012345678901234".parse().expect("valid");
        let (changed, gone) = (Notification::Owner(uid.clone()), Notification::Gone(uid));
        for (first, last) in [(&changed, &gone), (&gone, &changed)] {
            let mut notifications = BTreeSet::new();
            note(&mut notifications, Notification::Host);
            note(&mut notifications, first.clone());
            note(&mut notifications, last.clone());
            assert_eq!(notifications, BTreeSet::from([last.clone(), Notification::Host]));
        }
    }
}
