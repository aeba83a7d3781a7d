//! The number of the firewall's last change. While it stays the same, a listing is valid: a query to the kernel of
//! some microseconds replaces a process.

use std::io;

use rtnetlink::sys::protocols::NETLINK_NETFILTER;
use rtnetlink::sys::{Socket, SocketAddr};

use super::netfilter_messages::{self, SUBSYSTEM_NFTABLES};

/// Number of the message `NFT_MSG_GETGEN`, and the flag of a request.
const GET_GENERATION: u8 = 16;
const REQUEST: u16 = 1;
/// Size of a message header and `nfgenmsg`, in bytes.
const MESSAGE_BYTES: u32 = 20;

/// Returns the number for the network namespace of the calling thread. The kernel answers before `send` returns, so
/// this never waits.
pub(super) fn generation() -> io::Result<u32> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.set_non_blocking(true)?;
    let mut message = Vec::new();
    message.extend(MESSAGE_BYTES.to_ne_bytes());
    message.extend(u16::from_be_bytes([SUBSYSTEM_NFTABLES, GET_GENERATION]).to_ne_bytes());
    message.extend(REQUEST.to_ne_bytes());
    message.resize(usize::try_from(MESSAGE_BYTES).unwrap_or(0), 0);
    socket.send_to(&message, &SocketAddr::new(0, 0), 0)?;
    let (answer, _) = socket.recv_from_full()?;
    netfilter_messages::generation(&answer)
        .ok_or_else(|| io::Error::other("the kernel tells no generation of its tables"))
}
