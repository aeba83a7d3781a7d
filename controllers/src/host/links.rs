//! Links: network interfaces, their addresses, and the host's forwarding switch.

use std::future::Future;

use stead_schemas::names::{LinkName, Uid};
use stead_schemas::network::Cidr;

use super::HostError;

/// An interface that carries our mark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub name: LinkName,
    /// The object that the interface was made for.
    pub owner: Uid,
    pub kind: LinkKind,
    /// The bridge that the interface is attached to.
    pub master: Option<LinkName>,
    pub is_up: bool,
    /// True if bridge port isolation is on.
    pub is_isolated: bool,
    pub addresses: Vec<Cidr>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkKind {
    Bridge,
    Tap,
    /// An intermediate functional block: what arrives at a TAP is led through it, so that its rate can be limited
    /// ([`super::Shapers`]).
    Ifb,
}

/// A link to make. The mark is set in such a way that no crash leaves an unmarked link of ours behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkPlan {
    pub name: LinkName,
    pub owner: Uid,
    pub kind: LinkKind,
    /// True for a TAP that its VM may open several times, for a queue each.
    pub has_queues: bool,
}

/// A single change of a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkChange {
    Up,
    Master(LinkName),
    Isolated,
    AddAddress(Cidr),
    RemoveAddress(Cidr),
}

/// A route of the host's main table, for conflict detection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    pub destination: Cidr,
    pub link: Option<LinkName>,
}

/// IPv4 routes of the host's main table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Routes {
    /// Routes with a destination.
    pub routes: Vec<Route>,
    /// Smallest MTU of the links of default routes, in bytes.
    pub uplink_mtu: Option<u32>,
}

/// Forwarding state: the answer to whether a packet that arrives on one link leaves by another.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Forwarding {
    /// Packets of guests are not forwarded.
    #[default]
    Off,
    /// Packets of guests are forwarded because this daemon turned forwarding on. The host is no router:
    /// between its other links the firewall tables drop everything.
    ForGuests,
    /// The host is a router by its own configuration, and all of its links forward.
    ByHost,
}

/// The interfaces of one scope (one daemon). Other interfaces are invisible here and never touched.
pub trait Links: Send + Sync + 'static {
    /// Returns all links that carry this scope's mark.
    fn list(&self) -> impl Future<Output = Result<Vec<Link>, HostError>> + Send;
    /// Returns the link of this name if it carries this scope's mark.
    fn inspect(&self, name: &LinkName) -> impl Future<Output = Result<Option<Link>, HostError>> + Send;
    /// Creates a link. The error is Conflict if a link of this name exists without our mark or with another
    /// kind.
    fn create(&self, plan: &LinkPlan) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Changes a link. The error is Conflict if the link does not carry our mark, and Missing if it does not
    /// exist.
    fn change(
        &self,
        name: &LinkName,
        change: &LinkChange,
    ) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Removes a link. Returns `Ok` if no link of that name exists. The error is Conflict if the link is not
    /// ours.
    fn remove(&self, name: &LinkName) -> impl Future<Output = Result<(), HostError>> + Send;
    fn routes(&self) -> impl Future<Output = Result<Routes, HostError>> + Send;
    fn forwarding(&self) -> impl Future<Output = Result<Forwarding, HostError>> + Send;
    /// Turns IPv4 forwarding on for each link that has an address, unless the host is a router already.
    /// Forwarding is never turned off again, because others may rely on it by then.
    fn set_forwarding(&self) -> impl Future<Output = Result<(), HostError>> + Send;
}
