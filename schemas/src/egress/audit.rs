//! Lines of the audit log of egress.

use std::net::IpAddr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::host::Host;
use super::reason::{Decision, Reason};

/// The use of TLS on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TlsUse {
    /// The connection is not encrypted, or its protocol is unknown.
    None,
    /// The bytes pass unread.
    Passthrough,
    /// TLS ends at the proxy.
    Intercept,
}

/// A line: one request, one connection that carries no readable request, or one refused question for a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditLine {
    /// The time at which the request or the connection ended.
    pub time: Timestamp,
    /// Number of the connection, unique in one run of the proxy; 0 for a question for a name.
    pub conn: u64,
    /// Port of the guest's end of the connection; 0 for a question for a name.
    pub client_port: u16,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<Host>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The address that was connected to, or that was removed from the answer to a question for a name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    /// The path without its query, cut at [`EGRESS_AUDIT_PATH_BYTES_MAX`](crate::limits::EGRESS_AUDIT_PATH_BYTES_MAX).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// The version of HTTP: `1.0`, `1.1` or `2`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// Bytes from the guest: of the body of a request, or of the tunnel.
    pub bytes_up: u64,
    /// Bytes to the guest.
    pub bytes_down: u64,
    /// Duration in milliseconds.
    pub ms: u64,
    pub tls: TlsUse,
    pub decision: Decision,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    /// Names of the credentials that concern the request.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub credentials: Vec<String>,
    /// True if a credential's value was put into the request.
    pub injected: bool,
    /// Number of lines before this one that were dropped because too many waited to be written.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub dropped_before: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}
