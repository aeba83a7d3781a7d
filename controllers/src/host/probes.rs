//! Probes: checks that are repeated against a running program to learn whether it is healthy.
//!
//! Probes belong to the daemon and end with it. The next daemon starts them again from the recorded tally.

use std::future::Future;
use std::net::Ipv4Addr;
use std::time::Duration;

use stead_schemas::health::{HealthCheck, HealthOf, Tally};
use stead_schemas::names::{LinkName, Uid};

use super::HostError;

/// The parameters of a probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbePlan {
    pub owner: Uid,
    pub of: HealthOf,
    pub check: HealthCheck,
    /// The address to connect to, or `None` if the probe does not use the network.
    pub address: Option<Ipv4Addr>,
    /// The bridge behind which the address is. The probe uses no other way.
    pub bridge: Option<LinkName>,
    /// Time for which failures do not count; it ends early with the first success.
    pub lenient_for: Duration,
    /// The counts of an earlier daemon, from which the probe continues.
    pub tally: Tally,
}

/// A running probe and its results so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeSeen {
    pub of: HealthOf,
    pub tally: Tally,
}

/// The probes of this daemon, at most one per owner.
pub trait Probes: Send + Sync + 'static {
    fn list(&self) -> impl Future<Output = Result<Vec<Uid>, HostError>> + Send;
    /// Returns `None` if no probe is running.
    fn inspect(&self, owner: &Uid) -> impl Future<Output = Result<Option<ProbeSeen>, HostError>> + Send;
    /// Starts a probe, which announces changes that matter ([`Tally::is_news`]). The error is Conflict if
    /// another probe is running.
    fn begin(&self, plan: &ProbePlan) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Stops the probe and gives up a check that is running.
    fn end(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
}
