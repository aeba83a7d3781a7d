//! Wake listeners: the network cards of VMs in standby, where the host listens in place of the VM.
//!
//! A wake listener answers ARP requests for the VM's hardware address and keeps the first packet of every TCP
//! connection for the VM. Listeners end with the daemon: afterwards nothing answers at the card, as at the
//! card of a stopped VM.

use std::future::Future;
use std::net::Ipv4Addr;

use stead_schemas::names::Uid;

use super::{HostError, NetworkCard};

/// The state of the wake listener at one card.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WakeListener {
    pub is_watched: bool,
    /// The connections whose first packets are kept, the latest last. Each is dropped after a while.
    pub all_pending: Vec<PendingConnection>,
}

/// A pending connection: a client that tries to connect.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PendingConnection {
    pub source: Ipv4Addr,
    pub source_port: u16,
    pub port: u16,
}

/// Access to the wake listeners by the uid of the instance that owns the card. Every new pending connection
/// is announced on the adapter's change channel; the loss of a card is announced as a change of its port.
pub trait WakeListeners: Send + Sync + 'static {
    /// Returns `None` if the card is not watched and no packet is kept.
    fn inspect(&self, owner: &Uid) -> impl Future<Output = Result<Option<WakeListener>, HostError>> + Send;
    /// Listens in place of the VM at its card. Returns `Ok` if the card is watched already. The error is
    /// Missing if the card does not exist, and Conflict if the VM itself is attached to it.
    fn watch(&self, owner: &Uid, card: &NetworkCard) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Leaves the card to the VM and retains the packets that were kept. The card is free when this call
    /// returns.
    fn unwatch(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Delivers the kept packets to the running VM; afterwards no packet is kept.
    fn hand_over(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
}
