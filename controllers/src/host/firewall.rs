//! Firewall: our nft tables, which are replaced as a whole, and one rule per port (an element of a set).
//!
//! The adapter writes the text of the rules. A fingerprint tells whether the loaded rules are those of that
//! text, so that a flush, a deletion or a foreign rule in our table is detected as drift.

use std::future::Future;
use std::net::Ipv4Addr;

use stead_schemas::names::LinkName;
use stead_schemas::network::{Cidr, GuestReach, Lane, Mac, MediatorGate};

use super::HostError;

/// The parameters of the base tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirewallRules {
    pub table: String,
    pub bridge: LinkName,
    pub subnet: Cidr,
    /// Name servers of the guests. Guests reach those in private networks for DNS only.
    pub dns: Vec<Ipv4Addr>,
    pub reach: GuestReach,
    /// True if packets that neither come from a network of this program nor go to one are dropped, because
    /// the host forwards for guests only.
    pub is_for_guests_only: bool,
    /// The process that carries mediated egress. Without it, mediated guests reach nothing.
    pub mediator: Option<MediatorGate>,
}

/// The only combination of interface, hardware address and network address that is allowed to send, and the way by which
/// its packets leave the host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct NicRule {
    pub tap: LinkName,
    pub mac: Mac,
    pub address: Ipv4Addr,
    pub lane: Lane,
}

/// The loaded state of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirewallSeen {
    /// True if the base rules are exactly those that `replace` loads for these parameters.
    pub is_intact: bool,
    pub nics: Vec<NicRule>,
}

/// Access to our tables of one scope. Foreign tables are never listed and never touched.
pub trait Firewall: Send + Sync + 'static {
    /// Returns `None` if no table of that name exists in any family that we use.
    fn inspect(
        &self,
        rules: &FirewallRules,
    ) -> impl Future<Output = Result<Option<FirewallSeen>, HostError>> + Send;
    /// Returns true if the rule of this port is loaded.
    fn has_nic(&self, table: &str, nic: &NicRule) -> impl Future<Output = Result<bool, HostError>> + Send;
    /// Loads the base tables in one transaction and keeps the port rules that were loaded.
    fn replace(&self, rules: &FirewallRules) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Adds the rule of a port, which replaces one with another lane. The error is Missing if the table does not exist.
    fn add_nic(&self, table: &str, nic: &NicRule) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Removes the rule of a port and its connection tracking entries. Returns `Ok` if the rule or its table
    /// is gone.
    fn remove_nic(&self, table: &str, nic: &NicRule) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Removes our tables of that name. Returns `Ok` if they are gone.
    fn remove(&self, table: &str) -> impl Future<Output = Result<(), HostError>> + Send;
}
