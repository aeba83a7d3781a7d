//! Restores in place: an instance returns to one of its snapshots.

use std::sync::Arc;

use jiff::Timestamp;
use stead_schemas::api::check_fits;
use stead_schemas::disk::Disk;
use stead_schemas::instance::{Allocated, Instance, InstanceSpec, Pending, Power, PowerCause, Rates, State};
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;
use stead_schemas::snapshot::Snapshot;

use super::from_snapshot::{Goal, Target, disk_of, goal, origin, ready};
use super::{declared, live, network, owner, volumes};
use crate::disk::admission::new_disk;
use crate::nic::admission as nics;
use crate::node::admission::{self as nodes, within_room};
use crate::refused::{Refused, RefusedKind};
use crate::store::Tx;

/// Restores an instance that is down to one of its snapshots. A new disk replaces its own disk, whose content
/// is lost. The hypervisor may change in the same commit: nothing of the instance runs, and the next launch
/// belongs to another run.
///
/// # Errors
/// Returns `NotFound`, `InvalidState` unless the instance is down, `Conflict` unless the snapshot is ready,
/// `InvalidHealthCheck` if the instance's check does not fit the snapshot, `Invalid` or `NoRoom`.
pub fn restore_snapshot(
    tx: &mut Tx<'_>,
    uid: &Uid,
    snapshot: &Uid,
    target: Target,
    tap_prefix: &str,
) -> Result<Arc<Object<Instance>>, Refused> {
    within_room(tx, |tx| stage(tx, uid, snapshot, target, tap_prefix))
}

fn stage(
    tx: &mut Tx<'_>,
    uid: &Uid,
    snapshot: &Uid,
    target: Target,
    tap_prefix: &str,
) -> Result<Arc<Object<Instance>>, Refused> {
    let object = live(tx, uid)?;
    let snapshot = ready(tx, snapshot)?;
    if snapshot.spec.source != *uid {
        let (snapshot, instance) = (&snapshot.meta.uid, &object.meta.name);
        return Err(Refused::not_found(format!(
            "snapshot {snapshot} is of another instance than {instance}"
        )));
    }
    let (state, power) = (object.status.state, object.spec.power);
    let is_down = match state {
        State::Stopped => object.goal().run().is_none(),
        State::Standby => power == Power::Standby,
        _ => false,
    };
    if !is_down {
        return Err(Refused::state("restore a snapshot of", state, "Stopped or Standby"));
    }
    let node = nodes::local(tx)?;
    let goal = goal(&node, &snapshot, target)?;
    if goal.hypervisor != object.spec.hypervisor {
        let declared = declared(tx, goal.hypervisor)?;
        declared.check_auto_standby(object.spec.auto_standby.as_ref(), "target_hypervisor")?;
    }
    let disk = new_disk(tx, owner(uid), disk_of(&snapshot))?;
    let earlier = object.spec.allocated.disk.clone();
    let volumes = volumes::restore(tx, &snapshot, &object)?;
    let restored = restored(&object.spec, &snapshot, &goal, tx.now());
    check_health(&restored)?;
    network::discard(tx, object.spec.pending.card.as_ref())?;
    let nic = network::fit(tx, uid, object.spec.allocated.nic.clone(), &restored, tap_prefix)?;
    let changed = tx.update_spec::<Instance>(uid, None, |spec| {
        *spec = restored;
        spec.allocated.nic = nic;
        spec.volumes = volumes;
        spec.allocated.disk = disk;
        spec.origin = Some(origin(&snapshot, spec.standby, spec.run, goal.power, false));
    })?;
    // The snapshot may have another number of processors, on which the default limits depend.
    if let Some(nic) = &changed.spec.allocated.nic {
        nics::limit(tx, nic, &changed.spec.rates, changed.spec.vcpus)?;
        nics::lead(tx, uid, nic, changed.spec.egress.as_ref())?;
    }
    tx.request_deletion::<Disk>(&earlier)?;
    Ok(changed)
}

/// Checks that the health check of the instance fits a spec of the snapshot's network and agent.
fn check_health(spec: &InstanceSpec) -> Result<(), Refused> {
    let Some(check) = &spec.health else { return Ok(()) };
    check_fits(check, spec.has_network, !spec.skip_guest_agent).map_err(|why| {
        Refused::at(RefusedKind::InvalidHealthCheck, "health_check", format!("health_check {why}"))
    })
}

/// Returns the spec of an instance that continues from a snapshot, with its own disks. The program and the machine
/// settings come from the snapshot; the settings of the instance's life remain its own.
fn restored(kept: &InstanceSpec, snapshot: &Object<Snapshot>, goal: &Goal, now: Timestamp) -> InstanceSpec {
    let kept = kept.clone();
    let image = snapshot.spec.instance.allocated.image.clone();
    InstanceSpec {
        allocated: Allocated { image, ..kept.allocated },
        image_version: kept.image_version + 1,
        volumes: kept.volumes,
        restart: kept.restart,
        health: kept.health,
        health_version: kept.health_version,
        expires_at: kept.expires_at,
        auto_standby: kept.auto_standby,
        hold_until: kept.hold_until,
        memory_hold: None,
        snapshot_policy: kept.snapshot_policy,
        rates: match snapshot.spec.instance.has_network {
            true => kept.rates,
            false => Rates { disk: kept.rates.disk, ..Rates::default() },
        },
        compression: None,
        pending: Pending::default(),
        power: goal.power,
        hypervisor: goal.hypervisor,
        power_by: PowerCause::Client,
        power_since: now,
        run: kept.run.next(),
        standby: kept.standby.next(),
        grant: match goal.power {
            Power::Running | Power::Warm => kept.grant.next(),
            Power::Stopped | Power::Standby => kept.grant,
        },
        is_forced: kept.is_forced,
        ..(*snapshot.spec.instance).clone()
    }
}
