//! Tests of changes that wait for a start: when they are carried out, and what is reported until then.

use stead_schemas::instance::Pending;

use super::*;

fn changed(power: Power, ended_run: u64) -> Object<Instance> {
    let mut object = instance(power, 1, ended_run);
    object.spec.defer(Pending { vcpus: Some(4), ..Pending::default() });
    object
}

fn planned(object: &Object<Instance>, machine: Option<Machine>, memory: Option<Memory>) -> String {
    name(&plan(&Desired::Present(object), &Observed { memory, ..seen(machine) }, at(5).into()))
}

#[test]
fn changes_are_carried_out_when_no_vm_and_no_memory_could_contradict_them() {
    let saved = || {
        Some(Memory::Saved(SavedMemory {
            run: RunNo(1),
            launch: LaunchId(1),
            standby: StandbyNo(0),
            compression_state: CompressionState::Plain,
            volumes: Vec::new(),
        }))
    };
    let up = |vmm| Some(machine(vmm, GuestPhase::Ready));
    for (power, ended_run, machine, memory, next) in [
        (Power::Running, 0, None, None, "ApplyChanges"),
        (Power::Stopped, 0, None, None, "ApplyChanges"),
        (Power::Running, 1, None, None, "ApplyChanges"),
        // What is left of a VM goes first.
        (Power::Stopped, 1, up(VmmState::Dead), None, "Release"),
        (Power::Stopped, 1, None, saved(), "DiscardMemory"),
        // A memory has the machine of its save.
        (Power::Running, 0, None, saved(), "Restore"),
        (Power::Standby, 0, None, saved(), "Converged"),
    ] {
        let object = changed(power, ended_run);
        let what = format!("{power:?} {ended_run} {machine:?} {memory:?}");
        assert_eq!(planned(&object, machine, memory), next, "{what}");
    }
    let mut object = changed(Power::Running, 0);
    object.spec.apply_pending();
    assert_eq!(planned(&object, None, None), "Launch");
}

#[test]
fn the_condition_lists_what_waits_and_goes_with_it() {
    let mut object = changed(Power::Running, 0);
    let running = || Some(machine(VmmState::Running, GuestPhase::Ready));
    let end = PassEnd { now: at(5).into(), outcome: Outcome::Converged };
    object.status = status(&object, Some(&seen(running())), &end);
    let waiting = condition::find(&object.status.conditions, ConditionType::PendingChanges);
    let waiting = waiting.expect("reported");
    assert_eq!((waiting.status, waiting.reason), (ConditionStatus::True, Reason::WaitingForStart));
    assert!(waiting.message.ends_with(": vcpus"), "{}", waiting.message);
    object.spec.apply_pending();
    object.status = status(&object, Some(&seen(running())), &end);
    assert_eq!(condition::find(&object.status.conditions, ConditionType::PendingChanges), None);
}
