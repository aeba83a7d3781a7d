//! Bodies of requests about instances.

use std::collections::BTreeMap;

use schemars::JsonSchema;

use super::policy::{AutoStandbyRequest, HealthCheckRequest, RestartPolicyRequest, SnapshotPolicyRequest};
use super::volume::VolumeMountRequest;
use crate::api::schema::{
    Arguments, EnvChanges, EnvMap, ImageReference, NewName, RateText, Size, TagMap, Time,
};
use crate::instance::Hypervisor;
use crate::limits;
use crate::names::Platform;
use crate::quantity::GoDuration;

/// The body of `POST /instances`.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct InstanceCreate {
    /// Name of the instance, unique on this host. It may not have the form of an id.
    pub name: NewName,
    /// Image to boot. It is pulled when this host does not have it.
    pub image: ImageReference,
    /// Key-value pairs for filters of lists.
    pub tags: Option<TagMap>,
    /// Platform of the image. Only the platform of this host can be run.
    pub platform: Option<Platform>,
    /// Rule for an image that this host has already; `missing` by default.
    pub pull: Option<Pull>,
    /// Program that runs the VM; the server's configuration decides by default. `/capabilities` lists the
    /// hypervisors of this host; others are refused.
    pub hypervisor: Option<Hypervisor>,
    /// Number of virtual CPUs; 2 by default.
    #[schemars(range(min = 1, max = limits::VCPUS_MAX))]
    pub vcpus: Option<u32>,
    /// Memory, from 96 MB to 32 GB; 1 GB by default.
    pub size: Option<Size>,
    /// Size of the writable layer over the image, from 16 MB to 100 GB; 10 GB by default.
    pub overlay_size: Option<Size>,
    /// Environment variables of the program, 256 KiB in total. Values are secrets.
    pub env: Option<EnvMap>,
    /// Replacement of the image's entrypoint.
    pub entrypoint: Option<Arguments>,
    /// Replacement of the image's command.
    pub cmd: Option<Arguments>,
    /// Network of the instance.
    pub network: Option<NetworkRequest>,
    /// True to leave out the agent inside the guest. Exec, copies, stat and health checks of the type `exec`
    /// need it.
    pub skip_guest_agent: Option<bool>,
    /// True to leave out the headers of the guest's kernel.
    pub skip_kernel_headers: Option<bool>,
    /// Policy of restarts of the program.
    pub restart_policy: Option<RestartPolicyRequest>,
    /// Time to live, at most 87600 hours; `0s` means no limit. It excludes `expires_at`.
    pub ttl: Option<GoDuration>,
    /// Time of expiry, which must be in the future. It excludes `ttl`.
    pub expires_at: Option<Time>,
    /// Check of the program's health.
    pub health_check: Option<HealthCheckRequest>,
    /// Policy of the compression of snapshots and standbys.
    pub snapshot_policy: Option<SnapshotPolicyRequest>,
    /// Policy of standby while no client is connected.
    pub auto_standby: Option<AutoStandbyRequest>,
    /// Volumes to mount. They need at most 23 devices; a mount with an overlay needs two.
    pub volumes: Option<Vec<VolumeMountRequest>>,
    /// Memory on top of `size` that the guest can give back and get again while it runs, up to 32 GB, in whole blocks of
    /// 128 MB; none by default.
    pub hotplug_size: Option<Size>,
    /// Part of the hotplug memory that the guest should have; all of it by default.
    pub hotplugged_size: Option<Size>,
    /// Limit of the bytes that are read and written on the root disk and all volumes together, from 1 MB/s to 1 TB/s; a
    /// rate of 0, which is the default, means no limit. Disks that were idle have four times as much for three seconds.
    pub disk_io_bps: Option<RateText>,
    /// PCI devices to pass through. They are not supported yet: only an empty list is accepted.
    #[schemars(length(max = 0))]
    pub devices: Option<Vec<String>>,
    /// Virtual GPU. It is not supported yet: only an empty profile is accepted.
    pub gpu: Option<GpuRequest>,
    /// Credentials that mediated egress injects, by the variable in the guest, which has a placeholder as its value.
    #[schemars(extend("maxProperties" = 64))]
    pub credentials: Option<BTreeMap<String, CredentialRequest>>,
}

/// The rule for an image that this host has already.
#[derive(Debug, JsonSchema)]
#[schemars(rename_all = "lowercase")]
pub enum Pull {
    /// The image is used as it is.
    Missing,
    /// The registry is asked what the reference means now.
    Always,
}

/// The network of an instance.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct NetworkRequest {
    /// True to connect the instance to the network of the host, which is the default.
    pub enabled: Option<bool>,
    /// Limit of the rate toward the guest, from 64kbps to 400Gbps; 0 means no limit. The default is a part of the
    /// host's network by the processors of the instance, where the speed of that network is known.
    pub bandwidth_download: Option<RateText>,
    /// Limit of the rate from the guest, with the same bounds and default.
    pub bandwidth_upload: Option<RateText>,
    /// Mediated egress.
    pub egress: Option<EgressRequest>,
}

/// Mediated egress: connections of the guest pass through a proxy.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct EgressRequest {
    /// True to mediate. It is decided when the instance is created.
    pub enabled: Option<bool>,
    /// Rule for connections that the proxy does not handle.
    pub enforcement: Option<EgressEnforcement>,
    /// An addition to Hypeman's API: the hosts that may be connected to, exact or with one leading `*.`; all by default,
    /// and none for an empty list.
    #[schemars(length(max = 64), inner(length(max = 253)))]
    pub allow_hosts: Option<Vec<String>>,
}

/// The rule for connections that the egress proxy does not handle.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct EgressEnforcement {
    /// Connections that must pass through the proxy; `all` by default.
    pub mode: Option<EgressMode>,
}

/// The connections that must pass through the egress proxy.
#[derive(Debug, JsonSchema)]
#[schemars(rename_all = "snake_case")]
pub enum EgressMode {
    /// All TCP connections.
    All,
    /// Connections of HTTP and HTTPS only.
    HttpHttpsOnly,
    /// The same as `all`.
    AllTraffic,
    /// An addition to Hypeman's API: all connections pass the proxy, which refuses none and injects nothing.
    Observe,
}

/// A virtual GPU.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct GpuRequest {
    /// Profile of the virtual GPU. It is not supported yet: only an empty text is accepted.
    #[schemars(length(max = 0))]
    pub profile: Option<String>,
}

/// A credential that mediated egress injects.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct CredentialRequest {
    /// Source of the real value.
    pub source: CredentialSource,
    /// Places where the value is injected.
    #[schemars(length(min = 1))]
    pub inject: Vec<CredentialInjection>,
}

/// The source of a credential's value.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct CredentialSource {
    /// Variable of `env` that has the value.
    pub env: String,
}

/// A place where a credential's value is injected.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct CredentialInjection {
    /// Host names of the requests, exact or with one leading `*.`; all by default.
    #[schemars(length(max = 64), inner(length(max = 253)))]
    pub hosts: Option<Vec<String>>,
    /// Header of the request.
    #[schemars(rename = "as")]
    pub target: HeaderFormat,
}

/// A header with its format.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct HeaderFormat {
    /// Name of the header.
    pub header: String,
    /// Value of the header, which contains `${value}`.
    #[schemars(regex(pattern = r"[$][{]value[}]"))]
    pub format: String,
}

/// The body of `PATCH /instances/{id}`: the fields that it contains are changed. One field at least is
/// required.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields, extend("minProperties" = 1))]
pub struct InstanceUpdate {
    /// New name, unique on this host. It applies at once; the guest has it as its host name from the next start on.
    pub name: Option<NewName>,
    /// New image, from the next start on. It is pulled at once when this host does not have it, and with `restart` the
    /// program runs on until it is there. The root file system then begins anew with it: the files that the program
    /// wrote outside of its volumes are lost.
    pub image: Option<ImageReference>,
    /// Platform of the image. Only the platform of this host can be run.
    pub platform: Option<Platform>,
    /// Rule for an image that this host has already; `missing` by default. `always` begins the root file system anew
    /// with what the reference means now, even if `image` is the present image or is not given.
    pub pull: Option<Pull>,
    /// New tags, which replace all tags. They apply at once.
    pub tags: Option<TagMap>,
    /// New policy of restarts. It applies at once.
    pub restart_policy: Option<RestartPolicyRequest>,
    /// New time to live from now on, at most 87600 hours; `0s` means no limit. It excludes `expires_at`.
    pub ttl: Option<GoDuration>,
    /// New time of expiry, which must be in the future. It excludes `ttl`.
    pub expires_at: Option<Time>,
    /// New check of the program's health; the type `none` removes the check. It applies at once.
    pub health_check: Option<HealthCheckRequest>,
    /// New policy of standby while no client is connected. It applies at once.
    pub auto_standby: Option<AutoStandbyRequest>,
    /// New policy of the compression of snapshots and standbys, for the next of them.
    pub snapshot_policy: Option<SnapshotPolicyRequest>,
    /// New limit of the disks, which applies at once; a rate of 0 removes the limit.
    pub disk_io_bps: Option<RateText>,
    /// New connection to the network, and new limits of the traffic.
    pub network: Option<NetworkUpdate>,
    /// PCI devices to pass through. They are not supported yet: only an empty list is accepted.
    #[schemars(length(max = 0))]
    pub devices: Option<Vec<String>>,
    /// Virtual GPU. It is not supported yet: only an empty profile is accepted.
    pub gpu: Option<GpuRequest>,
    /// Credentials that mediated egress injects. They are decided when the instance is created: only an empty object is
    /// accepted.
    #[schemars(extend("maxProperties" = 0))]
    pub credentials: Option<BTreeMap<String, CredentialRequest>>,
    /// All volumes that the instance should have mounted. Others are unmounted, and those that are missing are mounted,
    /// while the program runs; a volume that is in use stays until it is not. An instance in standby is refused.
    pub volumes: Option<Vec<VolumeMountRequest>>,
    /// New number of virtual CPUs, from the next start on.
    #[schemars(range(min = 1, max = limits::VCPUS_MAX))]
    pub vcpus: Option<u32>,
    /// New memory, from the next start on.
    pub size: Option<Size>,
    /// New hotplug memory, from the next start on.
    pub hotplug_size: Option<Size>,
    /// New part of the hotplug memory that the guest should have, at most all of it. It applies at once: a guest that runs
    /// gives memory back or gets it.
    pub hotplugged_size: Option<Size>,
    /// New size of the writable layer over the image, which is at least the present one, from the next start on.
    pub overlay_size: Option<Size>,
    /// New values of variables, from the next start on; null removes a variable. Others stay.
    pub env: Option<EnvChanges>,
    /// New entrypoint, from the next start on.
    pub entrypoint: Option<Arguments>,
    /// New command, from the next start on.
    pub cmd: Option<Arguments>,
    /// New program that runs the VM, from the next start on.
    pub hypervisor: Option<Hypervisor>,
    /// True to leave out the agent inside the guest, from the next start on.
    pub skip_guest_agent: Option<bool>,
    /// True to leave out the headers of the guest's kernel, from the next start on.
    pub skip_kernel_headers: Option<bool>,
    /// True to start a program that runs again, so that it sees the changes now, or once a new image is on this host. An
    /// instance that does not run is not started.
    pub restart: Option<bool>,
}

/// The parts of an instance's network that are changed.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct NetworkUpdate {
    /// True to connect the instance to the network of the host, false to disconnect it, from the next start on. Its
    /// addresses are taken at once.
    pub enabled: Option<bool>,
    /// New limit of the rate toward the guest, from 64kbps to 400Gbps; 0 means no limit. It applies at once.
    pub bandwidth_download: Option<RateText>,
    /// New limit of the rate from the guest, with the same bounds. It applies at once.
    pub bandwidth_upload: Option<RateText>,
    /// Mediated egress.
    pub egress: Option<EgressRequest>,
}

/// The optional body of `POST /instances/{id}/start`: the fields that it contains replace the stored values.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct InstanceStart {
    /// Replacement of the entrypoint.
    pub entrypoint: Option<Arguments>,
    /// Replacement of the command.
    pub cmd: Option<Arguments>,
}
