//! Deadlines, ends and restarts of launches, and the conditions that report on guests.

use super::*;

#[test]
fn the_boot_deadline_is_longer_than_the_slowest_boot_seen() {
    // recipes.md: 2 s under TCG; on a loaded host it was observed to take ten times as long.
    assert!(limits::GUEST_BOOT_DEADLINE > Duration::from_secs(20));
}

#[test]
fn a_guest_that_ran_before_is_neither_overdue_nor_killed_before_it_answers_a_new_daemon() {
    let long_after = at(3600);
    let silent = || seen(Some(machine(VmmState::Running, GuestPhase::Silent)));
    let mut object = instance(Power::Running, 1, 0);
    object.status.state = State::Running;
    (object.status.started_at, object.status.started_launch) = (Some(at(2)), Some(LaunchId(1)));
    let step = plan(&Desired::Present(&object), &silent(), long_after.into());
    assert!(matches!(&step, Plan::Wait(wait) if wait.until.is_none()), "{step:?}");
    let end = PassEnd { now: long_after.into(), outcome: Outcome::Converged };
    let reported = status(&object, Some(&silent()), &end);
    assert_eq!((reported.ended_run, reported.exit, reported.state), (RunNo(0), None, State::Initializing));
    let mut just_attached = machine(VmmState::Running, GuestPhase::Silent);
    just_attached.listening_since = at(3599);
    let just_attached = seen(Some(just_attached));
    let step = plan(&Desired::Present(&object), &just_attached, long_after.into());
    assert!(matches!(&step, Plan::Wait(wait) if wait.until == Some(at(3609))), "{step:?}");
    assert_eq!(status(&object, Some(&just_attached), &end).state, State::Running, "no change was notified");
    object.status.state = State::Initializing;
    assert_eq!(status(&object, Some(&just_attached), &end).state, State::Initializing);
    object.status.state = State::Running;
    let again = seen(Some(machine(VmmState::Running, GuestPhase::Ready)));
    assert_eq!(status(&object, Some(&again), &end).started_at, Some(at(2)));
    // A stop request still gives the guest its grace period.
    object.spec.power = Power::Stopped;
    object.spec.power_since = at(3599);
    assert_eq!(name(&plan(&Desired::Present(&object), &silent(), long_after.into())), "Wait Converging");
    assert_eq!(name(&plan(&Desired::Present(&object), &silent(), at(3609).into())), "Kill");
    // A guest that never started is overdue.
    let object = instance(Power::Running, 1, 0);
    assert_eq!(status(&object, Some(&silent()), &end).ended_run, RunNo(1));
}

#[test]
fn a_boot_that_outlived_its_daemon_is_overdue_only_after_the_next_one_listened_for_a_moment() {
    let object = instance(Power::Running, 1, 0);
    let mut booted = machine(VmmState::Running, GuestPhase::Silent);
    booted.listening_since = at(3600);
    let ended_run = |now| {
        let end = PassEnd { now, outcome: Outcome::Converged };
        status(&object, Some(&seen(Some(booted.clone()))), &end).ended_run
    };
    let grace = i64::try_from(limits::GUEST_ANSWER_GRACE.as_secs()).expect("seconds");
    assert_eq!(
        (ended_run(at(3599 + grace).into()), ended_run(at(3600 + grace).into())),
        (RunNo(0), RunNo(1))
    );
    let step = plan(&Desired::Present(&object), &seen(Some(booted.clone())), at(3600).into());
    assert!(matches!(&step, Plan::Wait(wait) if wait.until == Some(at(3600 + grace))), "{step:?}");
}

#[test]
fn the_end_of_a_long_run_is_acknowledged_before_the_process_is_ended() {
    let mut object = instance(Power::Running, 1, 1);
    let exit = Exit { code: Some(0), message: String::new(), is_boot_failure: false };
    let mut machine = machine(VmmState::Running, GuestPhase::Exited);
    machine.guest.exit = Some(exit);
    let ready = |status| Condition {
        kind: ConditionType::Ready,
        status,
        reason: Reason::ProgramExited,
        message: String::new(),
        observed_generation: Generation(1),
        last_transition_time: at(3600),
    };
    object.status.conditions = vec![ready(ConditionStatus::False)];
    let step =
        |machine: &Machine, now| name(&plan(&Desired::Present(&object), &seen(Some(machine.clone())), now));
    assert_eq!(step(&machine, at(3600).into()), "AcknowledgeExit");
    machine.guest.is_exit_acknowledged = true;
    assert_eq!(step(&machine, at(3601).into()), "Wait Converging");
    assert_eq!(step(&machine, at(3611).into()), "Kill");
}

/// Returns the status after a launch of age `age` ended with `code`.
fn after_end(object: &Object<Instance>, code: i32, age: i64) -> InstanceStatus {
    let mut ended = machine(VmmState::Running, GuestPhase::Exited);
    (ended.launched_at, ended.listening_since) = (at(10_000 - age), at(10_000 - age));
    ended.guest.exit = Some(Exit { code: Some(code), message: String::new(), is_boot_failure: false });
    let end = PassEnd { now: at(10_000).into(), outcome: Outcome::Acting };
    status(object, Some(&seen(Some(ended))), &end)
}

#[test]
fn restarts_follow_their_policy() {
    use stead_schemas::policy::RestartWhen::{Always, Never, OnFailure};
    // Each row: policy, allowed attempts, attempts so far, exit code and age of the launch in seconds; then
    // the seconds until the next attempt, or none if the run has ended.
    let table = [
        (Never, 0, 0, 1, 5, None),
        (OnFailure, 0, 0, 0, 5, None),
        (OnFailure, 0, 0, 1, 5, Some(5)),
        (OnFailure, 0, 1, 137, 5, Some(10)),
        (Always, 0, 2, 0, 5, Some(20)),
        (Always, 0, 60, 0, 5, Some(300)),
        (Always, 3, 2, 0, 5, Some(20)),
        (Always, 3, 3, 0, 5, None),
        // The program ran for long enough: the count begins anew.
        (Always, 3, 3, 0, 600, Some(5)),
    ];
    for (when, max_attempts, attempts, code, age, expected) in table {
        let mut object = instance(Power::Running, 1, 0);
        object.spec.restart = RestartPolicy { when, max_attempts, ..RestartPolicy::default() };
        object.status.restart = RestartStatus { run: RunNo(1), attempts, ..RestartStatus::default() };
        let status = after_end(&object, code, age);
        let next = status.restart.next_attempt_at.map(|next| next.duration_since(at(10_000)).as_secs());
        let case = format!("{when:?} {attempts} of {max_attempts}, code {code}, age {age}");
        assert_eq!((next, status.ended_run), (expected, RunNo(u64::from(expected.is_none()))), "{case}");
        assert_eq!(status.exit.map(|exit| exit.code), Some(Some(code)), "{case}");
    }
}

#[test]
fn a_restart_waits_for_its_time_and_its_old_machine_goes_first() {
    let mut object = instance(Power::Running, 1, 0);
    object.spec.restart = RestartPolicy { when: RestartWhen::Always, ..RestartPolicy::default() };
    object.status = after_end(&object, 1, 5);
    let mut old = machine(VmmState::Running, GuestPhase::Exited);
    old.launched_at = at(9_995);
    old.guest.exit.clone_from(&object.status.exit);
    let plan_at = |object: &Object<Instance>, machine: Option<Machine>, now: i64| {
        name(&plan(&Desired::Present(object), &seen(machine), at(now).into()))
    };
    assert_eq!(plan_at(&object, Some(old.clone()), 10_001), "AcknowledgeExit");
    old.vmm = VmmState::Dead;
    assert_eq!(plan_at(&object, Some(old), 10_001), "Release");
    assert_eq!(plan_at(&object, None, 10_004), "Wait ProgramExited");
    assert_eq!(plan_at(&object, None, 10_005), "Launch");
    object.spec.power = Power::Stopped;
    assert_eq!(plan_at(&object, None, 10_005), "Converged");
    object.spec.expires_at = Some(at(10_006));
    assert_eq!(plan_at(&object, None, 10_005), "Converged");
    assert_eq!(plan_at(&object, None, 10_006), "Expire");
}

proptest! {
    #[test]
    fn no_two_instances_and_no_two_boots_share_a_machine_id(
        one in "[a-z][a-z0-9]{23}", other in "[a-z][a-z0-9]{23}", first in 0u64..4_000_000_000, later in 0u64..4_000_000_000,
    ) {
        let [one, other]: [Uid; 2] = [one, other].map(|text| text.parse().expect("a uid"));
        let (first, later) = (LaunchId(first), LaunchId(later));
        prop_assert_eq!(machine_id(&one, first) == machine_id(&other, first), one == other);
        prop_assert_eq!(machine_id(&one, first) == machine_id(&one, later), first == later);
        prop_assert_eq!(machine_id(&one, later).len(), 32);
    }
}

#[test]
fn a_machine_id_is_made_of_the_uid_and_of_its_boot() {
    assert_eq!(machine_id(&uid(), LaunchId(0)), "0e108452948b257ed4bcbd32f6ebeba6");
    assert_ne!(machine_id(&uid(), LaunchId(1)), machine_id(&uid(), LaunchId(0)));
    let last: Uid = "z".repeat(24).parse().expect("valid");
    assert_eq!(machine_id(&last, LaunchId(0)), format!("{:032x}", 36u128.pow(24) - 1));
}

#[test]
fn a_guest_without_the_headers_it_needs_is_reported_and_runs() {
    let end = PassEnd { now: at(1).into(), outcome: Outcome::Converged };
    let poor = || {
        let mut machine = machine(VmmState::Running, GuestPhase::Ready);
        machine.has_headers = false;
        seen(Some(machine))
    };
    let reported =
        |status: &InstanceStatus| condition::find(&status.conditions, ConditionType::KernelHeaders).cloned();
    let mut object = instance(Power::Running, 1, 0);
    object.status = status(&object, Some(&poor()), &end);
    let lack = reported(&object.status).expect("reported");
    assert_eq!((lack.status, lack.reason), (ConditionStatus::False, Reason::KernelHeadersMissing));
    assert!(condition::is_ready(&object.status.conditions), "it runs all the same");
    // The condition stays as it was while the host cannot be observed. It ends with a machine that has the
    // headers, or without a machine.
    assert_eq!(reported(&status(&object, None, &end)), Some(lack));
    let rich = seen(Some(machine(VmmState::Running, GuestPhase::Ready)));
    assert_eq!(reported(&status(&object, Some(&rich), &end)), None);
    assert_eq!(reported(&status(&object, Some(&seen(None)), &end)), None);
    object.spec.skip_kernel_headers = true;
    assert_eq!(reported(&status(&object, Some(&poor()), &end)), None);
}

#[test]
fn a_guest_that_does_not_answer_is_running_and_not_ready_until_it_does() {
    let end = PassEnd { now: at(1).into(), outcome: Outcome::Converged };
    let unresponsive = |vmm| {
        let mut machine = machine(vmm, GuestPhase::Ready);
        machine.guest.is_unresponsive = true;
        seen(Some(machine))
    };
    let mut object = instance(Power::Running, 1, 0);
    object.status = status(&object, Some(&unresponsive(VmmState::Running)), &end);
    let ready = condition::find(&object.status.conditions, ConditionType::Ready).expect("reported");
    assert_eq!(object.status.state, State::Running);
    assert_eq!((ready.status, ready.reason), (ConditionStatus::False, Reason::AgentUnreachable));
    // A VM that is paused, or a guest that answers again, does not get this condition.
    let paused = status(&object, Some(&unresponsive(VmmState::Paused)), &end);
    assert!(paused.conditions.iter().all(|condition| condition.reason != Reason::AgentUnreachable));
    let answers = seen(Some(machine(VmmState::Running, GuestPhase::Ready)));
    assert!(condition::is_ready(&status(&object, Some(&answers), &end).conditions));
}
