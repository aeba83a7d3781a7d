//! Requests that change an instance.

use serde_json::Value;

use super::fields::Fields;
use super::hotplug::{HOTPLUGGED, HotplugAsked};
use super::instance::{argv, hypervisor, image, name, platform, pulls_always};
use super::network::NetworkAsked;
use super::volume::{self, MountRequest};
use super::{auto_standby, compression, env, health, policy, rates, sizes, unsupported};
use crate::compression::SnapshotPolicy;
use crate::health::HealthCheck;
use crate::instance::Pending;
use crate::limits;
use crate::meta::Tags;
use crate::names::{ImageRef, Name, Platform};
use crate::node::NodeOffer;
use crate::pending::NETWORK_ENABLED;
use crate::policy::{AutoStandbyPolicy, Expiry, RestartPolicy};
use crate::quantity::{Bytes, Rate};
use crate::validate::{FieldErrors, tags as check_tags};

/// Fields that change at once, whether the program runs or not, apart from `network`.
const LIVE: [&str; 14] = [
    "name",
    "tags",
    "restart_policy",
    "ttl",
    "expires_at",
    "health_check",
    "auto_standby",
    "snapshot_policy",
    "disk_io_bps",
    HOTPLUGGED,
    "volumes",
    "devices",
    "gpu",
    "credentials",
];
/// Fields about the image, which a running program does not see.
const IMAGE: [&str; 3] = ["image", "platform", "pull"];

/// The image that a request asks for. What is not given stays as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageAsked {
    pub reference: Option<ImageRef>,
    pub platform: Option<Platform>,
    /// True if the root begins anew with what the reference means now, even if the reference stays.
    pub pulls_always: bool,
}

/// The body of `PATCH /instances/{id}`: the fields it contains are changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InstancePatch {
    pub name: Option<Name>,
    pub tags: Option<Tags>,
    pub restart_policy: Option<RestartPolicy>,
    pub expiry: Option<Expiry>,
    /// The new health check; `Some(None)` removes the check.
    pub health: Option<Option<HealthCheck>>,
    pub auto_standby: Option<AutoStandbyPolicy>,
    pub snapshot_policy: Option<SnapshotPolicy>,
    /// The new limit of the disks; 0 removes the limit.
    pub disk_rate: Option<Rate>,
    pub network: NetworkAsked,
    pub image: Option<ImageAsked>,
    /// The new list of all volumes.
    pub volumes: Option<Vec<MountRequest>>,
    /// The new part of the hotplug memory that the guest should have.
    pub hotplugged: Option<Bytes>,
    /// The changes that a running program cannot see.
    pub deferred: Pending,
    /// True if a program that runs is started again, so that it sees all changes.
    pub restarts: bool,
    /// The fields of the request that change at once, by name.
    pub live: Vec<&'static str>,
    /// The fields of the request that a running program cannot see and that are not in `deferred`, by name.
    pub others: Vec<&'static str>,
}

impl InstancePatch {
    /// Reads the body.
    ///
    /// # Errors
    /// Returns every problem of the body; a body without any field is a problem too.
    pub fn read(body: Value, node: &NodeOffer) -> Result<Self, FieldErrors> {
        let mut errors = FieldErrors::default();
        let is_empty = body.as_object().is_some_and(|fields| fields.values().all(Value::is_null));
        if is_empty {
            errors.push("body", "invalid_request", "must name at least one field to change");
        }
        let mut fields = Fields::body(body, &mut errors);
        let mut live: Vec<_> = LIVE.into_iter().filter(|name| fields.has(name)).collect();
        let mut others: Vec<_> = IMAGE.into_iter().filter(|name| fields.has(name)).collect();
        let name = fields.text("name", &mut errors).and_then(|text| name(&text, &mut errors));
        let image = image_asked(&mut fields, node, !others.is_empty(), &mut errors);
        let network = NetworkAsked::read(&mut fields, &mut errors);
        live.extend(network.names_more.then_some("network"));
        others.extend(network.enabled.map(|_| NETWORK_ENABLED));
        unsupported::refuse_fields(&mut fields, &mut errors);
        unsupported::refuse_credentials(&mut fields, &mut errors);
        let tags = fields.map("tags", &mut errors);
        check_tags(&mut errors, "tags", tags.as_ref().unwrap_or(&Tags::new()));
        let hotplug = HotplugAsked::read(&mut fields, &mut errors);
        let has_volumes = fields.has("volumes");
        let patch = Self {
            name,
            image,
            network,
            tags,
            hotplugged: hotplug.part,
            volumes: Some(volume::mounts(&mut fields, &mut errors)).filter(|_| has_volumes),
            restart_policy: policy::restart(&mut fields, &mut errors),
            expiry: policy::expiry(&mut fields, &mut errors),
            health: health::health_check(&mut fields, &mut errors),
            auto_standby: auto_standby::policy(&mut fields, &mut errors),
            snapshot_policy: compression::policy(&mut fields, &mut errors),
            disk_rate: rates::disk(&mut fields, &mut errors),
            deferred: deferred(&mut fields, node, hotplug.size, &mut errors),
            restarts: fields.flag("restart", &mut errors).unwrap_or(false),
            live,
            others,
        };
        fields.finish(&mut errors);
        errors.into_result().map(|()| patch)
    }
}

fn image_asked(
    fields: &mut Fields,
    node: &NodeOffer,
    is_given: bool,
    errors: &mut FieldErrors,
) -> Option<ImageAsked> {
    let reference = fields.text("image", errors).and_then(|text| image(&text, errors));
    let platform = platform(fields, node.platform, errors);
    let asked = ImageAsked { reference, platform, pulls_always: pulls_always(fields, errors) };
    is_given.then_some(asked)
}

fn deferred(
    fields: &mut Fields,
    node: &NodeOffer,
    hotplug: Option<Bytes>,
    errors: &mut FieldErrors,
) -> Pending {
    Pending {
        vcpus: fields.number("vcpus", 1..=limits::VCPUS_MAX, errors),
        memory: sizes::memory(fields, errors),
        hotplug,
        overlay: sizes::overlay(fields, errors),
        env: env::read_changes(fields, errors),
        entrypoint: argv(fields, "entrypoint", errors),
        cmd: argv(fields, "cmd", errors),
        hypervisor: hypervisor(fields, "hypervisor", node, errors),
        skip_guest_agent: fields.flag("skip_guest_agent", errors),
        skip_kernel_headers: fields.flag("skip_kernel_headers", errors),
        ..Pending::default()
    }
}
