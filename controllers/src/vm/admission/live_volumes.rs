//! Volumes that an instance gets, or gives back, after its creation.
//!
//! Guarantees: an instance refers to a volume for as long as its VM has the disk.

use std::sync::Arc;

use stead_schemas::api::{AccessRequest, MountRequest};
use stead_schemas::goal::Goal;
use stead_schemas::instance::{Instance, InstanceSpec, State};
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;
use stead_schemas::volume::{Access, VolumeMount};

use super::volumes::{discard_overlay, number, take_one};
use super::{declared, live};
use crate::node::admission::within_room;
use crate::refused::{Refused, RefusedKind};
use crate::store::Tx;
use crate::volume::admission::{self as volumes, mount_of};

/// Mounts a volume in an instance: while it runs, or with its next start.
///
/// # Errors
/// Returns `InvalidState` unless the instance should be running or is Stopped; `Invalid` if the volume or the path is in
/// use there already, or if no device is left; `NoRoom`; and the errors of volumes.
pub fn attach(tx: &mut Tx<'_>, uid: &Uid, request: MountRequest) -> Result<Arc<Object<Instance>>, Refused> {
    let (object, _) = changeable(tx, uid, "attach a volume to")?;
    let mounts = &object.spec.volumes;
    let volume = volumes::find(tx, &request.volume)?.meta.uid.clone();
    if let Some(mount) = mount_of(mounts, &volume) {
        let how = if mount.is_leaving { "is still being detached from" } else { "is mounted already in" };
        return Err(Refused::invalid(format!("the volume {how} this instance")));
    }
    if mounts.iter().any(|mount| mount.path == request.path) {
        let message = format!("mount_path: {} is used already", request.path);
        return Err(Refused::at(RefusedKind::Invalid, "mount_path", message));
    }
    let mount = within_room(tx, |tx| take_one(tx, uid, request, mounts))?;
    declared(tx, object.spec.hypervisor)?.check_volumes(mounts.iter().chain([&mount]))?;
    Ok(tx.update_spec::<Instance>(uid, None, |spec| {
        number(&mut spec.volumes);
        spec.volumes.push(mount);
    })?)
}

/// Removes a volume from an instance; writes over the volume are lost. A program that runs keeps the volume until its
/// guest has unmounted it.
///
/// # Errors
/// Returns `InvalidState` unless the instance should be running or is Stopped, and `NotFound` if the volume is not mounted
/// there.
pub fn detach(tx: &mut Tx<'_>, uid: &Uid, volume: &str) -> Result<Arc<Object<Instance>>, Refused> {
    let (object, is_up) = changeable(tx, uid, "detach a volume from")?;
    let volume = volumes::find(tx, volume)?.meta.uid.clone();
    let elsewhere =
        || Refused::not_found(format!("volume {volume} is not mounted in instance {}", object.meta.name));
    mount_of(&object.spec.volumes, &volume).ok_or_else(elsewhere)?;
    if is_up {
        return Ok(tx.update_spec::<Instance>(uid, None, |spec| {
            number(&mut spec.volumes);
            set_leaving(spec, &volume, true);
        })?);
    }
    forget(tx, &object, |mount| mount.volume == volume)
}

/// Makes these the volumes of an instance: others are detached, and those that are missing are attached.
///
/// # Errors
/// Returns the errors of [`attach`] and [`detach`], and `Invalid` for a volume that is mounted in another way.
pub(super) fn replace(tx: &mut Tx<'_>, uid: &Uid, requests: Vec<MountRequest>) -> Result<(), Refused> {
    let (object, _) = changeable(tx, uid, "change the volumes of")?;
    let (mut kept, mut missing) = (Vec::new(), Vec::new());
    for request in requests {
        let volume = volumes::find(tx, &request.volume)?;
        match mount_of(&object.spec.volumes, &volume.meta.uid).filter(|mount| !mount.is_leaving) {
            Some(mount) if mount.path == request.path && is_as_asked(&mount.access, request.access) => {
                kept.push(mount.volume.clone());
            }
            Some(mount) => {
                let message = format!(
                    "volumes: {} is mounted at {} in another way: detach it first",
                    volume.meta.name, mount.path
                );
                return Err(Refused::at(RefusedKind::Invalid, "volumes", message));
            }
            None => missing.push(request),
        }
    }
    let others = object.spec.volumes.iter().filter(|mount| !kept.contains(&mount.volume));
    for mount in others {
        detach(tx, uid, mount.volume.as_str())?;
    }
    for request in missing {
        attach(tx, uid, request)?;
    }
    Ok(())
}

fn is_as_asked(access: &Access, asked: AccessRequest) -> bool {
    match (access, asked) {
        (Access::ReadWrite, AccessRequest::ReadWrite) | (Access::ReadOnly, AccessRequest::ReadOnly) => true,
        (Access::Overlay { size, .. }, AccessRequest::Overlay(asked)) => *size == asked,
        _ => false,
    }
}

/// Lets an instance keep a volume that it was to give back, if it still has it.
///
/// # Errors
/// Returns `NotFound` if there is no such instance.
pub fn keep_volume(tx: &mut Tx<'_>, uid: &Uid, volume: &Uid) -> Result<Arc<Object<Instance>>, Refused> {
    live(tx, uid)?;
    Ok(tx.update_spec::<Instance>(uid, None, |spec| set_leaving(spec, volume, false))?)
}

/// Removes the mounts of these volumes that were to leave.
///
/// # Errors
/// Returns a refusal by the store's rules. What has changed meanwhile is left as it is.
pub fn forget_volumes(tx: &mut Tx<'_>, uid: &Uid, gone: &[Uid]) -> Result<(), Refused> {
    let Ok(object) = live(tx, uid) else { return Ok(()) };
    forget(tx, &object, |mount| mount.is_leaving && gone.contains(&mount.volume)).map(drop)
}

/// Removes all mounts that were to leave an instance without a VM.
pub(super) fn forget_leaving(tx: &mut Tx<'_>, object: &Object<Instance>) -> Result<(), Refused> {
    forget(tx, object, |mount| mount.is_leaving).map(drop)
}

fn forget(
    tx: &mut Tx<'_>,
    object: &Object<Instance>,
    is_gone: impl Fn(&VolumeMount) -> bool,
) -> Result<Arc<Object<Instance>>, Refused> {
    for mount in object.spec.volumes.iter().filter(|mount| is_gone(mount)) {
        discard_overlay(tx, mount)?;
    }
    Ok(tx.update_spec::<Instance>(&object.meta.uid, None, |spec| {
        number(&mut spec.volumes);
        spec.volumes.retain(|mount| !is_gone(mount));
    })?)
}

fn set_leaving(spec: &mut InstanceSpec, volume: &Uid, is_leaving: bool) {
    for mount in spec.volumes.iter_mut().filter(|mount| mount.volume == *volume) {
        mount.is_leaving = is_leaving;
    }
}

/// Returns an instance whose volumes can change, and whether it should be running: otherwise it has no VM and gets none by
/// itself.
fn changeable(tx: &Tx<'_>, uid: &Uid, verb: &'static str) -> Result<(Arc<Object<Instance>>, bool), Refused> {
    let object = live(tx, uid)?;
    match (object.goal(), object.status.state) {
        (Goal::Running(_), _) => Ok((object, true)),
        (goal, State::Stopped) if goal.run().is_none() => Ok((object, false)),
        (_, state) => Err(Refused::state(verb, state, "Running or Stopped")),
    }
}
