//! Removal of connections from the kernel's table: one reading of the table serves many addresses.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use netlink_packet_netfilter::conntrack::{ConntrackAttribute, ConntrackMessage, IPTuple, Tuple};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::sys::protocols::NETLINK_NETFILTER;
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};

/// Time limit for one reading of the table and the removals. A quarter of a million entries take half a second.
const DEADLINE: Duration = Duration::from_secs(20);
const ENOENT: i32 = 2;

/// Removes all connections from or to one of these addresses.
///
/// # Errors
/// Returns an error when the table cannot be read or changed. Some of the connections may remain then.
pub(super) async fn forget(addresses: &BTreeSet<Ipv4Addr>) -> io::Result<()> {
    let all = async {
        let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
        socket.socket_mut().bind_auto()?;
        let tuples = matching(&mut socket, addresses).await?;
        for tuple in tuples {
            remove(&mut socket, tuple).await?;
        }
        Ok(())
    };
    tokio::time::timeout(DEADLINE, all).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

async fn send(socket: &mut TokioSocket, flags: u16, message: ConntrackMessage) -> io::Result<()> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    let family = NetfilterHeader::new(NetfilterProtoFamily::IPv4, 0, 0);
    let body = NetfilterMessage::new(family, message);
    let mut request = NetlinkMessage::new(header, NetlinkPayload::from(body));
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send_to(&bytes, &SocketAddr::new(0, 0)).await.map(drop)
}

/// Returns the original direction of every connection with one of the addresses.
async fn matching(socket: &mut TokioSocket, addresses: &BTreeSet<Ipv4Addr>) -> io::Result<Vec<Vec<Tuple>>> {
    send(socket, NLM_F_DUMP, ConntrackMessage::Get(Vec::new())).await?;
    let mut found = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full().await?;
        let is_last = each_message(&datagram, |payload| match payload {
            NetlinkPayload::Done(_) => Ok(true),
            NetlinkPayload::Error(error) => Err(super::ctnetlink::error_of(&error)),
            NetlinkPayload::Overrun(_) => Err(io::ErrorKind::Interrupted.into()),
            NetlinkPayload::InnerMessage(NetfilterMessage {
                inner: NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)),
                ..
            }) => {
                found.extend(original(attributes, addresses));
                Ok(false)
            }
            _ => Ok(false),
        })?;
        if is_last {
            return Ok(found);
        }
    }
}

async fn remove(socket: &mut TokioSocket, original: Vec<Tuple>) -> io::Result<()> {
    let attributes = vec![ConntrackAttribute::CtaTupleOrig(original)];
    send(socket, NLM_F_ACK, ConntrackMessage::Delete(attributes)).await?;
    let (datagram, _) = socket.recv_from_full().await?;
    each_message(&datagram, |payload| match payload {
        NetlinkPayload::Error(error) if error.code.is_some() => match super::ctnetlink::error_of(&error) {
            // The connection ended by itself meanwhile.
            error if error.raw_os_error() == Some(ENOENT) => Ok(true),
            error => Err(error),
        },
        _ => Ok(true),
    })
    .map(drop)
}

/// Calls `visit` for each message of a datagram until it returns true. Returns `true` if it did.
fn each_message(
    datagram: &[u8],
    mut visit: impl FnMut(NetlinkPayload<NetfilterMessage>) -> io::Result<bool>,
) -> io::Result<bool> {
    let mut rest = datagram;
    while !rest.is_empty() {
        let message = super::ctnetlink::first(rest)?;
        let length = usize::try_from(message.header.length).unwrap_or(usize::MAX).next_multiple_of(4);
        if visit(message.payload)? {
            return Ok(true);
        }
        rest = rest.get(length..).unwrap_or_default();
    }
    Ok(false)
}

#[cfg(feature = "fuzzing")]
pub(super) fn fuzz(datagram: &[u8]) {
    let addresses = BTreeSet::from([Ipv4Addr::new(10, 9, 0, 2)]);
    let _ = each_message(datagram, |payload| {
        if let NetlinkPayload::InnerMessage(NetfilterMessage {
            inner: NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)),
            ..
        }) = payload
        {
            original(attributes, &addresses);
        }
        Ok(false)
    });
}

/// Returns the original direction, if either direction contains one of the addresses.
fn original(attributes: Vec<ConntrackAttribute>, addresses: &BTreeSet<Ipv4Addr>) -> Option<Vec<Tuple>> {
    let is_one = |address: &IpAddr| matches!(address, IpAddr::V4(address) if addresses.contains(address));
    let concerns = |tuples: &[Tuple]| {
        tuples.iter().any(|tuple| match tuple {
            Tuple::Ip(parts) => parts.iter().any(|part| match part {
                IPTuple::SourceAddress(address) | IPTuple::DestinationAddress(address) => is_one(address),
                _ => false,
            }),
            _ => false,
        })
    };
    attributes.into_iter().find_map(|attribute| match attribute {
        ConntrackAttribute::CtaTupleOrig(tuples) if concerns(&tuples) => Some(tuples),
        _ => None,
    })
}
