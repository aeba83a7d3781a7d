//! The server's description of itself and of the host.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The response to `GET /health`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Health {
    /// Health of the server, in a word.
    pub status: ServerHealth,
    /// Reason of a failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// The health of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ServerHealth {
    Ok,
    /// The store cannot write any more.
    Failed,
}

/// The response to `GET /capabilities`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Capabilities {
    /// Version of the server.
    pub server: ServerView,
    /// Machine that the server runs on.
    pub host: HostView,
    /// Hypervisor of instances whose request names none.
    pub default_runtime: Runtime,
    /// The runtimes, sorted by name.
    pub runtimes: Vec<RuntimeView>,
    /// Network of the instances.
    pub network: NetworkModel,
    /// Platforms of images.
    pub images: ImagesView,
    /// Features of the server.
    pub features: Vec<String>,
}

/// The version of the server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "CapabilitiesServer")]
pub struct ServerView {
    /// Version of the server.
    pub version: String,
    /// Version of the API.
    pub api_version: String,
}

/// The machine that the server runs on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "CapabilitiesHost")]
pub struct HostView {
    /// Operating system.
    pub os: String,
    /// Architecture of the processor.
    pub arch: String,
    /// An addition to Hypeman's API: true if VMMs run in control groups of their own.
    pub cgroups: bool,
    /// An addition to Hypeman's API: true if the kernel can move the frames of guests on KVM (vhost-net).
    #[serde(default)]
    pub vhost_net: bool,
    /// An addition to Hypeman's API: walls that VMMs are not behind, because the kernel of this host lacks them.
    #[serde(default)]
    pub missing_walls: Vec<String>,
    /// An addition to Hypeman's API: the reason why no VM can be started on the accelerator that the configuration
    /// demands.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accelerator_problem: Option<String>,
}

/// The default hypervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "CapabilitiesDefaultRuntime")]
pub struct Runtime {
    /// Name of the hypervisor.
    pub name: String,
    /// True if it is installed.
    pub available: bool,
}

/// A hypervisor with its features.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "CapabilitiesRuntime")]
pub struct RuntimeView {
    /// Name of the hypervisor.
    pub name: String,
    /// True if it is installed.
    pub available: bool,
    /// Features of the hypervisor.
    pub features: Vec<String>,
    /// An addition to Hypeman's API: `kvm`, or `tcg` where a stock kernel cannot use KVM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accelerator: Option<String>,
}

/// The network of the instances.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "CapabilitiesNetwork")]
pub struct NetworkModel {
    /// Way in which instances are connected: `bridge` or `nat`.
    pub model: String,
    /// True if instances reach each other.
    pub guest_to_guest: bool,
    /// Address of the host in the network.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
    /// Subnet of the instances.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subnet: Option<String>,
}

/// The platforms of images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "CapabilitiesImages")]
pub struct ImagesView {
    /// Platforms of images that can be run.
    pub platforms: Vec<String>,
    /// Platform of images whose request names none.
    pub default_platform: String,
}

/// Resource usage of an instance; traffic is counted from the guest's side.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct InstanceStats {
    /// Id of the instance.
    pub instance_id: String,
    /// Name of the instance.
    pub instance_name: String,
    /// CPU time of the VM, in seconds.
    pub cpu_seconds: f64,
    /// Memory of the host that the VM uses, in bytes.
    pub memory_rss_bytes: u64,
    /// Size of the address space of the VM, in bytes.
    pub memory_vms_bytes: u64,
    /// Bytes that the guest received.
    pub network_rx_bytes: u64,
    /// Bytes that the guest sent.
    pub network_tx_bytes: u64,
    /// Number of virtual CPUs.
    pub allocated_vcpus: u32,
    /// Memory of the guest, in bytes.
    pub allocated_memory_bytes: u64,
    /// Used memory of the host, divided by the memory of the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_utilization_ratio: Option<f64>,
}
