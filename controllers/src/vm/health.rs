//! Health of the program: when it is probed, and the verdict.
//!
//! Health is independent of the life of the machine: a probe begins when the program runs and ends before
//! anything is done to its VM. The restart policy decides what follows from an unhealthy verdict.

use stead_schemas::health::{HealthOf, HealthStatus, Verdict};
use stead_schemas::instance::{Instance, Power};
use stead_schemas::meta::Object;

use super::facts::{has_ended, has_started, is_another, is_wanted};
use super::restarts::{self, Follows};
use super::{Action, Observed};
use crate::host::{GuestPhase, Machine, ProbePlan, ProbeSeen, VmmState};
use crate::runtime::{Desired, Moment};

/// Returns the step that brings the probe in line with the machine, if a step is due.
pub(super) fn plan_probe(desired: &Desired<'_, Instance>, seen: &Observed, now: Moment) -> Option<Action> {
    let wanted = match desired {
        Desired::Present(object) => wanted_probe(object, seen, now),
        Desired::Absent(_) => None,
    };
    match (&seen.probe, wanted) {
        (Some(probe), Some(wanted)) if probe.of == wanted.of => None,
        (Some(_), _) => Some(Action::EndProbe(seen.uid.clone())),
        (None, Some(wanted)) => Some(Action::BeginProbe(Box::new(wanted))),
        (None, None) => None,
    }
}

fn wanted_probe(object: &Object<Instance>, seen: &Observed, now: Moment) -> Option<ProbePlan> {
    let check = object.spec.health.as_ref()?;
    let machine = seen.machine.as_ref().filter(|machine| is_probed(object, machine, now))?;
    let of = of(object, machine);
    let earlier = &object.status.health;
    // If the start was not recorded before, this pass records it.
    let started_at = object.status.started_at.filter(|_| has_started(object, machine)).unwrap_or(now.at());
    Some(ProbePlan {
        owner: object.meta.uid.clone(),
        of,
        check: check.clone(),
        address: seen.parts.nic.as_ref().map(|port| port.card.address),
        bridge: seen.parts.nic.as_ref().map(|port| port.bridge.clone()),
        lenient_for: check.start_period.0.saturating_sub(now.elapsed(started_at)),
        tally: if earlier.of == Some(of) { earlier.tally.clone() } else { Default::default() },
    })
}

/// True if the program runs and should continue to run. In any other state the probe would say nothing about
/// its health.
fn is_probed(object: &Object<Instance>, machine: &Machine, now: Moment) -> bool {
    let is_up = machine.vmm == VmmState::Running && machine.guest.phase == GuestPhase::Ready;
    let is_desired = object.spec.power == Power::Running && is_wanted(object, machine);
    // A fork is probed only after it took over its identity: before that, it has another instance's address.
    let is_itself = !is_another(object, machine);
    is_up && is_desired && is_itself && !has_ended(object, machine, now)
}

fn of(object: &Object<Instance>, machine: &Machine) -> HealthOf {
    HealthOf { launch: machine.launch, version: object.spec.health_version }
}

/// Returns the present verdict. The verdict of a program that no longer runs stays as it was.
pub(super) fn health(object: &Object<Instance>, seen: &Observed, now: Moment) -> HealthStatus {
    let recorded = &object.status.health;
    let Some(check) = &object.spec.health else { return HealthStatus::default() };
    let Some(machine) = seen.machine.as_ref().filter(|machine| is_probed(object, machine, now)) else {
        return recorded.clone();
    };
    let of = of(object, machine);
    let probe = seen.probe.as_ref().filter(|probe| probe.of == of);
    recorded.judged(of, check, probe.map(|ProbeSeen { tally, .. }| tally), now.at())
}

/// Returns the machine whose program is unhealthy, and what follows by its restart policy.
pub(super) fn failed<'a>(
    object: &Object<Instance>,
    seen: &'a Observed,
    now: Moment,
) -> Option<(&'a Machine, Follows)> {
    let machine = seen.machine.as_ref().filter(|machine| is_probed(object, machine, now))?;
    let health = health(object, seen, now);
    if health.verdict != Verdict::Unhealthy || health.of != Some(of(object, machine)) {
        return None;
    }
    // The program ran well until this time.
    let since = health.since.unwrap_or(now.at());
    let is_failure = true;
    Some((machine, restarts::follows(object, machine, is_failure, since, now)))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use stead_schemas::health::{HealthCheck, Probe, Tally};
    use stead_schemas::instance::{Exit, InstanceStatus, State};
    use stead_schemas::numbers::{LaunchId, RunNo};
    use stead_schemas::policy::{RestartBlocked, RestartPolicy, RestartReason, RestartWhen};
    use stead_schemas::quantity::GoDuration;

    use super::super::tests::{at, instance, machine, name, seen};
    use super::super::{plan::plan, status::status};
    use super::*;
    use crate::runtime::{Outcome, PassEnd};

    const NOW: i64 = 100;

    fn checked(power: Power) -> Object<Instance> {
        let mut object = instance(power, 1, 0);
        object.spec.health = Some(HealthCheck::of(Probe::Tcp { port: 80 }));
        object.spec.health_version = 4;
        (object.status.started_at, object.status.started_launch) = (Some(at(1)), Some(LaunchId(1)));
        object
    }

    fn running() -> Machine {
        machine(VmmState::Running, GuestPhase::Ready)
    }

    fn probed(launch: u64, version: u64, failures: u32) -> Option<ProbeSeen> {
        let of = HealthOf { launch: LaunchId(launch), version };
        Some(ProbeSeen { of, tally: Tally { failures, ..Tally::default() } })
    }

    fn step(object: &Object<Instance>, machine: Option<Machine>, probe: Option<ProbeSeen>) -> String {
        let seen = Observed { probe, ..seen(machine) };
        name(&plan(&Desired::Present(object), &seen, at(NOW).into()))
    }

    fn after_pass(object: &Object<Instance>, probe: Option<ProbeSeen>, now: i64) -> InstanceStatus {
        let end = PassEnd { now: at(now).into(), outcome: Outcome::Converged };
        status(object, Some(&Observed { probe, ..seen(Some(running())) }), &end)
    }

    #[test]
    fn what_runs_is_probed_and_nothing_is_done_to_a_vm_that_is() {
        let none = |mut object: Object<Instance>| {
            object.spec.health = None;
            object
        };
        let spent = |mut object: Object<Instance>| {
            object.status.ended_launch = Some(LaunchId(1));
            object
        };
        let mut exited = machine(VmmState::Running, GuestPhase::Exited);
        exited.guest.exit = Some(Exit { code: Some(0), message: String::new(), is_boot_failure: false });
        let up = || checked(Power::Running);
        let good = || probed(1, 4, 0);
        let booting = || machine(VmmState::Running, GuestPhase::Configured);
        let table = [
            (up(), Some(running()), None, "BeginProbe"),
            (up(), Some(running()), good(), "Converged"),
            (up(), Some(booting()), None, "Wait WaitingForGuest"),
            // A probe of another launch or check is ended; the next round begins the new probe.
            (up(), Some(running()), probed(9, 4, 0), "EndProbe"),
            (up(), Some(running()), probed(1, 3, 0), "EndProbe"),
            (none(up()), Some(running()), good(), "EndProbe"),
            (none(up()), Some(running()), None, "Converged"),
            (up(), Some(exited), good(), "EndProbe"),
            (up(), Some(machine(VmmState::Dead, GuestPhase::Ready)), good(), "EndProbe"),
            (up(), Some(machine(VmmState::Paused, GuestPhase::Ready)), good(), "EndProbe"),
            (up(), None, good(), "EndProbe"),
            (spent(up()), Some(running()), good(), "EndProbe"),
            (checked(Power::Stopped), Some(running()), good(), "EndProbe"),
            (checked(Power::Standby), Some(running()), good(), "EndProbe"),
            (checked(Power::Standby), Some(running()), None, "Pause"),
        ];
        for (object, machine, probe, expected) in table {
            let case = format!("{:?} {machine:?} {probe:?}", object.spec.power);
            assert_eq!(step(&object, machine, probe), expected, "{case}");
        }
        let orphan = Observed { probe: good(), ..seen(None) };
        assert_eq!(name(&plan(&Desired::Absent(None), &orphan, at(NOW).into())), "EndProbe");
    }

    #[test]
    fn a_probe_goes_on_from_what_was_recorded_and_the_start_period_counts_from_the_start() {
        let mut object = checked(Power::Running);
        let begun = |object: &Object<Instance>| {
            let seen = seen(Some(running()));
            match plan_probe(&Desired::Present(object), &seen, at(11).into()) {
                Some(Action::BeginProbe(plan)) => (plan.tally.failures, plan.lenient_for.as_secs()),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(begun(&object), (0, 20));
        object.status.health = after_pass(&object, probed(1, 4, 2), NOW).health;
        assert_eq!(begun(&object), (2, 20));
        object.spec.health_version = 5;
        assert_eq!(begun(&object), (0, 20), "counted by another check");
        // The pass is the first that observes the program running.
        (object.status.started_at, object.status.started_launch) = (None, None);
        assert_eq!(begun(&object).1, 30);
    }

    /// Returns an unhealthy instance. The arguments are the policy, the allowed attempts, the attempts so
    /// far, and when it became unhealthy.
    fn unhealthy(when: RestartWhen, max_attempts: u32, attempts: u32, since: i64) -> Object<Instance> {
        let mut object = checked(Power::Running);
        let backoff = GoDuration(Duration::from_secs(2));
        object.spec.restart = RestartPolicy { when, max_attempts, backoff, ..RestartPolicy::default() };
        object.status.restart.run = RunNo(1);
        object.status.restart.attempts = attempts;
        object.status.health = after_pass(&object, probed(1, 4, 3), since).health;
        object
    }

    #[test]
    fn an_unhealthy_program_is_restarted_by_its_policy() {
        use RestartWhen::{Always, Never, OnFailure};
        // The last columns: seconds until the next attempt, and whether the policy allows no more attempts.
        let table = [
            (Never, 0, 0, NOW, None, false),
            (OnFailure, 0, 0, NOW, Some(2), false),
            (Always, 0, 2, NOW, Some(8), false),
            (Always, 2, 2, NOW, None, true),
            // The program ran well for long enough before.
            (Always, 2, 2, 700, Some(2), false),
        ];
        for (when, max_attempts, attempts, since, delay, is_over) in table {
            let object = unhealthy(when, max_attempts, attempts, since);
            let case = format!("{when:?} {attempts} of {max_attempts}, unhealthy since {since}");
            // The pass comes long after: what counts is when the program became unhealthy.
            let now = since + 5000;
            let recorded = after_pass(&object, probed(1, 4, 90), now);
            let next = recorded.restart.next_attempt_at.map(|next| next.duration_since(at(now)).as_secs());
            assert_eq!((next, recorded.ended_run), (delay, RunNo(0)), "{case}");
            let reason = delay.map(|_| RestartReason::HealthCheckFailed);
            assert_eq!(recorded.restart.last_reason, reason, "{case}");
            let blocked = is_over.then_some(RestartBlocked::MaxAttemptsExceeded);
            assert_eq!(recorded.restart.blocked, blocked, "{case}");
            assert_eq!(recorded.state, State::Running, "the state is another matter: {case}");
            let first = if delay.is_some() { "Record HealthCheckFailed" } else { "Converged" };
            assert_eq!(step(&object, Some(running()), probed(1, 4, 90)), first, "{case}");
        }
    }

    #[test]
    fn a_failed_launch_ends_gracefully_and_is_followed_after_its_delay() {
        let mut object = unhealthy(RestartWhen::OnFailure, 0, 0, NOW);
        object.status = after_pass(&object, probed(1, 4, 3), NOW);
        assert_eq!(step(&object, Some(running()), probed(1, 4, 3)), "EndProbe");
        assert_eq!(step(&object, Some(running()), None), "Shutdown");
        assert_eq!(step(&object, Some(machine(VmmState::Dead, GuestPhase::Ready)), None), "Release");
        assert_eq!(step(&object, None, None), "Wait HealthCheckFailed");
        // The next launch is another program: its verdict is Starting, whatever the verdict before was.
        let mut next = running();
        (next.launch, next.launched_at) = (LaunchId(2), at(NOW + 2));
        let end = PassEnd { now: at(NOW + 5).into(), outcome: Outcome::Converged };
        let after = status(&object, Some(&seen(Some(next))), &end);
        assert_eq!((after.health.verdict, after.health.tally.failures), (Verdict::Starting, 0));
        assert_eq!((after.restart.attempts, after.restart.next_attempt_at), (1, None));
    }

    #[test]
    fn a_program_that_gets_well_is_no_longer_blocked() {
        let mut object = unhealthy(RestartWhen::Always, 1, 1, NOW);
        object.status = after_pass(&object, probed(1, 4, 3), NOW);
        assert_eq!(object.status.restart.blocked, Some(RestartBlocked::MaxAttemptsExceeded));
        let of = HealthOf { launch: LaunchId(1), version: 4 };
        let well = Some(ProbeSeen { of, tally: Tally { successes: 1, ..Tally::default() } });
        let after = after_pass(&object, well, NOW + 9);
        assert_eq!((after.health.verdict, after.restart.blocked), (Verdict::Healthy, None));
    }
}
