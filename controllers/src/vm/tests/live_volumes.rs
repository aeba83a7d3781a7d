//! Volumes that come and go while a VM runs: the order of the steps, from the guest's reports.

use stead_schemas::guest::{MountedVolumes, VolumeMount as GuestMount};
use stead_schemas::volume::{Access, VolumeMount};

use super::*;
use crate::host::VolumeDisk;

fn mount(number: u32, is_leaving: bool) -> VolumeMount {
    let volume: Uid = format!("v{number:023}").parse().expect("valid");
    VolumeMount {
        volume,
        path: format!("/{number}"),
        access: Access::ReadWrite,
        first_disk: Some(number),
        is_leaving,
    }
}

fn disk(number: u32) -> VolumeDisk {
    VolumeDisk { disk: format!("d{number:023}").parse().expect("valid"), is_read_only: false, number }
}

fn in_guest(number: u32) -> GuestMount {
    let disk = stead_schemas::guest::volume_disk(number);
    GuestMount { path: format!("/{number}"), disk, is_read_only: false, upper: None, size: None }
}

fn guest(requested: &[u32], mounted: &[u32]) -> MountedVolumes {
    let all = |numbers: &[u32]| numbers.iter().map(|number| in_guest(*number)).collect();
    MountedVolumes {
        requested: all(requested),
        mounted: all(mounted),
        problems: BTreeMap::new(),
        fills_disks: true,
    }
}

/// Returns an instance with these mounts that runs, and what is seen of it: the disks that its VM has, and the report of
/// its guest.
fn running(
    mounts: Vec<VolumeMount>,
    disks: &[u32],
    volumes: Option<MountedVolumes>,
) -> (Object<Instance>, Observed) {
    let mut object = instance(Power::Running, 1, 0);
    object.status.started_launch = Some(LaunchId(1));
    object.status.observed_generation = object.meta.generation;
    let mut machine = machine(VmmState::Running, GuestPhase::Ready);
    machine.volumes = disks.iter().map(|number| disk(*number)).collect();
    machine.guest.volumes = volumes;
    let mut seen = seen(Some(machine));
    seen.parts.volumes.disks = mounts.iter().filter_map(|mount| mount.first_disk).map(disk).collect();
    object.spec.volumes = mounts;
    (object, seen)
}

fn planned((object, seen): &(Object<Instance>, Observed)) -> String {
    name(&plan(&Desired::Present(object), seen, at(5).into()))
}

#[test]
fn a_disk_is_there_before_it_is_mounted_and_until_it_is_unmounted() {
    let (kept, added, leaving) = (|| mount(0, false), || mount(1, false), || mount(1, true));
    for (mounts, disks, report, expected) in [
        (vec![kept()], &[0][..], guest(&[0], &[0]), "Converged"),
        // Attached.
        (vec![kept(), added()], &[0], guest(&[0], &[0]), "AddVolume"),
        (vec![kept(), added()], &[0, 1], guest(&[0], &[0]), "MountVolumes"),
        (vec![kept(), added()], &[0, 1], guest(&[0, 1], &[0, 1]), "Converged"),
        (vec![kept(), added()], &[0, 1], guest(&[0, 1], &[0]), "Converged"),
        // Detached.
        (vec![kept(), leaving()], &[0, 1], guest(&[0, 1], &[0, 1]), "MountVolumes"),
        (vec![kept(), leaving()], &[0, 1], guest(&[0], &[0, 1]), "Converged"),
        (vec![kept(), leaving()], &[0, 1], guest(&[0], &[0]), "RemoveVolume"),
        (vec![kept(), leaving()], &[0], guest(&[0], &[0]), "ForgetVolumes"),
        // A guest that was never asked may have it mounted.
        (vec![kept(), leaving()], &[0, 1], guest(&[0, 1], &[0]), "MountVolumes"),
        // It is kept after all.
        (vec![kept(), added()], &[0, 1], guest(&[0], &[0]), "MountVolumes"),
    ] {
        let seen = running(mounts.clone(), disks, Some(report.clone()));
        assert_eq!(planned(&seen), expected, "{mounts:?} {disks:?} {report:?}");
    }
}

#[test]
fn a_request_is_sent_once_and_a_crash_at_a_disk_takes_it_out_first() {
    let mut seen = running(vec![mount(0, false), mount(1, true)], &[0, 1], Some(guest(&[0, 1], &[0, 1])));
    let machine = |seen: &mut (Object<Instance>, Observed)| seen.1.machine.take().expect("there");
    let mut asked = machine(&mut seen);
    asked.guest.volumes_asked = Some(vec![in_guest(0)]);
    seen.1.machine = Some(asked);
    assert_eq!(planned(&seen), "Converged", "it has not answered yet");
    let mut cut = machine(&mut seen);
    cut.unsure_volume = Some(2);
    seen.1.machine = Some(cut.clone());
    assert_eq!(planned(&seen), "RemoveVolume");
    // Before its memory is saved, too.
    (cut.vmm, seen.0.spec.power) = (VmmState::Paused, Power::Standby);
    seen.1.machine = Some(cut);
    assert_eq!(planned(&seen), "RemoveVolume");
}

#[test]
fn a_vm_that_cannot_change_its_volumes_keeps_them_until_it_is_down() {
    let (object, mut seen) = running(vec![mount(0, true), mount(1, false)], &[0], None);
    assert_eq!(name(&plan(&Desired::Present(&object), &seen, at(5).into())), "Converged");
    let next = status(&object, Some(&seen), &PassEnd { now: at(5).into(), outcome: Outcome::Converged });
    let found = condition::find(&next.conditions, ConditionType::VolumesMounted).expect("reported");
    assert_eq!(found.reason, Reason::WaitingForStart);
    seen.machine = None;
    let step = plan(&Desired::Present(&object), &seen, at(5).into());
    assert_eq!(name(&step), "ApplyChanges", "the mount is removed before the next start");
}

#[test]
fn a_disk_that_grows_is_grown_in_its_vm_and_then_filled_by_its_guest() {
    let planned = |known: Option<u64>, filled: Option<u64>, fills_disks| {
        let mut report = guest(&[0], &[0]);
        (report.fills_disks, report.requested[0].size) = (fills_disks, filled);
        let (object, mut seen) = running(vec![mount(0, false)], &[0], Some(report));
        seen.parts.volumes.sizes = BTreeMap::from([(0, Bytes(20))]);
        let machine = seen.machine.as_mut().expect("there");
        machine.volume_sizes = known.map(|known| (0, Bytes(known))).into_iter().collect();
        planned(&(object, seen))
    };
    assert_eq!(planned(None, None, true), "GrowVolume", "the VM of an earlier version");
    assert_eq!(planned(Some(10), None, true), "MountVolumes");
    assert_eq!(planned(Some(10), Some(10), true), "GrowVolume");
    assert_eq!(planned(Some(20), Some(10), true), "MountVolumes");
    assert_eq!(planned(Some(20), Some(20), true), "Converged");
    // The file of a disk is never cut.
    assert_eq!(planned(Some(30), Some(30), true), "Converged");
    // A guest of an earlier version fills its disk when it boots.
    assert_eq!(planned(Some(20), None, false), "Converged");
}

#[test]
fn a_saved_memory_continues_with_the_disks_that_it_was_saved_with() {
    let (mut object, mut seen) = running(vec![mount(0, true), mount(3, false)], &[], None);
    (object.spec.standby, object.spec.run) = (StandbyNo(1), RunNo(1));
    seen.machine = None;
    seen.memory = Some(Memory::Saved(SavedMemory {
        standby: StandbyNo(1),
        run: RunNo(1),
        launch: LaunchId(1),
        compression_state: CompressionState::Plain,
        volumes: vec![0],
    }));
    let step = plan(&Desired::Present(&object), &seen, at(5).into());
    let Plan::Act(steps) = &step else { panic!("{step:?}") };
    let [Action::Restore(launch)] = steps.as_slice() else { panic!("{steps:?}") };
    assert_eq!(launch.volumes, [disk(0)]);
}

#[test]
fn the_reason_why_a_guest_keeps_a_volume_is_reported() {
    let mut report = guest(&[], &[0]);
    report.problems.insert("/0".to_owned(), "used by sleep (7)".to_owned());
    report.problems.insert("/1".to_owned(), "it is a file".to_owned());
    let (object, seen) = running(vec![mount(0, true)], &[0], Some(report));
    let next = status(&object, Some(&seen), &PassEnd { now: at(5).into(), outcome: Outcome::Converged });
    let found = condition::find(&next.conditions, ConditionType::VolumesMounted).expect("reported");
    assert_eq!(
        (found.reason, found.message.as_str()),
        (Reason::VolumeInUse, "/0: used by sleep (7); /1: it is a file")
    );
}
