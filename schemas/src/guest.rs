//! Host to guest: what travels on the control channel of a VM.
//!
//! One frame each way at a time: a length, then JSON of [`ToGuest`] or [`FromGuest`]. The guest is
//! not trusted: every frame is bounded and parsed, and after [`ToGuest::Configure`] each of its
//! frames carries the token of this boot.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::instance::Secret;

/// What the guest's PID 1 has to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    pub hostname: String,
    /// Program and arguments; executed directly, no shell.
    pub argv: Vec<String>,
    pub env: BTreeMap<String, Secret>,
    /// Empty means `/`.
    pub working_dir: String,
    /// As the image says: `user`, `uid`, `user:group`; looked up in the image's own files.
    pub user: String,
    pub stop_signal: Option<String>,
    /// How long the program has between the stop signal and the kill.
    pub shutdown_grace_millis: u64,
    pub network: Option<NetworkConfig>,
    pub has_agent: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkConfig {
    pub address: Ipv4Addr,
    pub prefix: u8,
    pub gateway: Ipv4Addr,
    pub dns: Vec<Ipv4Addr>,
}
