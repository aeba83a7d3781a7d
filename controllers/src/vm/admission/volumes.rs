//! Volumes in requests on instances: the mounts of an instance, and how forks and restores change them. All
//! within the commit that stores the spec.
//!
//! Guarantees: a fork writes to copies of its own, which are removed with it; a restore in place restores the
//! content of the snapshot's moment for every volume that was written to.

use stead_schemas::api::{AccessRequest, MountRequest};
use stead_schemas::disk::{Disk, DiskPurpose, DiskSpec};
use stead_schemas::instance::Instance;
use stead_schemas::meta::{Object, Tags};
use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;
use stead_schemas::snapshot::{CapturedDisk, Snapshot};
use stead_schemas::volume::{Access, Volume, VolumeMount, free_disk, numbered};

use super::owner;
use crate::disk::admission::new_disk;
use crate::refused::Refused;
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
        let mount = take_one(tx, instance, request, &mounts)?;
        // A request may name the same volume by its id and by its name.
        if mount_of(&mounts, &mount.volume).is_some() {
            return Err(Refused::invalid(format!("volume {} is mounted twice", mount.volume)));
        }
        mounts.push(mount);
    }
    Ok(mounts)
}

/// Returns a mount beside others of the same instance.
pub(super) fn take_one(
    tx: &mut Tx<'_>,
    instance: &Uid,
    request: MountRequest,
    others: &[VolumeMount],
) -> Result<VolumeMount, Refused> {
    let MountRequest { volume, path, access } = request;
    let volume = volumes::find(tx, &volume)?;
    check_free(tx, &volume, instance, access == AccessRequest::ReadWrite)?;
    let access = match access {
        AccessRequest::ReadWrite => Access::ReadWrite,
        AccessRequest::ReadOnly => Access::ReadOnly,
        AccessRequest::Overlay(size) => Access::Overlay { disk: overlay(tx, instance, size, None)?, size },
    };
    let first_disk = Some(free_disk(others, access.disks()));
    Ok(VolumeMount { volume: volume.meta.uid.clone(), path, access, first_disk, is_leaving: false })
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

/// Returns the mounts of an instance that begins with a snapshot.
pub(super) fn fork(
    tx: &mut Tx<'_>,
    snapshot: &Object<Snapshot>,
    instance: &Uid,
) -> Result<Vec<VolumeMount>, Refused> {
    let mut mounts = snapshot.spec.instance.volumes.clone();
    number(&mut mounts);
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
    number(&mut mounts);
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

/// Gives the mounts of an earlier version the numbers that their disks have.
pub(super) fn number(mounts: &mut [VolumeMount]) {
    let firsts: Vec<u32> = numbered(mounts).map(|(first, _)| first).collect();
    for (mount, first) in mounts.iter_mut().zip(firsts) {
        mount.first_disk = Some(first);
    }
}

/// Requests the deletion of the disk for the writes over a volume.
pub(super) fn discard_overlay(tx: &mut Tx<'_>, mount: &VolumeMount) -> Result<(), Refused> {
    if let Access::Overlay { disk, .. } = &mount.access {
        tx.request_deletion::<Disk>(disk)?;
    }
    Ok(())
}

fn of_snapshot<'a>(snapshot: &'a Object<Snapshot>, volume: &Uid) -> Option<&'a CapturedDisk> {
    snapshot.spec.volume_disks.iter().find(|captured| captured.volume == *volume)
}

fn not_captured(mount: &VolumeMount) -> Refused {
    let message = format!("volume {} is not in the snapshot", mount.volume);
    Refused::conflict(message)
}
