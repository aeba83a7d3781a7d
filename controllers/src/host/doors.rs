//! Doors: the network cards of VMs in standby, with somebody at them instead of the VM.
//!
//! At a watched door whoever asks for the VM's hardware address is told it, and the first packet of
//! every TCP connection is kept for the VM. It ends with the daemon: nobody is at the card then, as
//! at that of a stopped VM.

use std::future::Future;
use std::net::Ipv4Addr;

use stead_schemas::names::Uid;

use super::{HostError, NetworkCard};

/// What is at one card.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Door {
    pub is_watched: bool,
    /// Whose first packets are kept, the latest last. They are let go of after a while.
    pub knocks: Vec<Knock>,
}

/// Somebody who wants to connect.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Knock {
    pub source: Ipv4Addr,
    pub source_port: u16,
    pub port: u16,
}

/// Doors by the instance whose they are. Every new knock is announced on the adapter's change
/// channel; the loss of a card is heard of as its port's.
pub trait Doors: Send + Sync + 'static {
    /// `None` when it is not watched and nothing is kept.
    fn inspect(&self, owner: &Uid) -> impl Future<Output = Result<Option<Door>, HostError>> + Send;
    /// Takes the VM's place at its card. Missing when the card is not there, Conflict when the VM
    /// is; `Ok` when it is watched already.
    fn watch(&self, owner: &Uid, card: &NetworkCard) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Leaves the card to the VM; what was kept stays kept. The card is free when it answers.
    fn unwatch(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Gives the running VM what was kept for it; nothing is kept any more.
    fn hand_over(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
}
