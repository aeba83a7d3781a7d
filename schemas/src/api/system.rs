//! The server's description of itself and of the host.

use serde::{Deserialize, Serialize};

/// The response to `GET /capabilities`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    pub server: ServerView,
    pub host: HostView,
    pub default_runtime: Runtime,
    /// The runtimes, sorted by name.
    pub runtimes: Vec<RuntimeView>,
    pub network: NetworkModel,
    pub images: ImagesView,
    pub features: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerView {
    pub version: String,
    pub api_version: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostView {
    pub os: String,
    pub arch: String,
    /// Additive: true if VMMs run in control groups of their own.
    pub cgroups: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Runtime {
    pub name: String,
    pub available: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuntimeView {
    pub name: String,
    pub available: bool,
    pub features: Vec<String>,
    /// Additive: `kvm`, or `tcg` where a stock kernel cannot use KVM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accelerator: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkModel {
    pub model: String,
    pub guest_to_guest: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subnet: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImagesView {
    pub platforms: Vec<String>,
    pub default_platform: String,
}

/// Resource usage of an instance; traffic is counted from the guest's side.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct InstanceStats {
    pub instance_id: String,
    pub instance_name: String,
    pub cpu_seconds: f64,
    pub memory_rss_bytes: u64,
    pub memory_vms_bytes: u64,
    pub network_rx_bytes: u64,
    pub network_tx_bytes: u64,
    pub allocated_vcpus: u32,
    pub allocated_memory_bytes: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_utilization_ratio: Option<f64>,
}
