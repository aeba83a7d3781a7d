//! What shall happen to an instance by itself: restarts, standby and waking, the end of its life.

use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::numbers::RunNo;
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
    pub run: RunNo,
    /// Restarts in a row since the program last ran for long enough.
    pub attempts: u32,
    pub last_attempt_at: Option<Timestamp>,
    pub next_attempt_at: Option<Timestamp>,
    pub blocked: Option<RestartBlocked>,
    /// Of the last restart.
    #[serde(default)]
    pub last_reason: Option<RestartReason>,
}

/// When an instance that nobody is connected to goes to standby, and whether a connection wakes it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AutoStandbyPolicy {
    pub enabled: bool,
    /// How long nobody may be connected; always given when enabled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_timeout: Option<GoDuration>,
    /// Connections from these, and those to these ports, neither keep it up nor wake it.
    #[serde(default)]
    pub ignore_source_cidrs: Vec<IpNet>,
    #[serde(default)]
    pub ignore_destination_ports: Vec<u16>,
    /// Additive: a connection to an instance in standby, however it came there, restores it.
    #[serde(default)]
    pub wake_on_traffic: bool,
}

impl AutoStandbyPolicy {
    /// `None` while it is off.
    #[must_use]
    pub fn timeout(&self) -> Option<Duration> {
        self.idle_timeout.filter(|_| self.enabled).map(|GoDuration(timeout)| timeout)
    }

    /// A policy that is off wakes nobody.
    #[must_use]
    pub fn is_waking(&self) -> bool {
        self.enabled && self.wake_on_traffic
    }

    /// A connection from there to this port counts.
    #[must_use]
    pub fn counts(&self, source: IpAddr, port: u16) -> bool {
        let source = source.to_canonical();
        !self.ignore_destination_ports.contains(&port)
            && !self.ignore_source_cidrs.iter().any(|subnet| subnet.contains(&source))
    }
}

/// What was seen of the connections to an instance that may go to standby.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdleStatus {
    /// Since when nobody is connected, as far as that was watched; `None` while somebody is, and
    /// while it does not run.
    pub idle_since: Option<Timestamp>,
    pub last_inbound_at: Option<Timestamp>,
    pub connections: u32,
    /// Why connections could not be seen at the last look.
    pub error: Option<String>,
    /// This host does not track connections.
    pub is_unsupported: bool,
}

/// What a request says of the end of an instance's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expiry {
    Never,
    /// From the commit of the request.
    After(Duration),
    At(Timestamp),
}
