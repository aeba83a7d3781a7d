//! Flows: the TCP connections that others have to an address, from the kernel's own table.
//!
//! The table is read for the answer, whatever was heard or missed before. Those who ask at one moment share a
//! reading, so that many instances cost no more readings than one.

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr};

use jiff::Timestamp;

use super::HostError;

/// One connection that somebody else opened.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Flow {
    pub source: IpAddr,
    pub source_port: u16,
    /// At the address asked about.
    pub port: u16,
    pub state: FlowState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FlowState {
    /// Being opened, open, or half closed.
    Open,
    /// Over since about then, or asked for until then and not answered; the table forgets it after
    /// a while.
    Closed(Timestamp),
}

/// What is known of the connections to one address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inbound {
    /// Since when no connection can have come and gone unseen, by the clock as it shows now: this
    /// daemon looked often enough, and nobody set the clock.
    pub watched_since: Timestamp,
    pub flows: Vec<Flow>,
}

/// The greatest age of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Age {
    /// The table is read after the question.
    New,
    /// The table was read within [`stead_schemas::limits::FLOWS_AGE_MAX`] before the question: enough where nothing is done by the
    /// answer that is not asked about again.
    Recent,
}

/// The host's table of connections. Both address families are read.
pub trait Flows: Send + Sync + 'static {
    /// Unsupported when this host has no such table.
    fn inbound(&self, address: Ipv4Addr, age: Age)
    -> impl Future<Output = Result<Inbound, HostError>> + Send;
}
