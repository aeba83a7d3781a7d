//! Admission of requests on a snapshot.

use std::sync::Arc;

use stead_schemas::compression::Compression;
use stead_schemas::disk::Disk;
use stead_schemas::goal::Goal;
use stead_schemas::instance::{Instance, InstanceSpec, State};
use stead_schemas::limits::{FAILED_SNAPSHOTS_PER_SOURCE_MAX, SNAPSHOTS_PER_SOURCE_MAX};
use stead_schemas::meta::{Object, Tags};
use stead_schemas::names::{Name, Uid};
use stead_schemas::quantity::Bytes;
use stead_schemas::references::{Ref, Role};
use stead_schemas::snapshot::{
    CapturedDisk, ScheduledRun, Snapshot, SnapshotKind, SnapshotPurpose, SnapshotSpec,
};
use stead_schemas::volume::{Access, Volume, VolumeMount};

use crate::node::admission as nodes;
use crate::refused::{Refused, RefusedKind};
use crate::store::{New, Tx, TxError};

/// Claim table of names. Each value is prefixed with the uid of its source.
const NAMES: &str = "snapshot_name";

/// A requested snapshot.
#[derive(Debug, Clone)]
pub struct CreateRequest {
    pub kind: SnapshotKind,
    pub name: Option<Name>,
    pub tags: Tags,
    pub purpose: SnapshotPurpose,
    /// The compression of the memory; `None` leaves the memory as it is.
    pub compression: Option<Compression>,
    /// Number of forks to hold ready.
    pub pool: u32,
    /// The run of a schedule that takes the snapshot, if any.
    pub schedule: Option<ScheduledRun>,
}

/// Requests a snapshot of an instance in its present state.
///
/// # Errors
/// Returns `NotFound`, `NameTaken`, `InvalidState` or `Quota`.
pub fn create(
    tx: &mut Tx<'_>,
    source: &Uid,
    request: CreateRequest,
) -> Result<Arc<Object<Snapshot>>, Refused> {
    let instance =
        tx.get::<Instance>(source).filter(|instance| !instance.meta.is_deleting() && !instance.is_pooled());
    let instance = instance.ok_or_else(|| Refused::absent::<Instance>(source))?;
    check_state(&instance, request.kind)?;
    if request.kind == SnapshotKind::Standby {
        let hypervisor = instance.spec.hypervisor;
        let has = nodes::capabilities(tx, hypervisor)?;
        nodes::check_verb(hypervisor, has.standby, "a snapshot of the kind Standby")?;
        nodes::check_field(hypervisor, request.pool == 0 || has.fork_memory, "pool_size")?;
    }
    let siblings = make_room(tx, source)?;
    if siblings >= SNAPSHOTS_PER_SOURCE_MAX {
        let message =
            format!("the instance has {siblings} snapshots; {SNAPSHOTS_PER_SOURCE_MAX} are allowed");
        return Err(Refused::quota(message));
    }
    let uid = tx.next_uid();
    if let Some(name) = &request.name {
        give_up_name(tx, source, name);
        tx.claim(NAMES, claimed(source, name), &uid).map_err(|_| {
            let message = format!("a snapshot of this instance named {name} exists already");
            Refused::new(RefusedKind::NameTaken, message)
        })?;
    }
    let spec = SnapshotSpec {
        source: source.clone(),
        source_name: instance.meta.name.clone(),
        kind: request.kind,
        name: request.name,
        purpose: request.purpose,
        schedule: request.schedule,
        instance: Box::new(InstanceSpec {
            overlay: present_size(tx, &instance.spec.allocated.disk, instance.spec.overlay),
            ..instance.spec.clone()
        }),
        image_digest: instance.content().cloned(),
        compression: request.compression,
        pool: request.pool,
        volume_disks: captured(tx, &instance.spec),
    };
    Ok(tx.create::<Snapshot>(New {
        name: Name::from(&uid),
        uid: Some(uid),
        tags: request.tags,
        owner: None,
        spec,
    })?)
}

/// Counts the snapshots of a source. Snapshots that were never taken do not count. Beyond a limit the oldest
/// of those are deleted, so that a client that retries all the time does not fill the store.
fn make_room(tx: &mut Tx<'_>, source: &Uid) -> Result<usize, TxError> {
    let siblings = tx.referring::<Snapshot>(&Ref::to::<Instance>(Role::Source, source));
    let (mut failed, counted): (Vec<_>, Vec<_>) =
        siblings.into_iter().partition(|one| one.was_never_taken() && !one.meta.is_deleting());
    failed.sort_by_key(|one| std::cmp::Reverse((one.meta.created_at, one.meta.resource_version)));
    for surplus in failed.iter().skip(FAILED_SNAPSHOTS_PER_SOURCE_MAX - 1) {
        delete(tx, &surplus.meta.uid)?;
    }
    Ok(counted.len())
}

/// Frees a name that is held by a snapshot which was never taken, so that a new request for the name gets it.
fn give_up_name(tx: &mut Tx<'_>, source: &Uid, name: &Name) {
    let held = tx.claimed_by(NAMES, claimed(source, name)).and_then(|by| tx.get::<Snapshot>(&by));
    if let Some(holder) = held.filter(|holder| holder.was_never_taken()) {
        tx.release(NAMES, claimed(source, name), &holder.meta.uid);
    }
}

/// Gives all snapshots of a source its new name.
///
/// # Errors
/// Returns a refusal by the store's rules.
pub(crate) fn rename_source(tx: &mut Tx<'_>, source: &Uid, name: &Name) -> Result<(), TxError> {
    let siblings = tx.referring::<Snapshot>(&Ref::to::<Instance>(Role::Source, source));
    for sibling in siblings.iter().filter(|sibling| !sibling.meta.is_deleting()) {
        tx.update_spec::<Snapshot>(&sibling.meta.uid, None, |spec| spec.source_name = name.clone())?;
    }
    Ok(())
}

/// Returns the disks that a snapshot of an instance captures in addition to the root disk.
fn captured(tx: &Tx<'_>, spec: &InstanceSpec) -> Vec<CapturedDisk> {
    let of = |mount: &VolumeMount| {
        let volume = mount.volume.clone();
        match &mount.access {
            Access::ReadOnly => None,
            Access::Overlay { disk, size } => Some(CapturedDisk { volume, disk: disk.clone(), size: *size }),
            Access::ReadWrite => {
                let object = tx.get::<Volume>(&volume)?;
                let size = present_size(tx, &object.spec.disk, object.spec.size);
                Some(CapturedDisk { volume, disk: object.spec.disk.clone(), size })
            }
        }
    };
    spec.volumes.iter().filter_map(of).collect()
}

/// Returns the size of a disk, whose file may not have grown to that size yet. What is captured is at least as large.
fn present_size(tx: &Tx<'_>, disk: &Uid, size: Bytes) -> Bytes {
    tx.get::<Disk>(disk).and_then(|disk| disk.status.size).map_or(size, |present| present.min(size))
}

/// Sets the number of forks to hold ready.
///
/// # Errors
/// Returns `NotFound`, and `Conflict` if there is no memory to hold.
pub fn set_pool(tx: &mut Tx<'_>, uid: &Uid, pool: u32) -> Result<Arc<Object<Snapshot>>, Refused> {
    let object = tx.get::<Snapshot>(uid);
    let object = object.ok_or_else(|| Refused::absent::<Snapshot>(uid))?;
    if pool > 0 && object.spec.kind == SnapshotKind::Stopped {
        return Err(Refused::conflict("a snapshot of the kind Stopped has no pool"));
    }
    if pool > object.spec.pool {
        let hypervisor = object.spec.instance.hypervisor;
        let has = nodes::capabilities(tx, hypervisor)?;
        nodes::check_field(hypervisor, has.fork_memory, "pool_size")?;
    }
    Ok(tx.update_spec::<Snapshot>(uid, None, |spec| spec.pool = pool)?)
}

/// Checks that a snapshot of this kind can be taken of an instance in its present state.
pub(crate) fn check_state(instance: &Object<Instance>, kind: SnapshotKind) -> Result<(), Refused> {
    let state = instance.status.state;
    let (is_legal, legal) = match kind {
        SnapshotKind::Standby => {
            let is_there = matches!(
                (state, instance.goal()),
                // A paused instance is just being captured for another snapshot.
                (State::Running | State::Paused, Goal::Running(_)) | (State::Standby, Goal::Standby(_))
            );
            (is_there, "Running or Standby")
        }
        SnapshotKind::Stopped => {
            let is_restarting = instance.status.restart.next_attempt_at.is_some();
            let is_down = instance.goal() == Goal::Stopped;
            (state == State::Stopped && is_down && !is_restarting, "Stopped")
        }
    };
    if is_legal {
        return Ok(());
    }
    let message =
        format!("cannot take a {kind:?} snapshot of an instance that is {state:?}: it must be {legal}");
    Err(Refused::new(RefusedKind::InvalidState { state, legal }, message))
}

fn claimed(source: &Uid, name: &Name) -> String {
    format!("{source}.{name}")
}

/// Requests the deletion of the snapshot; its name is free at once.
///
/// # Errors
/// Returns `NotFound`.
pub fn delete(tx: &mut Tx<'_>, uid: &Uid) -> Result<(), TxError> {
    let object = tx.request_deletion::<Snapshot>(uid)?;
    if let Some(name) = &object.spec.name {
        tx.release(NAMES, claimed(&object.spec.source, name), uid);
    }
    Ok(())
}
