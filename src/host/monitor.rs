//! Monitors: tell that something of ours may have changed on the host.
//!
//! Level-triggered: what is heard is only a reason to look. Reports are gathered for a moment and
//! given once each, so that a burst costs one pass. A lost message becomes [`Heard::Everything`].
//! Our own changes are heard too; the pass they cause finds nothing to do, so there it ends.
//! Never: guesses state from a message, or polls.

use std::collections::BTreeSet;
use std::future::ready;
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use futures::stream::{self, BoxStream, Stream, StreamExt};
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};
use rtnetlink::{MulticastGroup, new_multicast_connection};
use stead_controllers::host::HostError;
use stead_schemas::names::{LinkName, Uid};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::warn;

use super::marks::Scope;
use super::netlink::Netlink;
use super::{links_seen, notices};

/// Changes within this time are reported together: short against the second in which drift shall
/// be noticed, long against one reconciler's steps.
const GATHER: Duration = Duration::from_millis(50);
/// Before a socket that broke is opened again.
const REOPEN: Duration = Duration::from_secs(1);
/// Room in the socket of a monitor, in bytes: the messages of several hundred interfaces that come or go while a
/// busy host runs others (some ten for each, 4 KiB of room for each). The kernel's default holds those of ten.
const SOCKET_BYTES: usize = 16 << 20;
/// Reports that wait for the reader; it is quick, and a burst waits in the socket meanwhile.
const REPORTS_MAX: usize = 64;

/// Something may have changed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Heard {
    /// A link that carries this object's mark.
    Owner(Uid),
    /// A link that carried this object's mark, and was removed.
    Gone(Uid),
    /// The rule of the port on this interface, or its place on a bridge. It may be no port of ours:
    /// these messages bear no mark.
    Port(LinkName),
    /// Routes, addresses or the forwarding of the host: what networks look at, and ports do not.
    Host,
    /// Anything: messages were lost, or the change has no owner.
    Everything,
}

impl Netlink {
    /// Changes of our links by owner, and those of the host's addresses, routes and forwarding
    /// ([`Heard::Host`]). Runs until the receiver is dropped. The kernel is silent about some
    /// changes of a link that is down; raising and removing it is always heard.
    ///
    /// # Errors
    /// When the first socket cannot be had.
    pub fn monitor(&self) -> Result<mpsc::Receiver<Heard>, HostError> {
        let scope = self.scope().clone();
        follow("links", move || links_source(scope.clone()))
    }
}

/// Changes of the tables named `table`: [`Heard::Port`] for a port's rule that went, else
/// [`Heard::Everything`]. Runs until the receiver is dropped.
///
/// # Errors
/// When the first socket cannot be had.
pub fn monitor_table(table: &str) -> Result<mpsc::Receiver<Heard>, HostError> {
    let table = table.to_owned();
    follow("tables", move || {
        let table = table.clone();
        datagrams(NETLINK_NETFILTER, NFNLGRP_NFTABLES, move |bytes| notices::of_table(bytes, &table))
    })
}

/// What a socket says, and whom it may concern; ends when the socket broke.
type Source = BoxStream<'static, Option<Heard>>;

fn follow(
    subject: &'static str,
    open: impl Fn() -> io::Result<Source> + Send + 'static,
) -> Result<mpsc::Receiver<Heard>, HostError> {
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

fn links_source(scope: Scope) -> io::Result<Source> {
    let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv4Route];
    let (mut connection, handle, messages) = new_multicast_connection(&groups)?;
    make_room(connection.socket_mut().socket_mut());
    drop(handle);
    // Driving the connection yields one `None`, when its socket broke.
    let drive = stream::once(async move {
        connection.await;
        None
    });
    let messages = messages.map(|(message, _)| Some(message.payload));
    let both = stream::select(drive, messages);
    let link_events = both.map(move |payload| Some(heard_of_link(&scope, payload?)));
    // The crate does not know these messages.
    let forwarding_events = datagrams(NETLINK_ROUTE, RTNLGRP_IPV4_NETCONF, |bytes| {
        notices::is_forwarding_switched(bytes).then_some(Heard::Host).into_iter().collect()
    })?;
    let all = stream::select(link_events, forwarding_events.map(Some).chain(broken()));
    Ok(all.take_while(|item| ready(item.is_some())).filter_map(ready).boxed())
}

fn heard_of_link(scope: &Scope, payload: NetlinkPayload<RouteNetlinkMessage>) -> Option<Heard> {
    match payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(message)) => {
            links_seen::heard(&message, scope)
        }
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(message)) => {
            links_seen::heard(&message, scope).map(|heard| match heard {
                Heard::Owner(uid) => Heard::Gone(uid),
                other => other,
            })
        }
        NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewAddress(_)
            | RouteNetlinkMessage::DelAddress(_)
            | RouteNetlinkMessage::NewRoute(_)
            | RouteNetlinkMessage::DelRoute(_),
        ) => Some(Heard::Host),
        NetlinkPayload::Overrun(_) => Some(Heard::Everything),
        _ => None,
    }
}

const RTNLGRP_IPV4_NETCONF: u32 = 24;
const NFNLGRP_NFTABLES: u32 = 7;
/// The kernel dropped messages that found no room.
const ENOBUFS: i32 = 105;

/// Gives a socket room for the messages of a burst. One that is lost costs a look at everything, which grows with
/// what there is; a socket that has less room than asked for only loses one sooner.
fn make_room(socket: &impl AsFd) {
    let _ = rustix::net::sockopt::set_socket_recv_buffer_size_force(socket, SOCKET_BYTES);
}

/// What follows the last item of a source that broke.
fn broken() -> impl Stream<Item = Option<Option<Heard>>> {
    stream::once(ready(None))
}

/// All that `read` makes of each datagram of a group; ends when the socket broke.
fn datagrams(
    protocol: isize,
    group: u32,
    read: impl Fn(&[u8]) -> Vec<Heard> + Send + 'static,
) -> io::Result<Source> {
    let mut socket = TokioSocket::new(protocol)?;
    socket.socket_mut().bind(&SocketAddr::new(0, 0))?;
    make_room(socket.socket_mut());
    socket.socket_mut().add_membership(group)?;
    let heard = stream::unfold((socket, read), async |(socket, read)| {
        let heard = match socket.recv_from_full().await {
            Ok((bytes, _)) => read(&bytes),
            Err(error) if error.raw_os_error() == Some(ENOBUFS) => vec![Heard::Everything],
            Err(_) => return None,
        };
        Some((heard, (socket, read)))
    });
    Ok(heard.flat_map(|all| stream::iter(all.into_iter().map(Some))).boxed())
}

/// Adds a report; of a link the last one counts. One that is removed is changed first, and whoever asked for
/// that has nothing to look for any more.
fn note(heard: &mut BTreeSet<Heard>, item: Heard) {
    match &item {
        Heard::Gone(uid) => drop(heard.remove(&Heard::Owner(uid.clone()))),
        Heard::Owner(uid) => drop(heard.remove(&Heard::Gone(uid.clone()))),
        Heard::Port(_) | Heard::Host | Heard::Everything => {}
    }
    heard.insert(item);
}

#[derive(Debug, PartialEq, Eq)]
enum End {
    ReaderGone,
    SourceGone,
}

/// Gives what the source says, gathered, until one end goes.
async fn gather(reports: &mpsc::Sender<Heard>, mut source: Source) -> End {
    let mut heard = BTreeSet::new();
    let mut due: Option<Instant> = None;
    loop {
        // Dropping any arm loses nothing: the source keeps what it has not yielded.
        tokio::select! {
            biased;
            () = reports.closed() => return End::ReaderGone,
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                due = None;
                let all = std::mem::take(&mut heard);
                let is_everything = all.contains(&Heard::Everything);
                for item in all.into_iter().filter(|item| !is_everything || *item == Heard::Everything) {
                    if reports.send(item).await.is_err() {
                        return End::ReaderGone;
                    }
                }
            }
            said = source.next() => match said {
                Some(None) => {}
                Some(Some(item)) => {
                    note(&mut heard, item);
                    due.get_or_insert_with(|| Instant::now() + GATHER);
                }
                None => {
                    // What was missed is not known. A reader that went is noticed next time.
                    let _ = reports.send(Heard::Everything).await;
                    return End::SourceGone;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_report_of_a_link_counts() {
        let uid: Uid = "a23456789012345678901234".parse().expect("valid");
        let (changed, gone) = (Heard::Owner(uid.clone()), Heard::Gone(uid));
        for (first, last) in [(&changed, &gone), (&gone, &changed)] {
            let mut heard = BTreeSet::new();
            note(&mut heard, Heard::Host);
            note(&mut heard, first.clone());
            note(&mut heard, last.clone());
            assert_eq!(heard, BTreeSet::from([last.clone(), Heard::Host]));
        }
    }
}
