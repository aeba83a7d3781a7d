//! What shall happen to an instance by itself: restarts, and the end of its life.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::quantity::GoDuration;

/// When a program that ended is started again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestartWhen {
    #[default]
    Never,
    Always,
    /// After any end but exit code 0.
    OnFailure,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartPolicy {
    #[serde(rename = "policy")]
    pub when: RestartWhen,
    /// Before the first restart; each further one in a row waits twice as long, up to
    /// [`crate::limits::RESTART_DELAY_MAX`].
    pub backoff: GoDuration,
    /// Restarts in a row; 0 for no limit.
    pub max_attempts: u32,
    /// A program that ran this long has succeeded: the next end counts as the first again.
    pub stable_after: GoDuration,
}

impl Default for RestartPolicy {
    /// As the wire has it.
    fn default() -> Self {
        Self {
            when: RestartWhen::Never,
            backoff: GoDuration(Duration::from_secs(5)),
            max_attempts: 0,
            stable_after: GoDuration(Duration::from_secs(600)),
        }
    }
}

/// Why a policy does not act.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestartBlocked {
    ManualStop,
    MaxAttemptsExceeded,
}

/// Why a policy acted, when not because the program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestartReason {
    HealthCheckFailed,
}

/// How far a policy is, for the run it counts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartStatus {
    /// The run that the rest is about; another one begins anew.
    pub run: u64,
    /// Restarts in a row since the program last ran for long enough.
    pub attempts: u32,
    pub last_attempt_at: Option<Timestamp>,
    pub next_attempt_at: Option<Timestamp>,
    pub blocked: Option<RestartBlocked>,
    /// Of the last restart.
    #[serde(default)]
    pub last_reason: Option<RestartReason>,
}

/// What a request says of the end of an instance's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expiry {
    Never,
    /// From the commit of the request.
    After(Duration),
    At(Timestamp),
}
