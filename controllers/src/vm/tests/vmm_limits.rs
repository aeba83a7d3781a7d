//! Tests of the limits of VMMs, and of deaths for lack of memory.

use stead_schemas::node::Accelerator;

use super::*;
use crate::host::{LimitsSeen, VmmLimits};

const MIB: u64 = 1 << 20;

fn up() -> Machine {
    machine(VmmState::Running, GuestPhase::Ready)
}

#[test]
fn the_limits_of_a_vmm_follow_the_spec_and_are_set_again_when_they_are_others() {
    let mut object = instance(Power::Running, 1, 0);
    object.status.started_launch = Some(LaunchId(1));
    let planned = |object: &Object<Instance>, limits: Option<LimitsSeen>, accelerator| {
        let mut seen = Observed { limits, ..seen(Some(up())) };
        seen.parts.accelerator = Some(accelerator);
        plan(&Desired::Present(object), &seen, at(5).into())
    };
    let whole = |vcpus, mib| Some(LimitsSeen { vcpus: Some(vcpus), memory: Some(Bytes(mib * MIB)) });
    let kvm = Accelerator::Kvm;
    // The guest's 256 MiB and 128 for the VMM, and 1 GiB of translated code where there is any.
    assert_eq!(name(&planned(&object, whole(1, 384), kvm)), "Converged");
    assert_eq!(name(&planned(&object, whole(1, 384 + 1024), Accelerator::Tcg)), "Converged");
    // A host enforces what it can.
    assert_eq!(name(&planned(&object, None, kvm)), "Converged");
    assert_eq!(name(&planned(&object, Some(LimitsSeen::default()), kvm)), "Converged");
    let expected =
        |vcpus, mib| Plan::Act(vec![Action::Limit(uid(), VmmLimits { vcpus, memory: Bytes(mib * MIB) })]);
    for other in [whole(2, 384), whole(1, 1 << 40), Some(LimitsSeen { vcpus: None, memory: Some(Bytes(1)) })]
    {
        assert_eq!(planned(&object, other, kvm), expected(1, 384), "{other:?}");
    }
    (object.spec.vcpus, object.spec.memory) = (2, Bytes(300 * MIB + 1));
    assert_eq!(planned(&object, whole(1, 384), kvm), expected(2, 301 + 128), "whole megabytes");
}

#[test]
fn a_vmm_that_was_killed_for_memory_is_reported_as_such_and_started_again() {
    let mut object = instance(Power::Running, 1, 0);
    let end = |outcome| PassEnd { now: at(5).into(), outcome };
    let dead = |is_out_of_memory| {
        let dead = Machine { is_out_of_memory, ..machine(VmmState::Dead, GuestPhase::Ready) };
        seen(Some(dead))
    };
    assert_eq!(name(&plan(&Desired::Present(&object), &dead(false), at(5).into())), "Record VmmDied");
    assert_eq!(name(&plan(&Desired::Present(&object), &dead(true), at(5).into())), "Record OutOfMemory");
    let other = status(&object, Some(&dead(false)), &end(Outcome::Converged));
    assert_eq!(other.exit, None);
    object.status = status(&object, Some(&dead(true)), &end(Outcome::Acting));
    let exit = object.status.exit.clone().expect("recorded");
    assert_eq!(
        (exit.code, exit.message.as_str()),
        (Some(137), "the VMM was killed by signal 9 (SIGKILL) - OOM")
    );
    assert_eq!((object.status.exit_run, object.status.ended_run), (RunNo(1), RunNo(0)), "the run goes on");
    let degraded = |status: &InstanceStatus| {
        let found = condition::find(&status.conditions, ConditionType::Degraded).expect("standard");
        (found.status, found.reason)
    };
    let is_short = (ConditionStatus::True, Reason::OutOfMemory);
    assert_eq!(degraded(&object.status), is_short);
    // Its remains are removed, and it is launched again.
    assert_eq!(name(&plan(&Desired::Present(&object), &dead(true), at(6).into())), "Release");
    assert_eq!(name(&plan(&Desired::Present(&object), &seen(None), at(6).into())), "Launch");
    object.status.vmm_deaths = 2;
    assert_eq!(name(&plan(&Desired::Present(&object), &seen(None), at(5).into())), "Wait OutOfMemory");
    // A VM that runs says so until it has run for a while.
    let mut again = up();
    again.launch = LaunchId(2);
    let next = status(&object, Some(&seen(Some(again.clone()))), &end(Outcome::Converged));
    assert_eq!((degraded(&next), condition::is_ready(&next.conditions)), (is_short, true));
    let later = PassEnd { now: at(5 + 3600).into(), outcome: Outcome::Converged };
    let stable = status(&Object { status: next, ..object }, Some(&seen(Some(again))), &later);
    assert_eq!(degraded(&stable).0, ConditionStatus::False);
}
