//! Links: network interfaces, their addresses, and the host's forwarding switch.

use std::future::Future;

use stead_schemas::names::{LinkName, Uid};
use stead_schemas::network::Cidr;

use super::HostError;

/// An interface that carries our mark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub name: LinkName,
    /// The object it was made for.
    pub owner: Uid,
    pub kind: LinkKind,
    /// The bridge it is enslaved to.
    pub master: Option<LinkName>,
    pub is_up: bool,
    /// Bridge port isolation.
    pub is_isolated: bool,
    pub addresses: Vec<Cidr>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkKind {
    Bridge,
    Tap,
}

/// What to make. The mark is set so that no crash leaves an unmarked link of ours behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkPlan {
    pub name: LinkName,
    pub owner: Uid,
    pub kind: LinkKind,
}

/// One change of one link.
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
    /// Least MTU of the links of default routes, in bytes.
    pub uplink_mtu: Option<u32>,
}

/// Whether a packet that comes in by one link leaves by another.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Forwarding {
    /// Packets of guests do not.
    #[default]
    Off,
    /// They do, because this daemon asked for it. The host is no router: between its other links the tables
    /// of the firewall drop everything.
    ForGuests,
    /// The host is a router by its own configuration, and so are its links.
    ByHost,
}

/// Interfaces of one scope (one daemon): others are invisible here and untouched.
pub trait Links: Send + Sync + 'static {
    /// All links that carry this scope's mark.
    fn list(&self) -> impl Future<Output = Result<Vec<Link>, HostError>> + Send;
    /// One link that carries this scope's mark.
    fn inspect(&self, name: &LinkName) -> impl Future<Output = Result<Option<Link>, HostError>> + Send;
    /// Conflict when a link of this name exists without our mark or of another kind.
    fn create(&self, plan: &LinkPlan) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Conflict when the link is not marked as ours; Missing when it is not there.
    fn change(
        &self,
        name: &LinkName,
        change: &LinkChange,
    ) -> impl Future<Output = Result<(), HostError>> + Send;
    /// `Ok` when nothing of that name is there; Conflict when it is not ours.
    fn remove(&self, name: &LinkName) -> impl Future<Output = Result<(), HostError>> + Send;
    fn routes(&self) -> impl Future<Output = Result<Routes, HostError>> + Send;
    fn forwarding(&self) -> impl Future<Output = Result<Forwarding, HostError>> + Send;
    /// Turns IPv4 forwarding on for each link that has an address, unless the host is a router already.
    /// Forwarding is never turned off again: others may rely on it by then.
    fn set_forwarding(&self) -> impl Future<Output = Result<(), HostError>> + Send;
}
