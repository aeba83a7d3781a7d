//! The client at the other end of a connection, as limits and the audit log know it.

use std::net::IpAddr;
use std::sync::Arc;

use super::local::Peer;
use crate::peers::client_of;

/// The client of a request, stored in its extensions.
#[derive(Debug, Clone)]
pub(super) enum Client {
    /// A client at this address.
    Network(IpAddr),
    /// A process of this host, which the kernel names.
    Local(Arc<Peer>),
}

/// The client that bears the limits of a connection: an address, or a user of this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Origin {
    Network(IpAddr),
    User(u32),
}

impl Client {
    pub(super) fn origin(&self) -> Origin {
        match self {
            Self::Network(address) => Origin::Network(client_of(*address)),
            Self::Local(peer) => Origin::User(peer.uid),
        }
    }
}
