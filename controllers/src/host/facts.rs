//! Facts of the host as a whole: its size, its hypervisors and what guests get from it.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;

use stead_schemas::confinement::Wall;
use stead_schemas::instance::Hypervisor;
use stead_schemas::node::{Accelerator, HypervisorStatus, ImageSpace, Resources};
use stead_schemas::quantity::Rate;

use super::HostError;

/// An observation of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostSeen {
    pub capacity: Resources,
    /// The space that images take.
    pub images: ImageSpace,
    /// All hypervisors that have a driver, whether their programs are installed or not.
    pub hypervisors: BTreeMap<Hypervisor, HypervisorStatus>,
    pub accelerator: Accelerator,
    pub has_kernel_headers: bool,
    pub has_cgroups: bool,
    /// True if the kernel can move the frames of guests.
    pub has_vhost_net: bool,
    /// Speed of the slowest link with a default route; `None` if no such link has a known speed.
    pub uplink_speed: Option<Rate>,
    /// The reason why no VM can be started on the accelerator that the configuration demands.
    pub accelerator_problem: Option<String>,
    /// Walls that VMMs of this host are not behind, because its kernel lacks them.
    pub missing_walls: BTreeSet<Wall>,
}

/// The facts of this host.
pub trait Facts: Send + Sync + 'static {
    fn inspect(&self) -> impl Future<Output = Result<HostSeen, HostError>> + Send;
}
