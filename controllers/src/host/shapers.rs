//! Shapers: limits of the rates at which links send and receive.
//!
//! A link limits only what it sends. To limit what a link receives, everything that arrives at it is led through a
//! second link, which limits what it sends on. Frames return from there to the first link, as if they arrived now.

use std::future::Future;

use stead_schemas::names::LinkName;
use stead_schemas::quantity::Rate;

use super::HostError;

/// The rules for the traffic of a link.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Shaping {
    pub limit: Limit,
    pub detour: Detour,
}

/// The limit of the rate at which a link sends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Limit {
    /// No limiter of ours is at the link.
    #[default]
    None,
    /// The link sends at this rate at most.
    At(Rate),
    /// A limiter of ours has other parameters than those that it is made with.
    Altered,
}

/// The way of what arrives at a link.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Detour {
    /// No rule of ours is at the link.
    #[default]
    None,
    /// The link that everything is led through.
    Through(LinkName),
    /// A rule of ours leads nowhere, or was altered.
    Broken,
}

/// The rules for the traffic of this scope's links. Rules that are not ours are invisible here.
pub trait Shapers: Send + Sync + 'static {
    /// Returns the rules for a link; those of a link that does not exist or is not ours are empty.
    fn inspect(&self, link: &LinkName) -> impl Future<Output = Result<Shaping, HostError>> + Send;
    /// Limits the rate at which a link sends, in place of every earlier rule for it. A limit of ours is changed
    /// without losing frames that wait. The error is Missing if the link does not exist, and Conflict if it is not
    /// ours.
    fn limit(&self, link: &LinkName, rate: Rate) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Removes our limit of a link, which then sends as the host's links do by default. Returns `Ok` if there is
    /// none, or no link.
    fn unlimit(&self, link: &LinkName) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Leads everything that arrives at a link through another one, and no longer through an earlier one. The error
    /// is Missing if either link does not exist, and Conflict if it is not ours.
    fn divert(
        &self,
        link: &LinkName,
        through: &LinkName,
    ) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Removes our rule for what arrives at a link. Returns `Ok` if there is none, or no link.
    fn undivert(&self, link: &LinkName) -> impl Future<Output = Result<(), HostError>> + Send;
}
