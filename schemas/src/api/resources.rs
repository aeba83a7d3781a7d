//! The resources of the host: what there is, what is promised, and to whom.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::instance::Instance;
use crate::meta::Object;
use crate::node::Node;
use crate::resource::{Resource, Usage};
use crate::volume::Access;

/// The response to `GET /resources`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Resources {
    /// Virtual processors.
    pub cpu: ResourceStatus,
    /// Memory in bytes. Each VM is counted with its VMM.
    pub memory: ResourceStatus,
    /// Disk space in bytes: sizes of disks, and the space of images.
    pub disk: ResourceStatus,
    /// Traffic of the network in bytes per second: the larger of both directions.
    pub network: ResourceStatus,
    /// Traffic of disks in bytes per second.
    pub disk_io: ResourceStatus,
    /// Instances that hold processors and memory, forks that are held ready included.
    pub allocations: Vec<ResourceAllocation>,
    /// Parts of the allocated disk space.
    pub disk_breakdown: DiskBreakdown,
    /// GPUs, of which this server manages none: always null.
    pub gpu: Option<GpuResourceStatus>,
}

/// A resource of the host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ResourceStatus {
    /// Name of the resource.
    #[serde(rename = "type")]
    pub kind: String,
    /// Amount that the host has; 0 if that is not known, and then there is no limit.
    pub capacity: u64,
    /// Amount that may be allocated: the capacity without the reserve, times the factor.
    pub effective_limit: u64,
    /// Amount that is allocated.
    pub allocated: u64,
    /// Amount that is left.
    pub available: u64,
    /// Factor of oversubscription.
    pub oversub_ratio: f64,
    /// Source of the capacity: `detected` or `configured`; missing if it is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// An addition to Hypeman's API: amount that is kept for the host itself.
    #[serde(default)]
    pub reserve: u64,
}

/// The resources that an instance holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ResourceAllocation {
    /// Id of the instance.
    pub instance_id: String,
    /// Name of the instance.
    pub instance_name: String,
    /// Number of virtual processors.
    pub cpu: u32,
    /// Memory in bytes, that of the VMM included.
    pub memory_bytes: u64,
    /// Sizes of its own disks in bytes: its overlay, and those over volumes.
    pub disk_bytes: u64,
    /// Limit on the traffic of its disks in bytes per second; 0 without a limit.
    pub disk_io_bps: u64,
    /// Limit on the traffic to it in bytes per second; 0 without a limit.
    pub network_download_bps: u64,
    /// Limit on the traffic from it in bytes per second; 0 without a limit.
    pub network_upload_bps: u64,
}

/// Parts of the allocated disk space.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskBreakdown {
    /// Space of root file systems in bytes.
    pub images_bytes: u64,
    /// Space of layers and of incomplete images in bytes.
    pub oci_cache_bytes: u64,
    /// Sizes of the overlays of instances in bytes, those of stopped instances included.
    pub overlays_bytes: u64,
    /// Sizes of volumes in bytes.
    pub volumes_bytes: u64,
}

/// GPUs of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "GPUResourceStatus")]
pub struct GpuResourceStatus {
    /// Way in which instances get GPUs: `vgpu` or `passthrough`.
    pub mode: String,
    /// Number of places for instances.
    pub total_slots: u32,
    /// Number of places that are taken.
    pub used_slots: u32,
}

impl Resources {
    /// Makes the view of a host. Instances and usage are of the same commit, so that the sums of the list equal what is
    /// allocated.
    #[must_use]
    pub fn of<'a>(
        node: &Object<Node>,
        usage: &Usage,
        instances: impl IntoIterator<Item = &'a Object<Instance>>,
    ) -> Self {
        let holding = instances.into_iter().filter(|instance| instance.holds_resources());
        let [cpu, memory, disk, network, disk_io] =
            Resource::ALL.map(|resource| ResourceStatus::of(node, resource, usage));
        let images = node.status.images;
        Self {
            cpu,
            memory,
            disk,
            network,
            disk_io,
            allocations: holding.map(ResourceAllocation::of).collect(),
            disk_breakdown: DiskBreakdown {
                images_bytes: images.content.0,
                oci_cache_bytes: images.cache.0,
                overlays_bytes: bounded(usage.overlays),
                volumes_bytes: bounded(usage.volumes),
            },
            gpu: None,
        }
    }
}

impl ResourceStatus {
    fn of(node: &Object<Node>, resource: Resource, usage: &Usage) -> Self {
        let budget = node.budget(resource);
        let allocated = node.allocated(resource, usage);
        let limit = budget.limit().unwrap_or_default();
        let source = if budget.is_configured { "configured" } else { "detected" };
        Self {
            kind: resource.as_str().to_owned(),
            capacity: budget.capacity,
            effective_limit: bounded(limit),
            allocated: bounded(allocated),
            available: bounded(limit.saturating_sub(allocated)),
            oversub_ratio: budget.oversubscription.as_f64(),
            source: (budget.capacity > 0).then(|| source.to_owned()),
            reserve: budget.reserve,
        }
    }
}

impl ResourceAllocation {
    fn of(instance: &Object<Instance>) -> Self {
        let (spec, demand) = (&instance.spec, instance.spec.demand());
        let over_volumes = spec.volumes.iter().map(|mount| match &mount.access {
            Access::Overlay { size, .. } => size.0,
            Access::ReadWrite | Access::ReadOnly => 0,
        });
        Self {
            instance_id: instance.meta.uid.to_string(),
            instance_name: instance.meta.name.to_string(),
            cpu: spec.vcpus,
            memory_bytes: bounded(demand.memory),
            disk_bytes: over_volumes.fold(spec.overlay.0, u64::saturating_add),
            disk_io_bps: bounded(demand.disk_io),
            network_download_bps: bounded(demand.download),
            network_upload_bps: bounded(demand.upload),
        }
    }
}

/// Returns an amount as the wire's integers can have it.
fn bounded(amount: u128) -> u64 {
    u64::try_from(amount).unwrap_or(u64::MAX).min(i64::MAX.unsigned_abs())
}
