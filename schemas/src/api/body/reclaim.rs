//! Bodies of requests about the resources of the host.

use schemars::JsonSchema;

use crate::limits;
use crate::quantity::GoDuration;

/// The body of `POST /resources/memory/reclaim`.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct MemoryReclaimRequest {
    /// Bytes that instances should give back.
    pub reclaim_bytes: u64,
    /// Time for which they do not get the memory again, at most 168 hours; 5 minutes by default.
    pub hold_for: Option<GoDuration>,
    /// True to plan only.
    pub dry_run: Option<bool>,
    /// Reason, for the log of the daemon.
    #[schemars(length(max = limits::RECLAIM_REASON_CHARS_MAX))]
    pub reason: Option<String>,
}
