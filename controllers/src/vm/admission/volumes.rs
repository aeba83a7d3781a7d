//! Volumes in requests on instances: the mounts of an instance, and how forks and restores change them. All
//! within the commit that stores the spec.
//!
//! Guarantees: a fork writes to copies of its own, which are removed with it; a restore in place restores the
//! content of the snapshot's moment for every volume that was written to.

use std::sync::Arc;

use stead_schemas::api::{AccessRequest, MountRequest};
use stead_schemas::disk::{Disk, DiskPurpose, DiskSpec};
use stead_schemas::instance::{Instance, InstanceSpec, State};
use stead_schemas::meta::{Object, Tags};
use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;
use stead_schemas::snapshot::{CapturedDisk, Snapshot};
use stead_schemas::volume::{Access, Volume, VolumeMount};

use super::{declared, live, owner};
use crate::disk::admission::new_disk;
use crate::node::admission::within_room;
use crate::refused::{Refused, RefusedKind};
use crate::store::Tx;
use crate::volume::admission::{self as volumes, check_free, mount_of};

/// Returns the mounts of a new instance.
///
/// # Errors
/// Returns the errors of volumes: `NotFound`, `Conflict`.
pub(super) fn take(
    tx: &mut Tx<'_>,
    instance: &Uid,
    requests: Vec<MountRequest>,
) -> Result<Vec<VolumeMount>, Refused> {
    let mut mounts: Vec<VolumeMount> = Vec::new();
    for request in requests {
        let mount = take_one(tx, instance, request)?;
        // A request may name the same volume by its id and by its name.
        if mount_of(&mounts, &mount.volume).is_some() {
            return Err(Refused::invalid(format!("volume {} is mounted twice", mount.volume)));
        }
        mounts.push(mount);
    }
    Ok(mounts)
}

fn take_one(tx: &mut Tx<'_>, instance: &Uid, request: MountRequest) -> Result<VolumeMount, Refused> {
    let MountRequest { volume, path, access } = request;
    let volume = volumes::find(tx, &volume)?;
    check_free(tx, &volume, instance, access == AccessRequest::ReadWrite)?;
    let access = match access {
        AccessRequest::ReadWrite => Access::ReadWrite,
        AccessRequest::ReadOnly => Access::ReadOnly,
        AccessRequest::Overlay(size) => Access::Overlay { disk: overlay(tx, instance, size, None)?, size },
    };
    Ok(VolumeMount { volume: volume.meta.uid.clone(), path, access })
}

/// Creates a disk for an instance's writes over a volume, as a copy of a snapshot's disk if `source` is
/// given.
fn overlay(
    tx: &mut Tx<'_>,
    instance: &Uid,
    size: Bytes,
    source: Option<(&Uid, &Uid)>,
) -> Result<Uid, Refused> {
    let (source, source_disk) = source.map(|(snapshot, disk)| (snapshot.clone(), disk.clone())).unzip();
    let spec = DiskSpec { source, source_disk, ..DiskSpec::empty(size, DiskPurpose::VolumeOverlay) };
    Ok(new_disk(tx, owner(instance), spec)?)
}

/// Mounts a volume in an instance that is down. The mount takes effect with its next start.
///
/// # Errors
/// Returns `InvalidState` unless the instance is Stopped; `Invalid` if the volume or the path is in
/// use there already, or if no device is left; `NoRoom`; and the errors of volumes.
pub fn attach(tx: &mut Tx<'_>, uid: &Uid, request: MountRequest) -> Result<Arc<Object<Instance>>, Refused> {
    let object = down(tx, uid, "attach a volume to")?;
    let mounts = &object.spec.volumes;
    let volume = volumes::find(tx, &request.volume)?.meta.uid.clone();
    if mount_of(mounts, &volume).is_some() {
        return Err(Refused::invalid("the volume is mounted in this instance already"));
    }
    if mounts.iter().any(|mount| mount.path == request.path) {
        let message = format!("mount_path: {} is used already", request.path);
        return Err(Refused::at(RefusedKind::Invalid, "mount_path", message));
    }
    let mount = within_room(tx, |tx| take_one(tx, uid, request))?;
    declared(tx, object.spec.hypervisor)?.check_volumes(mounts.iter().chain([&mount]))?;
    Ok(tx.update_spec::<Instance>(uid, None, |spec| spec.volumes.push(mount))?)
}

/// Removes a volume from an instance that is down; writes over the volume are lost.
///
/// # Errors
/// Returns `InvalidState` unless the instance is Stopped, and `NotFound` if the volume is not mounted there.
pub fn detach(tx: &mut Tx<'_>, uid: &Uid, volume: &str) -> Result<Arc<Object<Instance>>, Refused> {
    let object = down(tx, uid, "detach a volume from")?;
    let volume = volumes::find(tx, volume)?.meta.uid.clone();
    let elsewhere =
        || Refused::not_found(format!("volume {volume} is not mounted in instance {}", object.meta.name));
    let mount = mount_of(&object.spec.volumes, &volume).ok_or_else(elsewhere)?;
    discard_overlay(tx, mount)?;
    let others = |spec: &mut InstanceSpec| spec.volumes.retain(|mount| mount.volume != volume);
    Ok(tx.update_spec::<Instance>(uid, None, others)?)
}

fn discard_overlay(tx: &mut Tx<'_>, mount: &VolumeMount) -> Result<(), Refused> {
    if let Access::Overlay { disk, .. } = &mount.access {
        tx.request_deletion::<Disk>(disk)?;
    }
    Ok(())
}

/// Returns an instance that has no VM and gets none by itself.
fn down(tx: &Tx<'_>, uid: &Uid, verb: &'static str) -> Result<Arc<Object<Instance>>, Refused> {
    let object = live(tx, uid)?;
    match object.status.state {
        State::Stopped if object.goal().run().is_none() => Ok(object),
        state => Err(Refused::state(verb, state, "Stopped")),
    }
}

/// Returns the mounts of an instance that begins with a snapshot.
pub(super) fn fork(
    tx: &mut Tx<'_>,
    snapshot: &Object<Snapshot>,
    instance: &Uid,
) -> Result<Vec<VolumeMount>, Refused> {
    let mut mounts = snapshot.spec.instance.volumes.clone();
    for mount in &mut mounts {
        match (&mut mount.access, of_snapshot(snapshot, &mount.volume)) {
            (Access::ReadOnly, _) => {}
            (Access::Overlay { disk, size }, Some(taken)) => {
                *disk = overlay(tx, instance, *size, Some((&snapshot.meta.uid, &taken.disk)))?;
            }
            (Access::ReadWrite, Some(taken)) => {
                let copy = volumes::CreateRequest {
                    id: None,
                    name: None,
                    size: taken.size,
                    tags: Tags::new(),
                    owner: Some(owner(instance)),
                    content: volumes::Content::Copy(
                        snapshot.meta.uid.clone(),
                        taken.disk.clone(),
                        taken.size,
                    ),
                };
                mount.volume = volumes::begin(tx, copy)?.meta.uid.clone();
            }
            (Access::Overlay { .. } | Access::ReadWrite, None) => return Err(not_captured(mount)),
        }
    }
    Ok(mounts)
}

/// Returns the mounts of an instance that is restored in place. Its volumes return to their content at the
/// snapshot.
///
/// # Errors
/// Returns `Conflict` if a volume is gone, or if another instance has taken it.
pub(super) fn restore(
    tx: &mut Tx<'_>,
    snapshot: &Object<Snapshot>,
    object: &Object<Instance>,
) -> Result<Vec<VolumeMount>, Refused> {
    let (instance, taken_of) = (&object.meta.uid, &snapshot.meta.uid);
    let mut mounts = snapshot.spec.instance.volumes.clone();
    for mount in &mut mounts {
        let volume = tx.get::<Volume>(&mount.volume).filter(|volume| !volume.meta.is_deleting());
        let gone = || {
            let message =
                format!("volume {} of the snapshot is gone: fork the snapshot instead", mount.volume);
            Refused::conflict(message)
        };
        let volume = volume.ok_or_else(gone)?;
        check_free(tx, &volume, instance, mount.access.is_writing())?;
        match (&mut mount.access, of_snapshot(snapshot, &mount.volume)) {
            (Access::ReadOnly, _) => {}
            (Access::Overlay { disk, size }, Some(taken)) => {
                *disk = overlay(tx, instance, *size, Some((taken_of, &taken.disk)))?;
            }
            (Access::ReadWrite, Some(taken)) => {
                volumes::rewind(tx, &mount.volume, taken_of, taken)?;
            }
            (Access::Overlay { .. } | Access::ReadWrite, None) => return Err(not_captured(mount)),
        }
    }
    for mount in &object.spec.volumes {
        discard_overlay(tx, mount)?;
    }
    Ok(mounts)
}

fn of_snapshot<'a>(snapshot: &'a Object<Snapshot>, volume: &Uid) -> Option<&'a CapturedDisk> {
    snapshot.spec.volume_disks.iter().find(|captured| captured.volume == *volume)
}

fn not_captured(mount: &VolumeMount) -> Refused {
    let message = format!("volume {} is not in the snapshot", mount.volume);
    Refused::conflict(message)
}
