//! Automatic actions on an instance: restarts, standby and waking, expiry.

use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::numbers::RunNo;
use crate::quantity::GoDuration;

/// The condition under which a program that ended is started again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "wire", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "wire", schemars(rename = "RestartCondition"))]
pub enum RestartWhen {
    #[default]
    Never,
    Always,
    /// The program is started again after any end except exit code 0.
    OnFailure,
}

/// The policy of restarts of an instance's program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "wire", derive(schemars::JsonSchema))]
pub struct RestartPolicy {
    /// Condition of a restart.
    #[serde(rename = "policy")]
    pub when: RestartWhen,
    /// Delay before the first restart; each further restart in a row waits twice as long, up to
    /// [`crate::limits::RESTART_DELAY_MAX`].
    #[cfg_attr(
        feature = "wire",
        schemars(
            description = "Delay before the first restart; it doubles with each further restart in a row, up to 5 minutes."
        )
    )]
    pub backoff: GoDuration,
    /// Largest number of restarts in a row; 0 means no limit.
    pub max_attempts: u32,
    /// Time after which a running program has succeeded: its next end counts as the first again.
    pub stable_after: GoDuration,
}

impl Default for RestartPolicy {
    /// Returns the defaults of the wire.
    fn default() -> Self {
        Self {
            when: RestartWhen::Never,
            backoff: GoDuration(Duration::from_secs(5)),
            max_attempts: 0,
            stable_after: GoDuration(Duration::from_secs(600)),
        }
    }
}

/// The reason why a policy does not act.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "wire", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "wire", schemars(rename = "RestartBlockedReason"))]
pub enum RestartBlocked {
    ManualStop,
    MaxAttemptsExceeded,
}

/// The reason why a policy acted, when the program did not end by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "wire", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum RestartReason {
    HealthCheckFailed,
}

/// The progress of a policy, for the run that it counts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartStatus {
    /// The run that the other fields belong to; another run begins anew.
    pub run: RunNo,
    /// Number of restarts in a row since the program last ran for long enough.
    pub attempts: u32,
    pub last_attempt_at: Option<Timestamp>,
    pub next_attempt_at: Option<Timestamp>,
    pub blocked: Option<RestartBlocked>,
    /// The reason of the last restart.
    #[serde(default)]
    pub last_reason: Option<RestartReason>,
}

/// The policy of when an idle instance goes to standby, and whether a connection wakes it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "wire", derive(schemars::JsonSchema))]
pub struct AutoStandbyPolicy {
    /// True if the policy is on.
    pub enabled: bool,
    /// Time without a connection after which the instance goes to standby; always set when enabled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_timeout: Option<GoDuration>,
    /// Subnets whose connections are ignored: like connections to the ignored ports, they neither keep the
    /// instance up nor wake it.
    #[serde(default)]
    #[cfg_attr(feature = "wire", schemars(with = "Vec<String>"))]
    pub ignore_source_cidrs: Vec<IpNet>,
    /// Ports of the instance whose connections are ignored.
    #[serde(default)]
    pub ignore_destination_ports: Vec<u16>,
    /// An addition to Hypeman's API: true if a connection to an instance in standby restores it, however the standby was caused.
    #[serde(default)]
    pub wake_on_traffic: bool,
}

impl AutoStandbyPolicy {
    /// Returns the idle timeout; `None` while the policy is off.
    #[must_use]
    pub fn timeout(&self) -> Option<Duration> {
        self.idle_timeout.filter(|_| self.enabled).map(|GoDuration(timeout)| timeout)
    }

    /// True if connections wake the instance; a policy that is off wakes nothing.
    #[must_use]
    pub fn is_waking(&self) -> bool {
        self.enabled && self.wake_on_traffic
    }

    /// True if a connection from this source to this port counts.
    #[must_use]
    pub fn counts(&self, source: IpAddr, port: u16) -> bool {
        let source = source.to_canonical();
        !self.ignore_destination_ports.contains(&port)
            && !self.ignore_source_cidrs.iter().any(|subnet| subnet.contains(&source))
    }
}

/// The observed connections of an instance that may go to standby.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdleStatus {
    /// Time since which no connection has existed, as far as it was watched; `None` while a connection
    /// exists, and while the instance does not run.
    pub idle_since: Option<Timestamp>,
    pub last_inbound_at: Option<Timestamp>,
    pub connections: u32,
    /// The reason why connections could not be observed the last time.
    pub error: Option<String>,
    /// True if this host does not track connections.
    pub is_unsupported: bool,
}

/// The expiry of an instance that a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expiry {
    Never,
    /// Time after the commit of the request.
    After(Duration),
    At(Timestamp),
}
