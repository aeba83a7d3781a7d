//! Firewall: our nft tables, replaced as a whole, and one rule per port (an element of a set).
//!
//! The rules' text is the adapter's business; a fingerprint says whether what is loaded is what
//! that text makes, so that a flush, a deletion or a foreign rule in our table is seen as drift.

use std::future::Future;
use std::net::Ipv4Addr;

use stead_schemas::names::LinkName;
use stead_schemas::network::{Cidr, GuestReach, Mac};

use super::HostError;

/// What the base tables are made for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirewallRules {
    pub table: String,
    pub bridge: LinkName,
    pub subnet: Cidr,
    /// Name servers of the guests; those in private networks are reached for DNS alone.
    pub dns: Vec<Ipv4Addr>,
    pub reach: GuestReach,
    /// Packets that neither come from a network of this program nor go to one are dropped, because the host
    /// forwards for guests only.
    pub is_for_guests_only: bool,
}

/// The one combination of interface, hardware and network address that may send.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortRule {
    pub tap: LinkName,
    pub mac: Mac,
    pub address: Ipv4Addr,
}

/// What is loaded of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirewallSeen {
    /// The base rules are exactly those that `replace` loads for these rules.
    pub is_intact: bool,
    pub ports: Vec<PortRule>,
}

/// Our tables of one scope. Other tables are never listed and never touched.
pub trait Firewall: Send + Sync + 'static {
    /// `None` when no table of that name exists in any family we use.
    fn inspect(
        &self,
        rules: &FirewallRules,
    ) -> impl Future<Output = Result<Option<FirewallSeen>, HostError>> + Send;
    /// Whether one port's rule is loaded.
    fn has_port(&self, table: &str, port: &PortRule) -> impl Future<Output = Result<bool, HostError>> + Send;
    /// Loads the base tables in one transaction; rules of ports that were loaded are kept.
    fn replace(&self, rules: &FirewallRules) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Missing when the table is not there.
    fn add_port(&self, table: &str, port: &PortRule) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Also drops the port's connection tracking entries. `Ok` when it or its table is gone.
    fn remove_port(&self, table: &str, port: &PortRule)
    -> impl Future<Output = Result<(), HostError>> + Send;
    /// Removes our tables of that name. `Ok` when gone.
    fn remove(&self, table: &str) -> impl Future<Output = Result<(), HostError>> + Send;
}
