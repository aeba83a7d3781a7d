//! Flows: the TCP connections that other hosts have to an address, from the kernel's own table.
//!
//! The table itself is read for every answer, so that missed events do not matter. Callers that ask at the
//! same moment share a reading, so that many instances cost no more readings than one.

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr};

use jiff::Timestamp;

use super::HostError;

/// A connection that the remote side opened.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Flow {
    pub source: IpAddr,
    pub source_port: u16,
    /// The port at the address that was asked about.
    pub port: u16,
    pub state: FlowState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FlowState {
    /// The connection is being opened, open, or half closed.
    Open,
    /// The connection closed at about this time, or was requested until then and not answered. The kernel
    /// removes the entry after a while.
    Closed(Timestamp),
}

/// The known state of the connections to one address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inbound {
    /// Time since which no connection can have come and gone unnoticed, by the clock as it shows now: since
    /// then this daemon polled often enough, and nobody set the clock.
    pub watched_since: Timestamp,
    pub flows: Vec<Flow>,
}

/// The greatest acceptable age of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Age {
    /// The table is read after the call.
    New,
    /// The table was read within [`stead_schemas::limits::FLOWS_AGE_MAX`] before the call. This is enough if
    /// the caller acts on the answer only after another query.
    Recent,
}

/// The host's connection table. Both address families are read.
pub trait Flows: Send + Sync + 'static {
    /// Returns the connections to this address. The error is Unsupported if this host has no such table.
    fn inbound(&self, address: Ipv4Addr, age: Age)
    -> impl Future<Output = Result<Inbound, HostError>> + Send;
}
