//! Admission of new instances.
//!
//! Guarantees: an accepted instance has its address, its guest context id, its disk, its port and its image
//! object in the same commit.

use std::sync::Arc;

use stead_schemas::api::InstanceRequest;
use stead_schemas::disk::{DiskPurpose, DiskSpec};
use stead_schemas::instance::{Allocated, Instance, InstanceSpec, Pending, Power, PowerCause};
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;
use stead_schemas::numbers::{GrantNo, RunNo, StandbyNo};

use super::update::expires_at;
use super::{declared, image, owner, volumes};
use crate::disk::admission::new_disk;
use crate::nic::admission::{self as nics, TapForm};
use crate::node::admission::within_room;
use crate::refused::Refused;
use crate::store::{New, Tx};

/// Claim table of guest context ids; vsock(7) reserves 0 to 2.
const CIDS: &str = "guest_cid";
const CID_FIRST: u32 = 3;

/// Stores the spec of a new instance with everything that the instance needs.
///
/// # Errors
/// Returns a refusal by a reference, a limit, the capabilities of the hypervisor or the room of the host; nothing is
/// staged then.
pub fn create(
    tx: &mut Tx<'_>,
    request: InstanceRequest,
    tap_prefix: &str,
) -> Result<Arc<Object<Instance>>, Refused> {
    within_room(tx, |tx| stage(tx, request, tap_prefix))
}

fn stage(
    tx: &mut Tx<'_>,
    request: InstanceRequest,
    tap_prefix: &str,
) -> Result<Arc<Object<Instance>>, Refused> {
    let uid = tx.next_uid();
    let (image, pull) = image::find_or_pull(tx, &request.image, request.platform, request.pulls_always)?;
    let disk = DiskSpec::empty(request.overlay, DiskPurpose::RootOverlay);
    let egress = request.egress.as_ref();
    let form = || TapForm::new(tx, tap_prefix, request.hypervisor, request.vcpus, &request.rates, egress);
    let tap = request.has_network.then(form);
    let allocated = allocate(tx, &uid, image, disk, tap.transpose()?)?;
    let volumes = volumes::take(tx, &uid, request.volumes)?;
    let declared = declared(tx, request.hypervisor)?;
    declared.check_volumes(&volumes)?;
    let spec = InstanceSpec {
        image: request.image,
        platform: request.platform,
        pull,
        image_version: 0,
        vcpus: request.vcpus,
        memory: request.memory,
        hotplug: request.hotplug,
        hotplugged: request.hotplugged,
        memory_hold: None,
        overlay: request.overlay,
        rates: request.rates,
        env: request.env,
        egress: request.egress,
        entrypoint: request.entrypoint,
        cmd: request.cmd,
        has_network: request.has_network,
        hypervisor: request.hypervisor,
        skip_guest_agent: request.skip_guest_agent,
        skip_kernel_headers: request.skip_kernel_headers,
        restart: request.restart,
        snapshot_policy: request.snapshot_policy,
        compression: None,
        health: request.health,
        health_version: 0,
        expires_at: expires_at(request.expiry, tx.now())?,
        auto_standby: request.auto_standby,
        hold_until: None,
        pending: Pending::default(),
        power: Power::Running,
        power_by: PowerCause::Client,
        power_since: tx.now(),
        run: RunNo(1),
        standby: StandbyNo(0),
        grant: GrantNo(1),
        is_forced: false,
        origin: None,
        volumes,
        allocated,
    };
    declared.check(&spec)?;
    Ok(tx.create::<Instance>(New {
        uid: Some(uid),
        name: request.name,
        tags: request.tags,
        owner: None,
        spec,
    })?)
}

/// Allocates what a new instance owns: its guest context id, its disk, and its port if it has a network.
pub(super) fn allocate(
    tx: &mut Tx<'_>,
    uid: &Uid,
    image: Uid,
    disk: DiskSpec,
    tap: Option<TapForm<'_>>,
) -> Result<Allocated, Refused> {
    let owner = owner(uid);
    let cid = tx
        .claim_lowest(CIDS, CID_FIRST..=u32::MAX - 1, uid)
        .ok_or_else(|| Refused::no_room("no guest context id is free"))?;
    let nic = tap.map(|form| nics::create(tx, &owner, form)).transpose()?;
    Ok(Allocated { image, disk: new_disk(tx, owner, disk)?, nic, cid })
}
