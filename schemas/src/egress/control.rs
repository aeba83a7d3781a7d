//! The messages between the daemon and the process that carries egress.
//!
//! ```text
//! request = length(4, big-endian) JSON     reply = the same
//! ```
//! A connection carries one request and its reply. A request with a policy brings two files by SCM_RIGHTS: those of the
//! audit log of its instance.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::policy::Policy;
use crate::names::Uid;
use crate::network::Cidr;

/// The ports at which the process listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MediatorPorts {
    /// TCP connections that the kernel redirects.
    pub captured: u16,
    /// Clients that know the proxy.
    pub explicit: u16,
    /// Questions for names, by UDP and TCP.
    pub names: u16,
}

/// The settings of the process, fixed at its start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MediatorSettings {
    /// Address of the host at which the process listens: the gateway of the first network.
    pub address: Ipv4Addr,
    pub ports: MediatorPorts,
    /// Subnet of the guests.
    pub subnet: Cidr,
    /// Name servers that are asked for names.
    pub dns: Vec<IpAddr>,
    /// Networks of the host, or private ones, that guests may reach through the proxy.
    pub open: BTreeSet<IpNet>,
}

/// A request of the daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ControlRequest {
    /// Asks for the state of the process.
    State,
    /// Asks for the policy of an instance.
    Inspect(Uid),
    /// Sets the policy of an instance.
    Put(Box<Policy>),
    /// Removes the policy of an instance and cuts its connections.
    Remove(Uid),
}

/// The reply of the process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ControlReply {
    State(MediatorState),
    /// The fingerprint of the policy that was asked for, or `None` without one.
    Policy(Option<String>),
    Done,
    /// The request cannot be carried out; nothing was changed.
    Refused(String),
}

/// The state of the process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MediatorState {
    /// Version of the program.
    pub version: String,
    pub settings: MediatorSettings,
    /// The fingerprints of the policies by their owners.
    pub policies: BTreeMap<Uid, String>,
}
