//! Tests of the room that an instance holds: when it gives it back, and what it does without.

use stead_schemas::numbers::GrantNo;

use super::*;

fn saved() -> Option<Memory> {
    Some(Memory::Saved(SavedMemory {
        run: RunNo(1),
        launch: LaunchId(1),
        standby: StandbyNo(0),
        compression_state: CompressionState::Plain,
        volumes: Vec::new(),
    }))
}

/// Returns the status after an observation of this machine and memory.
fn after(object: &Object<Instance>, machine: Option<Machine>, memory: Option<Memory>) -> InstanceStatus {
    let end = PassEnd { now: at(5).into(), outcome: Outcome::Converged };
    status(object, Some(&Observed { memory, ..seen(machine) }), &end)
}

#[test]
fn room_is_given_back_when_no_vm_is_there_and_none_is_to_come() {
    use GuestPhase::Ready;
    use VmmState::{Dead, Paused, Running, Unreachable};
    let up = |vmm| Some(machine(vmm, Ready));
    for (power, ended_run, machine, memory, is_returned) in [
        // What runs, or is to run, keeps its room, also between two VMMs.
        (Power::Running, 0, up(Running), None, false),
        (Power::Running, 0, None, None, false),
        (Power::Running, 0, up(Dead), None, false),
        (Power::Running, 0, None, saved(), false),
        (Power::Warm, 0, up(Paused), None, false),
        // What is to end gives it back with its VM.
        (Power::Stopped, 0, up(Running), None, false),
        (Power::Stopped, 0, up(Unreachable(String::new())), None, false),
        (Power::Stopped, 0, up(Dead), None, true),
        (Power::Stopped, 0, None, None, true),
        (Power::Running, 1, up(Running), None, false),
        (Power::Running, 1, None, None, true),
        // What is to be kept gives it back when it is kept and its VM is gone.
        (Power::Standby, 0, up(Running), None, false),
        (Power::Standby, 0, up(Paused), saved(), false),
        (Power::Standby, 0, None, None, false),
        (Power::Standby, 0, up(Dead), saved(), true),
        (Power::Standby, 0, None, saved(), true),
    ] {
        let object = instance(power, 1, ended_run);
        let next = after(&object, machine.clone(), memory.clone());
        let what = format!("{power:?} {ended_run} {machine:?} {memory:?}");
        assert_eq!(next.returned == object.spec.grant, is_returned, "{what}");
        let after = Object { status: next, ..object };
        assert_eq!(after.holds_resources(), !is_returned, "{what}");
    }
}

#[test]
fn an_observation_of_an_earlier_grant_does_not_give_back_a_later_one() {
    let mut object = instance(Power::Stopped, 1, 0);
    let stopped = after(&object, None, None);
    // It was started before that status was written.
    (object.spec.power, object.spec.run, object.spec.grant) = (Power::Running, RunNo(2), GrantNo(2));
    object.status = stopped;
    assert!(object.holds_resources());
    object.spec.power = Power::Stopped;
    assert!(object.holds_resources(), "a VM of the second run may be there");
    // What cannot be observed keeps its room.
    let end = PassEnd { now: at(5).into(), outcome: Outcome::Converged };
    object.status = status(&object, None, &end);
    assert!(object.holds_resources());
}

#[test]
fn a_standby_whose_memory_is_lost_asks_for_room_before_it_has_a_vm() {
    let mut object = instance(Power::Standby, 1, 0);
    let planned = |object: &Object<Instance>, short_of: Option<&str>| {
        let seen = Observed { short_of: short_of.map(ToOwned::to_owned), ..seen(None) };
        plan(&Desired::Present(object), &seen, at(5).into())
    };
    // It never gave its room back: its VMM died on the way.
    assert_eq!(name(&planned(&object, None)), "Launch");
    object.status.returned = object.spec.grant;
    assert_eq!(name(&planned(&object, None)), "Regrant");
    let Plan::Wait(wait) = planned(&object, Some("memory")) else { panic!("it has to wait") };
    assert_eq!(wait.reason, Reason::InsufficientResources);
    assert_eq!(wait.message, "the host has not enough memory left; it goes on when there is room");
    // The same while it is idle, when its standby is given up.
    object.spec.power_by = PowerCause::Idle;
    assert_eq!(name(&planned(&object, Some("cpu"))), "Wait InsufficientResources");
    assert_eq!(name(&planned(&object, None)), "Wake");
}
