//! Invariants of disks and volumes: the files of disks, and the mounts of volumes.
//!
//! They are part of `checks` and so independent of every plan.

use std::collections::{BTreeMap, BTreeSet};

use stead_schemas::condition::{self, ConditionType, Reason};
use stead_schemas::disk::Disk;
use stead_schemas::instance::{Instance, State};
use stead_schemas::meta::{Kind, Object};
use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;
use stead_schemas::volume::{Access, Volume, numbered};

use super::{Broken, HostSnapshot, Records, check_owner, check_ready, live};
use crate::host::Machine;

pub(crate) fn disks(broken: &mut Broken, records: &Records, host: &HostSnapshot) {
    let recorded: BTreeMap<Uid, Bytes> =
        records.disks.iter().map(|disk| (disk.meta.uid.clone(), disk.spec.size)).collect();
    // The copy of a disk that grew while its snapshot was taken is larger than the snapshot knew.
    let are_as_large = recorded.iter().all(|(uid, size)| host.disks.get(uid).is_some_and(|is| is >= size));
    if !are_as_large || recorded.len() != host.disks.len() {
        broken.push(format!("disks recorded {recorded:?}, on the host {:?}", host.disks));
    }
    for disk in &records.disks {
        check_owner(
            broken,
            records,
            Disk::NAME,
            &disk.meta.uid,
            disk.meta.owner.as_ref().map(|owner| &owner.uid),
        );
        check_ready(broken, Disk::NAME, &disk.meta.uid, &disk.status.conditions);
    }
}

/// Checks that each volume has its disk and each mount its volume, and that an instance that writes to a
/// volume is its only user.
pub(crate) fn volumes(broken: &mut Broken, records: &Records) {
    for volume in &records.volumes {
        let uid = &volume.meta.uid;
        let own: Vec<_> = records
            .disks
            .iter()
            .filter(|disk| disk.meta.owner.as_ref().is_some_and(|o| o.uid == *uid))
            .collect();
        if own.len() != 1 || own[0].meta.uid != volume.spec.disk || own[0].spec.size != volume.spec.size {
            broken.push(format!("volume {uid} of disk {} has {own:?}", volume.spec.disk));
        }
        check_ready(broken, Volume::NAME, uid, &volume.status.conditions);
        let mounts = live(&records.instances).flat_map(|instance| &instance.spec.volumes);
        let (writing, reading): (Vec<_>, Vec<_>) =
            mounts.filter(|mount| mount.volume == *uid).partition(|mount| mount.access == Access::ReadWrite);
        if writing.len() > 1 || (!writing.is_empty() && !reading.is_empty()) {
            broken.push(format!("volume {uid} is written to by {writing:?} and read by {reading:?}"));
        }
    }
    for instance in live(&records.instances) {
        for mount in &instance.spec.volumes {
            if !live(&records.volumes).any(|volume| volume.meta.uid == mount.volume) {
                broken.push(format!("{} mounts {mount:?}, which is gone", instance.meta.uid));
            }
            if let Access::Overlay { disk, .. } = &mount.access
                && !records.disks.iter().any(|one| one.meta.uid == *disk)
            {
                broken.push(format!("{} writes over {mount:?} to no disk", instance.meta.uid));
            }
        }
    }
}

/// Checks that each VM whose program runs has the disks of its volumes and no others, and that its guest has mounted them,
/// or that the instance says why not.
pub(crate) fn mounts(broken: &mut Broken, records: &Records, host: &HostSnapshot) {
    let running = live(&records.instances).filter(|instance| instance.status.state == State::Running);
    for instance in running {
        let (uid, volumes) = (&instance.meta.uid, &instance.spec.volumes);
        let Some(machine) = host.machines.get(uid) else { continue };
        let found = condition::find(&instance.status.conditions, ConditionType::VolumesMounted);
        if found.is_some_and(|found| matches!(found.reason, Reason::WaitingForStart | Reason::VolumeInUse)) {
            continue;
        }
        let mut wanted: Vec<u32> =
            numbered(volumes).flat_map(|(first, mount)| first..first + mount.access.disks()).collect();
        wanted.sort_unstable();
        let there: Vec<u32> = machine.volumes.iter().map(|disk| disk.number).collect();
        let paths: BTreeSet<&str> = volumes.iter().map(|mount| mount.path.as_str()).collect();
        let mounted = machine.guest.volumes.as_ref();
        let are_mounted = mounted.is_none_or(|guest| {
            guest.mounted.iter().map(|mount| mount.path.as_str()).collect::<BTreeSet<_>>() == paths
        });
        let is_settled = found.is_none()
            && machine.unsure_volume.is_none()
            && volumes.iter().all(|mount| !mount.is_leaving);
        grown(broken, records, instance, machine);
        if wanted != there || !are_mounted || !is_settled {
            broken.push(format!(
                "{uid} has the disks {there:?}, mounted {mounted:?}, of {volumes:?}: {found:?}"
            ));
        }
    }
}

/// Checks that VM and guest know the sizes of the volumes that they write to.
fn grown(broken: &mut Broken, records: &Records, instance: &Object<Instance>, machine: &Machine) {
    let Some(guest) = &machine.guest.volumes else { return };
    let written = numbered(&instance.spec.volumes).filter(|(_, mount)| mount.access == Access::ReadWrite);
    for (number, mount) in written {
        let volume = live(&records.volumes).find(|volume| volume.meta.uid == mount.volume);
        let Some(size) = volume.map(|volume| volume.spec.size) else { continue };
        let known = machine.volume_sizes.get(&number).copied();
        let mounted = guest.mounted.iter().find(|mounted| mounted.path == mount.path);
        let filled = mounted.and_then(|mounted| mounted.size).map(Bytes);
        if (known, filled) != (Some(size), Some(size)) {
            broken.push(format!("{} of {size}: the VM has {known:?}, the guest {filled:?}", mount.volume));
        }
    }
}
