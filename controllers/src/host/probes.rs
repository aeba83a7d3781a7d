//! Probes: questions put to a running program again and again, to learn whether it is well.
//!
//! They are of the daemon: they end with it, and the next one begins them anew from what was recorded.

use std::future::Future;
use std::net::Ipv4Addr;
use std::time::Duration;

use stead_schemas::health::{HealthCheck, HealthOf, Tally};
use stead_schemas::names::{LinkName, Uid};

use super::HostError;

/// Everything a probe needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbePlan {
    pub owner: Uid,
    pub of: HealthOf,
    pub check: HealthCheck,
    /// `None` when it is not asked over the network.
    pub address: Option<Ipv4Addr>,
    /// The bridge behind which that address is; nothing is asked by another way.
    pub bridge: Option<LinkName>,
    /// Failures do not count for this long, or until the first success.
    pub lenient_for: Duration,
    /// Counted by an earlier daemon: it is gone on from.
    pub tally: Tally,
}

/// One under way, and what it found so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeSeen {
    pub of: HealthOf,
    pub tally: Tally,
}

/// Probes of this daemon, one an owner at most.
pub trait Probes: Send + Sync + 'static {
    fn list(&self) -> impl Future<Output = Result<Vec<Uid>, HostError>> + Send;
    /// `None` when none is under way.
    fn inspect(&self, owner: &Uid) -> impl Future<Output = Result<Option<ProbeSeen>, HostError>> + Send;
    /// Begins to ask, and announces what is news ([`Tally::is_news`]). Conflict when another is
    /// under way.
    fn begin(&self, plan: &ProbePlan) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Asks no more; what was under way is given up.
    fn end(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
}
