//! Policies in the bodies of requests.

use schemars::JsonSchema;

use crate::api::schema::NO_NUL;
use crate::compression::Algorithm;
use crate::health::Scheme;
use crate::limits;
use crate::policy::RestartWhen;
use crate::quantity::GoDuration;

/// A policy of restarts of an instance's program.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct RestartPolicyRequest {
    /// Condition of a restart; `never` by default.
    pub policy: Option<RestartWhen>,
    /// Delay before the first restart, more than 0 and at most 5 minutes; `5s` by default. It doubles with
    /// each further restart in a row.
    pub backoff: Option<GoDuration>,
    /// Largest number of restarts in a row; 0, the default, means no limit.
    #[schemars(range(min = 0, max = limits::RESTART_ATTEMPTS_MAX))]
    pub max_attempts: Option<u32>,
    /// Time after which a program that runs has succeeded, more than 0 and at most 87600 hours; `10m` by
    /// default.
    pub stable_after: Option<GoDuration>,
}

/// The ways in which a program's health is checked.
#[derive(Debug, JsonSchema)]
#[schemars(rename_all = "lowercase")]
pub enum HealthCheckType {
    /// No check.
    None,
    /// A request to a port of the instance.
    Http,
    /// A connection to a port of the instance.
    Tcp,
    /// A program inside the instance.
    Exec,
}

/// A check of a program's health. The object with the name of the type is required, the other two are
/// refused.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct HealthCheckRequest {
    /// Way of the check; `none` by default.
    #[schemars(rename = "type")]
    pub kind: Option<HealthCheckType>,
    /// Request of a check of type `http`.
    pub http: Option<HttpCheckRequest>,
    /// Connection of a check of type `tcp`.
    pub tcp: Option<TcpCheckRequest>,
    /// Program of a check of type `exec`.
    pub exec: Option<ExecCheckRequest>,
    /// Time between two probes, from 1 second to 24 hours; `10s` by default.
    pub interval: Option<GoDuration>,
    /// Time limit of a probe, from 10 milliseconds to 5 minutes; `2s` by default.
    pub timeout: Option<GoDuration>,
    /// Time after the start in which failures do not count, at most 24 hours; `30s` by default.
    pub start_period: Option<GoDuration>,
    /// Number of failures in a row after which the program is unhealthy; 3 by default.
    #[schemars(range(min = 1, max = limits::HEALTH_THRESHOLD_MAX))]
    pub failure_threshold: Option<u32>,
    /// Number of successes in a row after which the program is healthy; 1 by default.
    #[schemars(range(min = 1, max = limits::HEALTH_THRESHOLD_MAX))]
    pub success_threshold: Option<u32>,
}

/// The request of a health check.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct HttpCheckRequest {
    /// Port of the instance.
    #[schemars(range(min = 1, max = 65535))]
    pub port: u32,
    /// Scheme of the request; `http` by default.
    pub scheme: Option<Scheme>,
    /// Path of the request; `/` by default.
    #[schemars(regex(pattern = r"^/[!-~]*$"), length(max = limits::HEALTH_PATH_BYTES_MAX), extend("not" = {"pattern": "#"}))]
    pub path: Option<String>,
    /// Status of the response of a healthy program; 200 by default.
    #[schemars(range(min = 200, max = 599))]
    pub expected_status: Option<u32>,
}

/// The connection of a health check.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct TcpCheckRequest {
    /// Port of the instance.
    #[schemars(range(min = 1, max = 65535))]
    pub port: u32,
}

/// The program of a health check.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct ExecCheckRequest {
    /// Program with its arguments.
    #[schemars(
        length(min = 1, max = limits::ARGV_MAX),
        inner(length(max = limits::ARG_BYTES_MAX), regex(pattern = NO_NUL))
    )]
    pub command: Vec<String>,
    /// Absolute path of the working directory; empty for the default.
    #[schemars(regex(pattern = r"^(/[^\u0000]*)?$"), length(max = limits::HEALTH_PATH_BYTES_MAX))]
    pub working_dir: Option<String>,
}

/// The compression of a snapshot or of the memory of a standby.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct CompressionRequest {
    /// True to compress.
    pub enabled: bool,
    /// Algorithm; `zstd` by default.
    pub algorithm: Option<Algorithm>,
    /// Level: 1 to 19 for zstd (1 by default), 0 to 9 for lz4 (0 by default).
    #[schemars(range(min = 0, max = 19))]
    pub level: Option<u32>,
}

/// A policy of the compression of an instance's snapshots and standbys.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct SnapshotPolicyRequest {
    /// Compression of snapshots and standbys whose request does not mention it.
    pub compression: Option<CompressionRequest>,
    /// Time between a standby and its compression, at most 87600 hours.
    pub standby_compression_delay: Option<GoDuration>,
}

/// The optional body of `POST /instances/{id}/standby`.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct StandbyRequest {
    /// Compression of the memory; the instance's policy decides by default.
    pub compression: Option<CompressionRequest>,
    /// Time between the standby and its compression, at most 87600 hours.
    pub compression_delay: Option<GoDuration>,
}

/// A policy of standby while no client is connected.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct AutoStandbyRequest {
    /// True to put the instance into standby when it is idle; false by default.
    pub enabled: Option<bool>,
    /// Time without a connection before the standby, from 1 second to 87600 hours; required when enabled.
    pub idle_timeout: Option<GoDuration>,
    /// Subnets whose connections are ignored, such as 10.0.0.0/8 or 2001:db8::/32.
    #[schemars(length(max = limits::IGNORES_MAX), inner(length(max = 64), regex(pattern = r"^[0-9a-fA-F:.]+/[0-9]{1,3}$")))]
    pub ignore_source_cidrs: Option<Vec<String>>,
    /// Ports of the instance whose connections are ignored.
    #[schemars(length(max = limits::IGNORES_MAX), inner(range(min = 1, max = 65535)))]
    pub ignore_destination_ports: Option<Vec<u32>>,
    /// True to restore the instance when a client connects; false by default. It is an addition to the
    /// contract.
    pub wake_on_traffic: Option<bool>,
}
