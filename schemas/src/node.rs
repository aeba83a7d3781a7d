//! Node: a host that runs VMs. There is an object for each host; today there is one host.
//!
//! The spec says what the configuration says, and the status what was observed. Admission and the API read it:
//! nothing else in the control plane knows facts of a host.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::capabilities::VmmCapabilities;
use crate::condition::Condition;
use crate::confinement::Wall;
use crate::instance::Hypervisor;
use crate::limits::{BANDWIDTH_MAX, BANDWIDTH_MIN};
use crate::meta::{Kind, Object};
use crate::names::Platform;
use crate::numbers::Generation;
use crate::quantity::{Bytes, Rate};
use crate::resource::{PerResource, Ratio};

/// Name of the node of this host.
pub const LOCAL: &str = "local";

/// The kind of nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Node {}

impl Kind for Node {
    const NAME: &'static str = "node";
    const FINALIZER: &'static str = "node";
    type Spec = NodeSpec;
    type Status = NodeStatus;
}

/// The configuration of a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeSpec {
    /// The platform of guests, which is that of the daemon's own program.
    pub platform: Platform,
    /// The hypervisor of instances that name none.
    pub default_hypervisor: Hypervisor,
    /// Space that stays free on the file system of the data, in bytes.
    pub disk_reserve: Bytes,
    /// Memory that stays free for the host itself, in bytes.
    #[serde(default)]
    pub memory_reserve: Bytes,
    /// Capacities that are configured. All others are those of the host.
    #[serde(default)]
    pub capacity: PerResource<Option<u64>>,
    #[serde(default = "PerResource::standard")]
    pub oversubscription: PerResource<Ratio>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// The size of the host.
    pub capacity: Resources,
    /// The part of the capacity that instances may use.
    pub allocatable: Resources,
    /// The space that images take, as it was observed last.
    #[serde(default)]
    pub images: ImageSpace,
    /// All hypervisors that have a driver, whether their programs are installed or not.
    #[serde(default)]
    pub hypervisors: BTreeMap<Hypervisor, HypervisorStatus>,
    /// The accelerator; `None` before the first observation.
    #[serde(default)]
    pub accelerator: Option<Accelerator>,
    /// True if guests can be given the headers of their kernel.
    #[serde(default)]
    pub has_kernel_headers: bool,
    /// True if VMMs run in control groups of their own.
    #[serde(default)]
    pub has_cgroups: bool,
    /// True if the kernel can move the frames of guests.
    #[serde(default)]
    pub has_vhost_net: bool,
    /// Speed of the slowest link with a default route; `None` if no such link has a known speed.
    #[serde(default)]
    pub uplink_speed: Option<Rate>,
    /// The reason why no VM can be started on the accelerator that the configuration demands.
    #[serde(default)]
    pub accelerator_problem: Option<String>,
    /// Walls that VMMs of this host are not behind, because its kernel lacks them.
    #[serde(default)]
    pub missing_walls: BTreeSet<Wall>,
    pub conditions: Vec<Condition>,
    pub observed_generation: Generation,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    pub cpus: u32,
    pub memory: Bytes,
    /// Size of the file system of the data, in bytes.
    pub disk: Bytes,
}

/// Disk space of images, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSpace {
    /// Root file systems that are complete.
    pub content: Bytes,
    /// Layers, manifests, and what is incomplete.
    pub cache: Bytes,
}

/// A hypervisor on a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HypervisorStatus {
    /// True if VMs can be launched on it now: its program is installed.
    pub is_available: bool,
    pub capabilities: VmmCapabilities,
}

/// The way in which guests' instructions are executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accelerator {
    Kvm,
    /// Emulation: works everywhere, slowly.
    Tcg,
}

impl Accelerator {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// The choices that a node offers to a request, and its defaults.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeOffer {
    pub platform: Platform,
    pub default_hypervisor: Hypervisor,
    /// The hypervisors that VMs can be launched on now. The default may be missing among them, because a
    /// program may be installed later.
    pub hypervisors: BTreeSet<Hypervisor>,
}

impl Object<Node> {
    /// True if the status is an observation. Before the first observation it says nothing.
    #[must_use]
    pub fn is_observed(&self) -> bool {
        self.status.accelerator.is_some()
    }

    #[must_use]
    pub fn offer(&self) -> NodeOffer {
        let all = self.status.hypervisors.iter();
        let available = all.filter(|(_, status)| status.is_available).map(|(hypervisor, _)| *hypervisor);
        NodeOffer {
            platform: self.spec.platform,
            default_hypervisor: self.spec.default_hypervisor,
            hypervisors: available.collect(),
        }
    }

    /// Returns the speed of the host's network in each direction; `None` if it is not known or has no limit.
    #[must_use]
    pub fn network_capacity(&self) -> Option<Rate> {
        let configured = self.spec.capacity.network.map(Rate);
        configured.or(self.status.uplink_speed).filter(|capacity| capacity.0 > 0)
    }

    /// Returns the limit of the traffic in each direction of an instance that names none: its part of the host's
    /// network by its processors. Returns `None` for no limit.
    #[must_use]
    pub fn default_bandwidth(&self, vcpus: u32) -> Option<Rate> {
        let capacity = self.network_capacity()?;
        let given_away = self.spec.oversubscription.network.of(capacity.0);
        let part =
            given_away.saturating_mul(u128::from(vcpus)) / u128::from(self.status.capacity.cpus.max(1));
        let part = u64::try_from(part).unwrap_or(u64::MAX).min(capacity.0);
        Some(Rate(part.clamp(BANDWIDTH_MIN.0, BANDWIDTH_MAX.0)))
    }

    /// Returns what VMs on a hypervisor can do, or `None` if this host has no driver for it.
    #[must_use]
    pub fn capabilities(&self, hypervisor: Hypervisor) -> Option<VmmCapabilities> {
        self.status.hypervisors.get(&hypervisor).map(|status| status.capabilities)
    }
}
