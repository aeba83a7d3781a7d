//! Forks: from the memory of another instance to an instance with its own identity. Pooled instances are
//! prepared in advance, except for their name.
//!
//! ```text
//! fork     adopt, restore, resume, assume: Running
//! pooled   adopt, restore, resume, assume, pause: held      taken: resume, assume the name: Running
//! ```

use stead_schemas::condition::Reason;
use stead_schemas::guest;
use stead_schemas::instance::{Instance, State};
use stead_schemas::limits::POOL_RETRY;
use stead_schemas::meta::Object;

use crate::host::{AdoptPlan, Machine};
use crate::runtime::{Moment, Plan, Refusal};
use crate::vm::facts::{identity_error, incarnation, lacks};
use crate::vm::guest_config::{guest_network, machine_id};
use crate::vm::steps::{act, record, refuse, wait, wait_for_disk};
use crate::vm::{Action, Observed, OriginSeen};

/// Takes over the memory of the snapshot that the instance begins with, once.
pub(super) fn plan_adopt(object: &Object<Instance>, seen: &Observed) -> Plan<Action> {
    let Some(origin) = object.awaits_memory() else { return Plan::Converged };
    if seen.saved(object).is_some() {
        // The record comes before a VM runs from the memory: taken over a second time, it would be older than
        // the disk.
        return record(Reason::Converging, "recording that the memory was taken over");
    }
    if seen.memory.is_some() {
        return act(Action::DiscardMemory(object.meta.uid.clone()));
    }
    if lacks(seen, |has| has.fork_memory) {
        return refuse("its hypervisor does not declare that a VM can continue from the memory of another");
    }
    if let Some(plan) = origin_trouble(seen) {
        return plan;
    }
    if !seen.parts.is_disk_ready {
        return wait_for_disk(seen, "the root overlay is being copied");
    }
    if let Some(why) = &seen.parts.volumes.trouble {
        return wait(Reason::WaitingForDisk, why.clone(), None);
    }
    act(Action::Adopt(Box::new(AdoptPlan {
        owner: object.meta.uid.clone(),
        snapshot: origin.snapshot.clone(),
        standby: origin.standby,
        run: object.spec.run,
        launch: object.status.launch.next(),
        overlay: object.spec.allocated.disk.clone(),
        volumes: seen.parts.volumes.disks.clone(),
    })))
}

/// Returns the plan if the snapshot that the instance begins with cannot be used now.
fn origin_trouble(seen: &Observed) -> Option<Plan<Action>> {
    let refuse = |reason, message| Some(Plan::Refuse(Refusal { reason, message }));
    match seen.parts.origin.as_ref()? {
        OriginSeen::Ready => None,
        OriginSeen::Pending => {
            let message = "the snapshot that it begins with is being taken";
            Some(wait(Reason::WaitingForSnapshot, message, None))
        }
        OriginSeen::Failed { why, .. } => {
            refuse(Reason::SnapshotFailed, format!("the snapshot that it begins with failed: {why}"))
        }
        OriginSeen::Gone => {
            refuse(Reason::SnapshotFailed, "the snapshot that it begins with is gone".to_owned())
        }
        OriginSeen::Unreadable => {
            let message = "the record of the snapshot that it begins with cannot be read".to_owned();
            refuse(Reason::RecordUnreadable, message)
        }
    }
}

/// Removes a pooled instance that no fork can take, so that another replaces it. The removal is delayed, so
/// that a program that ends at once does not keep the host busy.
pub(super) fn plan_used_up(object: &Object<Instance>, seen: &Observed, now: Moment) -> Plan<Action> {
    let state = object.status.state;
    let (reason, is_recorded, message) = match identity_error(object, seen) {
        Some(why) => {
            let message =
                format!("the guest could not take its identity, and is replaced after a delay: {why}");
            (Reason::GuestBootFailed, state == State::Initializing, message)
        }
        None => {
            let message = "a pooled instance that ended is replaced after a delay".to_owned();
            (Reason::ProgramExited, matches!(state, State::Created | State::Stopped), message)
        }
    };
    let Some(since) = object.status.state_since.filter(|_| is_recorded) else {
        return record(reason, "recording that a pooled instance ended");
    };
    let due = now.end(since, POOL_RETRY);
    if now.at() >= due {
        return act(Action::Expire(object.meta.uid.clone()));
    }
    wait(reason, message, Some(due))
}

pub(super) fn plan_identity(object: &Object<Instance>, machine: &Machine, seen: &Observed) -> Plan<Action> {
    if let Some(why) = &machine.guest.identity_error {
        let message =
            format!("the guest could not take over the fork's identity (hostname, addresses, keys): {why}");
        return Plan::Refuse(Refusal { reason: Reason::GuestBootFailed, message });
    }
    let incarnation = incarnation(object);
    if machine.guest.identity_sent.as_ref() == Some(&incarnation) {
        return wait(Reason::WaitingForGuest, "the guest is taking over the fork's identity", None);
    }
    let identity = guest::NewIdentity {
        incarnation,
        hostname: object.meta.name.to_string(),
        machine_id: machine_id(&object.meta.uid, machine.launch),
        instance: object.meta.uid.to_string(),
        network: guest_network(seen),
    };
    act(Action::TakeIdentity(object.meta.uid.clone(), Box::new(identity)))
}

#[cfg(test)]
mod tests {
    use stead_schemas::instance::{Origin, Power};
    use stead_schemas::numbers::{LaunchId, RunNo, StandbyNo};

    use super::*;
    use crate::host::GuestPhase::{Ready, Silent};
    use crate::host::Memory;
    use crate::host::VmmState;
    use crate::runtime::{Desired, PassEnd};
    use crate::vm::plan::plan;
    use crate::vm::status::status;
    use crate::vm::tests::{at, instance, machine, name, seen, uid};

    /// Returns a pooled instance, or the fork that it became; its memory is taken over.
    fn fork(power: Power) -> Object<Instance> {
        let mut object = instance(power, 1, 0);
        object.spec.origin = Some(Origin {
            snapshot: uid(),
            standby: StandbyNo(1),
            memory_for_run: Some(RunNo(1)),
            image_digest: None,
            is_fork: true,
        });
        object.status.adopted = StandbyNo(1);
        object
    }

    fn identified(vmm: VmmState, incarnation: &str) -> Machine {
        let mut machine = machine(vmm, Ready);
        machine.guest.incarnation = Some(incarnation.to_owned());
        machine
    }

    #[test]
    fn a_pooled_instance_starts_up_to_its_name_in_advance() {
        use VmmState::{Dead, Paused, Running};
        let source_guest = || identified(Running, "the source-0");
        let reported = {
            let mut machine = source_guest();
            machine.guest.identity_sent = Some(incarnation(&fork(Power::Warm)));
            machine
        };
        let unnamed = |vmm| identified(vmm, &incarnation(&fork(Power::Warm)));
        let mut held = fork(Power::Warm);
        (held.status.prepared_launch, held.status.state) = (Some(LaunchId(1)), State::Paused);
        let mut another_launch = fork(Power::Warm);
        another_launch.status.prepared_launch = Some(LaunchId(2));
        let (pooled, taken) = (fork(Power::Warm), fork(Power::Running));
        let mut named = identified(Running, &incarnation(&taken));
        named.guest.identity_sent = Some(incarnation(&taken));
        for (object, machine, memory, expected) in [
            (&pooled, Some(machine(Paused, Silent)), Some(Memory::Incomplete), "Resume"),
            (&pooled, Some(machine(Paused, Silent)), None, "Resume"),
            (&pooled, Some(source_guest()), None, "TakeIdentity"),
            (&pooled, Some(reported), None, "Wait WaitingForGuest"),
            (&pooled, Some(unnamed(Running)), None, "Pause"),
            (&pooled, Some(unnamed(Paused)), None, "Converged"),
            // The guest has not reported to this daemon: the record of the last daemon counts, if it is of
            // this very launch.
            (&held, Some(machine(Paused, Silent)), None, "Converged"),
            (&another_launch, Some(machine(Paused, Silent)), None, "Resume"),
            // A pooled instance never boots: the memory that it began with is used up.
            (&held, Some(machine(Dead, Ready)), None, "Record ProgramExited"),
            (&held, None, None, "Record ProgramExited"),
            // A fork took the instance: only its name is new.
            (&taken, Some(unnamed(Paused)), None, "Resume"),
            (&taken, Some(unnamed(Running)), None, "TakeIdentity"),
            (&taken, Some(named), None, "Converged"),
        ] {
            let mut seen = seen(machine);
            seen.memory = memory;
            let planned = name(&plan(&Desired::Present(object), &seen, at(2).into()));
            assert_eq!(planned, expected, "{:?} {:?}", object.spec.power, seen.machine);
        }
    }

    #[test]
    fn only_a_pooled_instance_that_is_prepared_and_held_is_warm() {
        let end = PassEnd { now: at(2).into(), outcome: crate::runtime::Outcome::Converged };
        let after = |mut object: Object<Instance>, machine| {
            object.status = status(&object, Some(&seen(Some(machine))), &end);
            object
        };
        let unnamed = |vmm| identified(vmm, &incarnation(&fork(Power::Warm)));
        assert!(!after(fork(Power::Warm), machine(VmmState::Paused, Silent)).is_warm());
        assert!(!after(fork(Power::Warm), unnamed(VmmState::Running)).is_warm());
        let held = after(fork(Power::Warm), unnamed(VmmState::Paused));
        assert!(held.is_warm());
        assert!(after(held.clone(), machine(VmmState::Paused, Silent)).is_warm(), "by the record");
        assert!(!after(held, machine(VmmState::Dead, Silent)).is_warm());
    }

    #[test]
    fn one_that_ended_is_replaced_after_a_delay() {
        let mut object = fork(Power::Warm);
        (object.status.state, object.status.state_since) = (State::Created, Some(at(2)));
        let planned = |now| name(&plan(&Desired::Present(&object), &seen(None), at(now).into()));
        let due = 2 + i64::try_from(POOL_RETRY.as_secs()).expect("short");
        assert_eq!(planned(due - 1), "Wait ProgramExited");
        assert_eq!(planned(due), "Expire");
    }

    #[test]
    fn a_pooled_instance_that_cannot_take_its_identity_is_replaced_after_a_delay() {
        let mut ill = identified(VmmState::Running, "the source-0");
        ill.guest.identity_error = Some("no room".to_owned());
        let mut object = fork(Power::Warm);
        let planned = |object: &_, now| {
            name(&plan(&Desired::Present(object), &seen(Some(ill.clone())), at(now).into()))
        };
        assert_eq!(planned(&object, 2), "Record GuestBootFailed");
        let end = PassEnd { now: at(2).into(), outcome: crate::runtime::Outcome::Converged };
        object.status = status(&object, Some(&seen(Some(ill.clone()))), &end);
        let due = 2 + i64::try_from(POOL_RETRY.as_secs()).expect("short");
        assert_eq!(planned(&object, 2), "Wait GuestBootFailed");
        assert_eq!(planned(&object, due - 1), "Wait GuestBootFailed");
        assert_eq!(planned(&object, due), "Expire");
        // The owner asked for this fork: it stays and reports the reason.
        assert_eq!(planned(&fork(Power::Running), due), "Refuse GuestBootFailed");
    }
}
