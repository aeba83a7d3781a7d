//! Volumes of an instance: whether their disks exist, and how its VM and its guest receive them.

use std::collections::BTreeMap;

use stead_schemas::condition::{self, Condition, ConditionType};
use stead_schemas::disk::Disk;
use stead_schemas::guest;
use stead_schemas::instance::{Instance, InstanceSpec};
use stead_schemas::meta::Object;
use stead_schemas::quantity::Bytes;
use stead_schemas::references::{Ref, Role};
use stead_schemas::snapshot::Snapshot;
use stead_schemas::volume::{Access, Volume, VolumeMount, numbered};

use crate::host::VolumeDisk;
use crate::store::Store;

/// The volume disks, as far as they exist.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VolumesSeen {
    /// The disks of all mounts that can be used, by their numbers.
    pub disks: Vec<VolumeDisk>,
    /// Sizes of the disks that are written to directly and have a file system of their own, in bytes, by the numbers of
    /// the disks.
    pub sizes: BTreeMap<u32, Bytes>,
    /// The reason why a VM cannot use the others yet.
    pub trouble: Option<String>,
}

pub(super) fn seen(store: &Store, object: &Object<Instance>) -> VolumesSeen {
    let mut seen = VolumesSeen::default();
    for (first, mount) in numbered(&object.spec.volumes) {
        match disks_of(store, object, mount, first) {
            Ok(disks) => {
                let size = size_of(store, mount, &disks);
                seen.sizes.extend(size.map(|size| (first, size)));
                seen.disks.extend(disks);
            }
            Err(why) => {
                seen.trouble.get_or_insert(format!("volume {}: {why}", mount.volume));
            }
        }
    }
    seen.disks.sort_by_key(|disk| disk.number);
    seen
}

fn disks_of(
    store: &Store,
    object: &Object<Instance>,
    mount: &VolumeMount,
    number: u32,
) -> Result<Vec<VolumeDisk>, String> {
    let volume = store.get::<Volume>(&mount.volume).ok_or("it is gone")?;
    check_left(store, object, mount)?;
    if volume.status.observed_generation != volume.meta.generation {
        return Err("its disk is being made".to_owned());
    }
    check_ready(&volume.status.conditions)?;
    let is_read_only = !mount.access.is_writing();
    let disk = VolumeDisk { disk: volume.spec.disk.clone(), is_read_only, number };
    let Access::Overlay { disk: upper, .. } = &mount.access else { return Ok(vec![disk]) };
    let object = store.get::<Disk>(upper).ok_or("the disk over it is gone")?;
    check_ready(&object.status.conditions)?;
    Ok(vec![disk, VolumeDisk { disk: upper.clone(), is_read_only: false, number: number + 1 }])
}

/// Returns the size of the file of a volume, in bytes, if the guest fills it with a file system.
fn size_of(store: &Store, mount: &VolumeMount, disks: &[VolumeDisk]) -> Option<Bytes> {
    let disk = disks.first().filter(|_| mount.access == Access::ReadWrite)?;
    store.get::<Disk>(&disk.disk)?.status.size
}

fn check_ready(conditions: &[Condition]) -> Result<(), String> {
    if condition::is_ready(conditions) {
        return Ok(());
    }
    let found = condition::find(conditions, ConditionType::Ready);
    let found = found.map(|ready| ready.message.clone()).filter(|message| !message.is_empty());
    Err(found.unwrap_or_else(|| "its disk is being made".to_owned()))
}

/// Checks that no other object still uses the volume. The VM of an instance that is being deleted may use it
/// for a moment, and so may a snapshot in progress of an instance that had it, whose copy must be of one
/// moment.
fn check_left(store: &Store, object: &Object<Instance>, mount: &VolumeMount) -> Result<(), String> {
    let is_writing = mount.access.is_writing();
    let is_going = |other: &Object<Instance>| other.meta.uid != object.meta.uid && other.meta.is_deleting();
    for role in [Role::Writes, Role::Reads].into_iter().filter(|role| is_writing || *role == Role::Writes) {
        let mounts = Ref::to::<Volume>(role, &mount.volume);
        if let Some(other) = store.find_referring::<Instance>(&mounts, is_going) {
            return Err(format!("instance {} is still being deleted", other.meta.name));
        }
    }
    if !is_writing {
        return Ok(());
    }
    let copies = Ref::to::<Volume>(Role::Copies, &mount.volume);
    let is_others = |snapshot: &Object<Snapshot>| snapshot.spec.source != object.meta.uid;
    match store.find_referring::<Snapshot>(&copies, is_others) {
        Some(snapshot) => Err(format!("snapshot {} of it is being taken", snapshot.meta.uid)),
        None => Ok(()),
    }
}

/// Returns the mounts that the guest should have, outer paths first, so that no mount hides another. Its VM knows the
/// disks with these sizes, by their numbers.
pub(super) fn guest_mounts(spec: &InstanceSpec, sizes: &BTreeMap<u32, Bytes>) -> Vec<guest::VolumeMount> {
    let staying = numbered(&spec.volumes).filter(|(_, mount)| !mount.is_leaving);
    let of = |(first, mount): (u32, &VolumeMount)| guest::VolumeMount {
        path: mount.path.clone(),
        disk: guest::volume_disk(first),
        is_read_only: !mount.access.is_writing(),
        upper: matches!(mount.access, Access::Overlay { .. }).then(|| guest::volume_disk(first + 1)),
        size: sizes.get(&first).filter(|_| mount.access == Access::ReadWrite).map(|size| size.0),
    };
    let mut mounts: Vec<_> = staying.map(of).collect();
    mounts.sort_by(|one, other| one.path.cmp(&other.path));
    mounts
}

#[cfg(test)]
mod tests {
    use stead_schemas::instance::Power;
    use stead_schemas::meta::Tags;
    use stead_schemas::names::{Name, Uid};
    use stead_schemas::snapshot::{
        CapturedDisk, SnapshotKind, SnapshotPhase, SnapshotPurpose, SnapshotSpec, SnapshotStatus,
    };

    use super::super::tests::{at, instance, name, seen};
    use super::*;
    use crate::runtime::Desired;
    use crate::store::tests::opened;
    use crate::store::{Kinds, New};
    use crate::vm::plan::plan;

    fn mount(letter: char, path: &str, access: Access) -> VolumeMount {
        VolumeMount {
            volume: uid(letter),
            path: path.to_owned(),
            access,
            first_disk: None,
            is_leaving: false,
        }
    }

    fn uid(letter: char) -> Uid {
        format!("{letter}{}", "0".repeat(23)).parse().expect("valid")
    }

    #[test]
    fn the_guest_knows_its_disks_by_their_serials_and_mounts_outer_paths_first() {
        let mut object = instance(Power::Running, 1, 0);
        object.spec.volumes = vec![
            mount('a', "/data/deep", Access::ReadWrite),
            mount('b', "/set", Access::Overlay { disk: uid('o'), size: Bytes(1) }),
            mount('c', "/data", Access::ReadOnly),
        ];
        let sizes = (0..4).map(|number| (number, Bytes(7))).collect();
        let mounts = guest_mounts(&object.spec, &sizes);
        let reported: Vec<_> = mounts
            .iter()
            .map(|mount| {
                let (upper, size) = (mount.upper.as_deref(), mount.size);
                (mount.path.as_str(), mount.disk.as_str(), upper, mount.is_read_only, size)
            })
            .collect();
        let expected = [
            ("/data", "stead.volume.3", None, true, None),
            ("/data/deep", "stead.volume.0", None, false, Some(7)),
            ("/set", "stead.volume.1", Some("stead.volume.2"), true, None),
        ];
        assert_eq!(reported, expected);
    }

    #[test]
    fn a_vm_waits_for_its_volumes() {
        let object = instance(Power::Running, 1, 0);
        let mut seen = seen(None);
        seen.parts.volumes.trouble = Some("volume v: its disk is being made".to_owned());
        assert_eq!(name(&plan(&Desired::Present(&object), &seen, at(2).into())), "Wait WaitingForDisk");
        seen.parts.volumes = VolumesSeen {
            disks: vec![VolumeDisk { disk: uid('d'), is_read_only: true, number: 0 }],
            ..VolumesSeen::default()
        };
        assert_eq!(name(&plan(&Desired::Present(&object), &seen, at(2).into())), "Launch");
    }

    /// Returns the trouble that an instance has with a volume while another instance's snapshot of it is in
    /// this phase.
    async fn copied(phase: SnapshotPhase, access: Access) -> Option<String> {
        let kinds = Kinds::new().with::<Instance>().with::<Disk>().with::<Snapshot>().with::<Volume>();
        let store = opened(kinds);
        let mut object = instance(Power::Running, 1, 0);
        object.spec.volumes = vec![mount('v', "/data", access)];
        let source = instance(Power::Stopped, 1, 1);
        let spec = SnapshotSpec {
            source: uid('s'),
            source_name: source.meta.name.clone(),
            kind: SnapshotKind::Stopped,
            name: None,
            purpose: SnapshotPurpose::Kept,
            schedule: None,
            instance: Box::new(source.spec),
            image_digest: None,
            compression: None,
            pool: 0,
            volume_disks: vec![CapturedDisk { volume: uid('v'), disk: uid('d'), size: Bytes(1) }],
        };
        let snapshot = New { uid: Some(uid('c')), name: name_of('c'), tags: Tags::new(), owner: None, spec };
        store.transact(move |tx| tx.create::<Snapshot>(snapshot)).await.expect("created");
        if phase != SnapshotPhase::Pending {
            let status = SnapshotStatus { phase, ..SnapshotStatus::default() };
            store.write_status::<Snapshot>(&uid('c'), status).await.expect("written");
        }
        check_left(&store, &object, &object.spec.volumes[0]).err()
    }

    fn name_of(letter: char) -> Name {
        Name::from(&uid(letter))
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_writes_to_a_volume_while_another_instances_snapshot_copies_it() {
        use SnapshotPhase::{Failed, Pending, Ready};
        let why = copied(Pending, Access::ReadWrite).await.expect("it is written to");
        assert!(why.contains("is being taken"), "{why}");
        for (phase, access) in
            [(Pending, Access::ReadOnly), (Ready, Access::ReadWrite), (Failed, Access::ReadWrite)]
        {
            assert_eq!(copied(phase, access.clone()).await, None, "{phase:?} {access:?}");
        }
    }
}
