//! Instances on the wire: the contents of a create request, and the view that clients read.

use std::collections::BTreeMap;
use std::str::FromStr;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::compression::SnapshotPolicyView;
use super::egress::{EgressAsked, EgressView};
use super::fields::Fields;
use super::health::{HealthCheckView, HealthView, check_fits};
use super::hotplug::{HOTPLUGGED, HotplugAsked, check_part};
use super::network::NetworkAsked;
use super::pending::{Applies, PendingView};
use super::policy::RestartView;
use super::schema::{TagMap, Time};
use super::volume::{MountRequest, MountView};
use super::{auto_standby, compression, env, health, policy, rates, sizes, unsupported, volume};
use crate::compression::SnapshotPolicy;
use crate::condition::Condition;
use crate::egress::{CertificateAuthority, EgressSpec, placeholder};
use crate::health::HealthCheck;
use crate::instance::{Hypervisor, Instance as Kind, InstanceSpec, PowerCause, Rates, Secret, State};
use crate::limits;
use crate::meta::{Object, Tags};
use crate::names::{ImageRef, Name, Platform};
use crate::network::NicSpec;
use crate::node::NodeOffer;
use crate::numbers::Generation;
use crate::policy::{AutoStandbyPolicy, Expiry, RestartPolicy, RestartWhen};
use crate::quantity::Bytes;
use crate::validate::{FieldErrors, tags as check_tags};

const INVALID: &str = "invalid_request";

/// A create request that was read without a problem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstanceRequest {
    pub name: Name,
    pub tags: Tags,
    pub image: ImageRef,
    pub platform: Platform,
    /// True if the registry is asked what the reference means now, even when the image is already present
    /// under this name.
    pub pulls_always: bool,
    pub vcpus: u32,
    pub memory: Bytes,
    pub hotplug: Bytes,
    /// The part of the hotplug memory that the guest should have; `None` means all of it.
    pub hotplugged: Option<Bytes>,
    pub overlay: Bytes,
    /// The limits of traffic that the request names.
    pub rates: Rates,
    pub env: BTreeMap<String, Secret>,
    /// Mediated egress; its authority is empty until [`InstanceRequest::certify`] sets one.
    pub egress: Option<EgressSpec>,
    pub entrypoint: Option<Vec<String>>,
    pub cmd: Option<Vec<String>>,
    pub has_network: bool,
    pub hypervisor: Hypervisor,
    pub skip_guest_agent: bool,
    pub skip_kernel_headers: bool,
    pub restart: RestartPolicy,
    pub expiry: Expiry,
    pub health: Option<HealthCheck>,
    pub snapshot_policy: Option<SnapshotPolicy>,
    pub auto_standby: Option<AutoStandbyPolicy>,
    pub volumes: Vec<MountRequest>,
}

impl InstanceRequest {
    /// Reads the body of `POST /instances`.
    ///
    /// # Errors
    /// Returns every problem of the body, each with its path.
    pub fn read(body: Value, node: &NodeOffer) -> Result<Self, FieldErrors> {
        let mut errors = FieldErrors::default();
        let mut fields = Fields::body(body, &mut errors);
        let name = fields.required_text("name", &mut errors).and_then(|text| name(&text, &mut errors));
        let image = fields.required_text("image", &mut errors).and_then(|text| image(&text, &mut errors));
        let tags = fields.map("tags", &mut errors).unwrap_or_default();
        check_tags(&mut errors, "tags", &tags);
        let platform = platform(&mut fields, node.platform, &mut errors).unwrap_or(node.platform);
        let pulls_always = pulls_always(&mut fields, &mut errors);
        let hypervisor = hypervisor(&mut fields, "hypervisor", node, &mut errors);
        let vcpus = fields.number("vcpus", 1..=limits::VCPUS_MAX, &mut errors);
        let memory = sizes::memory(&mut fields, &mut errors);
        let hotplug = HotplugAsked::read(&mut fields, &mut errors);
        errors.take(HOTPLUGGED, INVALID, check_part(hotplug.part, hotplug.size.unwrap_or_default()));
        let overlay = sizes::overlay(&mut fields, &mut errors);
        let disk_rate = rates::disk(&mut fields, &mut errors);
        let env = env::read(&mut fields, &mut errors);
        let entrypoint = argv(&mut fields, "entrypoint", &mut errors);
        let cmd = argv(&mut fields, "cmd", &mut errors);
        let mut egress = EgressAsked::default();
        let network = NetworkAsked::read_with(&mut fields, &mut errors, |network, errors| {
            egress = EgressAsked::read(network, errors);
        });
        let has_network = network.enabled.unwrap_or(true);
        let egress = egress.with_credentials(&mut fields, &env, has_network, &mut errors);
        let skip_guest_agent = fields.flag("skip_guest_agent", &mut errors).unwrap_or(false);
        let skip_kernel_headers = fields.flag("skip_kernel_headers", &mut errors).unwrap_or(false);
        let restart = policy::restart(&mut fields, &mut errors).unwrap_or_default();
        let expiry = policy::expiry(&mut fields, &mut errors).unwrap_or(Expiry::Never);
        let health = health::health_check(&mut fields, &mut errors).flatten();
        if let Some(Err(why)) = health.as_ref().map(|check| check_fits(check, has_network, !skip_guest_agent))
        {
            errors.push("health_check.type", health::INVALID, why);
        }
        let snapshot_policy = compression::policy(&mut fields, &mut errors);
        let auto_standby = auto_standby::policy(&mut fields, &mut errors);
        let volumes = volume::mounts(&mut fields, &mut errors);
        unsupported::refuse_fields(&mut fields, &mut errors);
        fields.finish(&mut errors);
        match (name, image) {
            (Some(name), Some(image)) if errors.is_empty() => Ok(Self {
                name,
                tags,
                image,
                platform,
                pulls_always,
                vcpus: vcpus.unwrap_or(limits::VCPUS_DEFAULT),
                memory: memory.unwrap_or(limits::MEMORY_DEFAULT),
                hotplug: hotplug.size.unwrap_or_default(),
                hotplugged: hotplug.part,
                overlay: overlay.unwrap_or(limits::OVERLAY_DEFAULT),
                rates: network.bandwidth.changed(Rates { disk: disk_rate, ..Rates::default() }),
                env,
                egress,
                entrypoint,
                cmd,
                has_network,
                hypervisor: hypervisor.unwrap_or(node.default_hypervisor),
                skip_guest_agent,
                skip_kernel_headers,
                restart,
                expiry,
                snapshot_policy,
                health,
                auto_standby,
                volumes,
            }),
            _ => Err(errors),
        }
    }

    /// Gives the instance a certificate authority, if its egress is mediated.
    ///
    /// # Errors
    /// Returns the error of `make`.
    pub fn certify<E>(&mut self, make: impl FnOnce() -> Result<CertificateAuthority, E>) -> Result<(), E> {
        if let Some(egress) = &mut self.egress {
            egress.authority = make()?;
        }
        Ok(())
    }
}

/// Parses the name of a new instance, or the new name of an instance.
pub(super) fn name(text: &str, errors: &mut FieldErrors) -> Option<Name> {
    errors.take("name", INVALID, Name::new_resource(text))
}

/// Parses the reference of an image.
pub(super) fn image(text: &str, errors: &mut FieldErrors) -> Option<ImageRef> {
    errors.take("image", "invalid_name", text.parse())
}

pub(super) fn pulls_always(fields: &mut Fields, errors: &mut FieldErrors) -> bool {
    match fields.text("pull", errors).as_deref() {
        None | Some("missing") => false,
        Some("always") => true,
        Some(_) => {
            errors.push(fields.path("pull"), INVALID, "must be missing or always");
            false
        }
    }
}

/// Reads the platform of an image, which must be that of the host.
pub(super) fn platform(fields: &mut Fields, host: Platform, errors: &mut FieldErrors) -> Option<Platform> {
    let given: Platform = fields.parsed("platform", "invalid_platform", errors)?;
    if given != host {
        let message = format!("is {}, which this host cannot run", given.as_str());
        errors.push(fields.path("platform"), "platform_not_available", message);
    }
    Some(given)
}

/// Reads the name of a hypervisor. It must be the default or available on this host.
pub(super) fn hypervisor(
    fields: &mut Fields,
    key: &str,
    node: &NodeOffer,
    errors: &mut FieldErrors,
) -> Option<Hypervisor> {
    let word = fields.text(key, errors)?;
    let Ok(known) = serde_json::from_value::<Hypervisor>(Value::String(word)) else {
        let message = "must be one of cloud-hypervisor, firecracker, qemu, qemu-microvm, vz";
        errors.push(fields.path(key), INVALID, message);
        return None;
    };
    if known == node.default_hypervisor || node.hypervisors.contains(&known) {
        return Some(known);
    }
    let message = format!("{} is not supported by this server's host", known.as_str());
    errors.push(fields.path(key), "not_supported", message);
    None
}

pub(super) fn argv(fields: &mut Fields, key: &str, errors: &mut FieldErrors) -> Option<Vec<String>> {
    fields.texts(key, limits::ARGV_MAX, limits::ARG_BYTES_MAX, errors)
}

/// The optional body of `POST …/start`: the fields it contains replace the stored values.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InstanceStart {
    pub entrypoint: Option<Vec<String>>,
    pub cmd: Option<Vec<String>>,
}

impl InstanceStart {
    /// Reads the body; an empty body changes nothing.
    ///
    /// # Errors
    /// Returns every problem of the body.
    pub fn read(body: Value) -> Result<Self, FieldErrors> {
        let mut errors = FieldErrors::default();
        let mut fields = Fields::body(body, &mut errors);
        let entrypoint = argv(&mut fields, "entrypoint", &mut errors);
        let cmd = argv(&mut fields, "cmd", &mut errors);
        fields.finish(&mut errors);
        errors.into_result().map(|()| Self { entrypoint, cmd })
    }
}

/// An instance as clients read it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Instance {
    /// Id of the instance.
    pub id: String,
    /// Name of the instance.
    pub name: String,
    /// Normalised reference of the image.
    pub image: String,
    /// Observed state.
    pub state: State,
    /// Reason why the state cannot be observed; only with the state `Unknown`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state_error: Option<String>,
    /// Time of the creation.
    #[schemars(with = "Time")]
    pub created_at: Timestamp,
    /// Time of expiry; always present, and null without a limit.
    #[schemars(with = "Option<Time>")]
    pub expires_at: Option<Timestamp>,
    /// Time of the last start.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub started_at: Option<Timestamp>,
    /// Time at which the instance last stopped.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub stopped_at: Option<Timestamp>,
    /// The program's exit code; null until the program ended.
    pub exit_code: Option<i32>,
    /// Words about the end of the program; null until it ended.
    pub exit_message: Option<String>,
    /// True if saved memory of the instance exists.
    pub has_snapshot: bool,
    /// Memory.
    pub size: String,
    /// Hotplug memory; absent without any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hotplug_size: Option<String>,
    /// An addition to Hypeman's API: the part of the hotplug memory that the guest should have; absent without hotplug
    /// memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hotplugged_size: Option<String>,
    /// An addition to Hypeman's API: bytes of the hotplug memory that the guest has, as it last reported; absent until it
    /// did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hotplugged_bytes: Option<u64>,
    /// An addition to Hypeman's API: time until which the guest does not get hotplug memory again that was taken back for
    /// the host; absent without any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub memory_held_until: Option<Timestamp>,
    /// Size of the writable layer over the image.
    pub overlay_size: String,
    /// Limit of the bytes read and written on the root disk and all volumes together; absent without a limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_io_bps: Option<String>,
    /// Number of virtual CPUs.
    pub vcpus: u32,
    /// Environment variables. Values are `***` for a token without the scope `instance:secrets`.
    pub env: BTreeMap<String, String>,
    /// Network of the instance.
    pub network: NetworkView,
    /// Mounted volumes.
    pub volumes: Vec<MountView>,
    /// Program that runs the VM.
    pub hypervisor: Hypervisor,
    /// Platform of the image.
    pub platform: Platform,
    /// Tags of the instance.
    #[schemars(with = "TagMap")]
    pub tags: Tags,
    /// Policy of restarts, unless it is `never`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart_policy: Option<RestartPolicy>,
    /// Progress of the policy of restarts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart_status: Option<RestartView>,
    /// Policy of the compression of snapshots and standbys.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_policy: Option<SnapshotPolicyView>,
    /// Check of the program's health.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_check: Option<HealthCheckView>,
    /// Result of the check.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_status: Option<HealthView>,
    /// Policy of standby while no client is connected; null without one.
    pub auto_standby: Option<AutoStandbyPolicy>,
    /// An addition to Hypeman's API: the cause of the last change of the power state in the spec: a client, idleness, or
    /// traffic.
    #[serde(default)]
    pub power_by: PowerCause,
    /// Observed state in lower case.
    pub current_phase: String,
    /// Time since which the instance is in this phase.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub current_phase_since: Option<Timestamp>,
    /// Milliseconds in each phase, including the current phase up to now.
    pub phase_durations_ms: BTreeMap<String, u64>,
    /// An addition to Hypeman's API: changes that the program sees from its next start on; absent without any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending_changes: Option<PendingView>,
    /// An addition to Hypeman's API, in the answer to a change only: the fields that it changed, and when each change
    /// applies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changes: Option<BTreeMap<String, Applies>>,
    /// An addition to Hypeman's API: conditions that report how far the host is from the spec.
    pub conditions: Vec<Condition>,
    /// Version of the spec; it grows with every change.
    pub generation: Generation,
    /// Version of the spec that the status is about.
    pub observed_generation: Generation,
    /// Version of the whole object, for watches.
    pub resource_version: u64,
    /// An addition to Hypeman's API: process id of the VMM on the host, while it exists.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vmm_pid: Option<u32>,
}

/// The network of an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "InstanceNetwork")]
pub struct NetworkView {
    /// True if the instance is connected to the network of the host.
    pub enabled: bool,
    /// Name of the network; always `default`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The IPv4 address; null without a network.
    pub ip: Option<String>,
    /// The MAC address; null without a network.
    pub mac: Option<String>,
    /// Limit of the rate toward the guest that is in force; absent without a limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_download: Option<String>,
    /// Limit of the rate from the guest that is in force; absent without a limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_upload: Option<String>,
    /// An addition to Hypeman's API: mediated egress; absent without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<EgressView>,
}

/// Returns the variables of an instance. The value of a credential's source is replaced by the placeholder that the
/// guest has.
fn shown_env(spec: &InstanceSpec) -> BTreeMap<String, String> {
    let credentials = || spec.egress.iter().flat_map(|egress| &egress.credentials);
    let shown = |name: &String, value: &Secret| {
        let its = credentials().find(|(_, credential)| credential.source.env == *name);
        its.map_or_else(|| value.0.clone(), |(credential, _)| placeholder(credential))
    };
    spec.env.iter().map(|(name, value)| (name.clone(), shown(name, value))).collect()
}

impl NetworkView {
    fn of(has_network: bool, port: Option<&NicSpec>) -> Self {
        Self {
            enabled: has_network,
            name: has_network.then(|| "default".to_owned()),
            ip: port.map(|port| port.address.to_string()),
            mac: port.map(|port| port.mac.to_string()),
            bandwidth_download: port.and_then(|port| port.bandwidth.download).map(|rate| rate.to_string()),
            bandwidth_upload: port.and_then(|port| port.bandwidth.upload).map(|rate| rate.to_string()),
            egress: None,
        }
    }
}

impl Instance {
    /// Converts a record to its wire form; `port` is the port that the record names.
    #[must_use]
    pub fn of(object: &Object<Kind>, port: Option<&NicSpec>, now: Timestamp) -> Self {
        let Object { meta, spec, status } = object;
        let has_policy = spec.restart.when != RestartWhen::Never;
        let mut phases = status.phases.clone();
        if let Some(since) = status.state_since {
            let millis = u64::try_from(now.duration_since(since).as_millis()).unwrap_or(0);
            *phases.entry(status.state).or_default() += millis;
        }
        let (exit, has_hotplug) = (status.exit.as_ref(), spec.hotplug > Bytes(0));
        Self {
            id: meta.uid.to_string(),
            name: meta.name.to_string(),
            image: spec.image.to_string(),
            state: status.state,
            state_error: status.state_error.clone(),
            created_at: meta.created_at,
            expires_at: spec.expires_at,
            started_at: status.started_at,
            stopped_at: status.stopped_at,
            exit_code: exit.and_then(|exit| exit.code),
            exit_message: exit.map(|exit| exit.message.clone()),
            has_snapshot: status.has_saved_memory,
            size: spec.memory.to_string(),
            hotplug_size: has_hotplug.then(|| spec.hotplug.to_string()),
            hotplugged_size: has_hotplug.then(|| spec.hotplug_target(now).to_string()),
            hotplugged_bytes: status.hotplugged.map(|bytes| bytes.0),
            memory_held_until: spec.memory_hold.map(|hold| hold.until).filter(|until| now < *until),
            overlay_size: spec.overlay.to_string(),
            disk_io_bps: spec.disk_rate().map(|rate| rate.to_string()),
            vcpus: spec.vcpus,
            env: shown_env(spec),
            network: NetworkView {
                egress: spec.egress.as_ref().map(EgressView::from),
                ..NetworkView::of(spec.has_network, port)
            },
            volumes: spec.volumes.iter().map(Into::into).collect(),
            hypervisor: spec.hypervisor,
            platform: spec.platform,
            tags: meta.tags.clone(),
            restart_policy: has_policy.then(|| spec.restart.clone()),
            snapshot_policy: spec.snapshot_policy.map(Into::into),
            restart_status: has_policy.then(|| (&status.restart).into()),
            health_check: spec.health.as_ref().map(Into::into),
            health_status: Some(HealthView::of(spec, status)),
            auto_standby: spec.auto_standby.clone(),
            power_by: spec.power_by,
            current_phase: policy::phase(status.state),
            current_phase_since: status.state_since,
            phase_durations_ms: policy::phases(&phases),
            pending_changes: PendingView::of(&spec.pending),
            changes: None,
            conditions: status.conditions.clone(),
            generation: meta.generation,
            observed_generation: status.observed_generation,
            resource_version: meta.resource_version,
            vmm_pid: status.vmm_pid,
        }
    }
}

/// The response to `GET …/wait`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "WaitForStateResponse")]
pub struct WaitForState {
    /// State when the wait ended.
    pub state: State,
    /// True if the time limit passed before the state was reached.
    pub timed_out: bool,
    /// Reason why the state cannot be observed; only with the state `Unknown`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state_error: Option<String>,
}

/// Parses a state: one of the eight words, case-sensitive.
#[must_use]
pub fn parse_state(word: &str) -> Option<State> {
    serde_json::from_value(Value::String(word.to_owned())).ok()
}

impl FromStr for State {
    type Err = String;
    fn from_str(word: &str) -> Result<Self, String> {
        parse_state(word).ok_or_else(|| {
            "must be one of Created, Initializing, Running, Paused, Shutdown, Stopped, Standby, Unknown"
                .to_owned()
        })
    }
}
