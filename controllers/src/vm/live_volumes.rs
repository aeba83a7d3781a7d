//! Volumes that come and go while a VM runs.
//!
//! ```text
//! attach   the disk is put into the VM, then the guest mounts it
//! grow     the VM learns the size of its file, then the guest fills the disk with its file system
//! detach   the guest unmounts it, then the disk is taken out, then the spec forgets the mount
//! ```
//! Guarantees: a volume is referred to by the instance for as long as its VM has the disk. A guest that does not unmount
//! keeps its volume, unless the VM is stopped.

use stead_schemas::condition::{ConditionStatus, ConditionType, Reason};
use stead_schemas::guest::{self, MountedVolumes};
use stead_schemas::instance::{Instance, InstanceStatus};
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;
use stead_schemas::volume::{VolumeMount, numbered};

use super::facts::is_up;
use super::passing_condition::{self, Found};
use super::volumes::guest_mounts;
use super::{Action, Observed};
use crate::host::{Machine, VolumeDisk};
use crate::runtime::Moment;

/// Separates the problems in the message of the condition `VolumesMounted`.
pub const PROBLEM_END: &str = "; ";

/// Returns the volumes that a guest reports, if they can change while it runs.
fn reported(machine: &Machine) -> Option<&MountedVolumes> {
    machine.guest.volumes.as_ref().filter(|_| machine.has_live_volumes && is_up(machine))
}

/// Takes out a disk of which it is not known whether the VM has it.
pub(super) fn plan_unsure(machine: &Machine) -> Option<Action> {
    machine.unsure_volume.map(|number| Action::RemoveVolume(machine.owner.clone(), number))
}

/// Takes the next step toward the volumes of the spec.
pub(super) fn plan(object: &Object<Instance>, machine: &Machine, seen: &Observed) -> Option<Action> {
    let (guest, uid) = (reported(machine)?, || object.meta.uid.clone());
    let wanted = wanted_disks(object, seen);
    if let Some(disk) = wanted.iter().find(|disk| is_free(machine, disk.number)) {
        return Some(Action::AddVolume(uid(), (*disk).clone()));
    }
    let mounts = mountable(object, machine);
    if guest.requested != mounts && machine.guest.volumes_asked.as_ref() != Some(&mounts) {
        return Some(Action::MountVolumes(uid(), mounts));
    }
    let is_unused = |disk: &&VolumeDisk| !wanted.contains(disk) && !is_mounted(guest, disk.number);
    if guest.requested == mounts
        && let Some(disk) = machine.volumes.iter().find(is_unused)
    {
        return Some(Action::RemoveVolume(uid(), disk.number));
    }
    let gone = gone(object, machine);
    if !gone.is_empty() {
        return Some(Action::ForgetVolumes(uid(), gone));
    }
    grown(machine, seen).map(|(number, size)| Action::GrowVolume(uid(), number, size))
}

/// Returns the disks that should be in the VM, and can be.
fn wanted_disks<'a>(object: &Object<Instance>, seen: &'a Observed) -> Vec<&'a VolumeDisk> {
    let leaving: Vec<_> = numbered(&object.spec.volumes)
        .filter(|(_, mount)| mount.is_leaving)
        .flat_map(|(first, mount)| numbers(first, mount))
        .collect();
    seen.parts.volumes.disks.iter().filter(|disk| !leaving.contains(&disk.number)).collect()
}

/// Returns a disk whose file grew, with the size of the file in bytes.
fn grown(machine: &Machine, seen: &Observed) -> Option<(u32, Bytes)> {
    let known = |number| machine.volume_sizes.get(&number).copied().unwrap_or_default();
    let mut sizes = seen.parts.volumes.sizes.iter().map(|(number, size)| (*number, *size));
    sizes.find(|(number, size)| !is_free(machine, *number) && known(*number) < *size)
}

/// Returns the mounts that the guest should have.
fn wanted_mounts(object: &Object<Instance>, machine: &Machine) -> Vec<guest::VolumeMount> {
    let mut mounts = guest_mounts(&object.spec, &machine.volume_sizes);
    if reported(machine).is_some_and(|guest| !guest.fills_disks) {
        mounts.iter_mut().for_each(|mount| mount.size = None);
    }
    mounts
}

/// Returns the mounts that the guest should have, as far as their disks are in the VM.
fn mountable(object: &Object<Instance>, machine: &Machine) -> Vec<guest::VolumeMount> {
    let has = |serial: &String| machine.volumes.iter().any(|disk| guest::volume_disk(disk.number) == *serial);
    let mut mounts = wanted_mounts(object, machine);
    mounts.retain(|mount| has(&mount.disk) && mount.upper.as_ref().is_none_or(has));
    mounts
}

/// Returns the volumes that are to leave and are in the VM no more.
fn gone(object: &Object<Instance>, machine: &Machine) -> Vec<Uid> {
    let leaving = numbered(&object.spec.volumes).filter(|(_, mount)| mount.is_leaving);
    let is_gone =
        |(first, mount): &(u32, &VolumeMount)| numbers(*first, mount).all(|number| is_free(machine, number));
    leaving.filter(is_gone).map(|(_, mount)| mount.volume.clone()).collect()
}

fn numbers(first: u32, mount: &VolumeMount) -> impl Iterator<Item = u32> + use<> {
    first..first.saturating_add(mount.access.disks())
}

fn is_free(machine: &Machine, number: u32) -> bool {
    machine.volumes.iter().all(|disk| disk.number != number)
}

fn is_mounted(guest: &MountedVolumes, number: u32) -> bool {
    let serial = guest::volume_disk(number);
    guest.mounted.iter().any(|mount| mount.disk == serial || mount.upper.as_ref() == Some(&serial))
}

/// Reports volumes that the guest should have mounted and has not, or the other way round.
pub(super) fn record(
    status: &mut InstanceStatus,
    object: &Object<Instance>,
    seen: Option<&Observed>,
    now: Moment,
) {
    let Some(seen) = seen else { return };
    let difference = seen.machine.as_ref().and_then(|machine| difference(object, machine, seen));
    let found = difference.map(|(reason, message)| Found { status: ConditionStatus::False, reason, message });
    passing_condition::report(status, object, ConditionType::VolumesMounted, found, now);
}

fn difference(object: &Object<Instance>, machine: &Machine, seen: &Observed) -> Option<(Reason, String)> {
    let mounts = wanted_mounts(object, machine);
    let is_leaving = object.spec.volumes.iter().any(|mount| mount.is_leaving);
    let Some(guest) = reported(machine) else {
        let is_as_wanted = !is_leaving && mountable(object, machine).len() == mounts.len();
        let message = "the volumes change when the instance is started next".to_owned();
        return (is_up(machine) && !is_as_wanted).then_some((Reason::WaitingForStart, message));
    };
    if guest.requested == mounts && guest.problems.is_empty() && !is_leaving {
        return None;
    }
    if guest.requested == mountable(object, machine) && !guest.problems.is_empty() {
        let problems: Vec<_> = guest.problems.iter().map(|(path, why)| format!("{path}: {why}")).collect();
        return Some((Reason::VolumeInUse, problems.join(PROBLEM_END)));
    }
    match &seen.parts.volumes.trouble {
        Some(why) => Some((Reason::WaitingForDisk, why.clone())),
        None => Some((Reason::ChangingVolumes, "volumes are being mounted or unmounted".to_owned())),
    }
}
