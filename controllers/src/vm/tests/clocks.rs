//! Behaviour of the VM reconciler while the wall clock is changed.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use super::*;
use crate::runtime::{Clock, Moment, WatchedClock};

/// A wall clock that shows `wall` seconds when `passed` seconds have passed.
#[derive(Default)]
struct SetClock {
    wall: AtomicI64,
    passed: AtomicI64,
}

impl Clock for SetClock {
    fn now(&self) -> Timestamp {
        at(self.wall.load(Ordering::Relaxed))
    }

    fn elapsed(&self) -> Duration {
        Duration::from_secs(self.passed.load(Ordering::Relaxed).unsigned_abs())
    }
}

/// Returns readings of a clock that starts at 10,000 s and is changed by `step` seconds after `before`
/// seconds. It is read at that time and after each of the given numbers of seconds.
fn readings(before: i64, step: i64, later: &[i64]) -> Vec<Moment> {
    let clock = Arc::new(SetClock::default());
    clock.wall.store(10_000, Ordering::Relaxed);
    let watched = WatchedClock::new(clock.clone());
    let advance = |shown: i64, passed: i64| {
        clock.wall.fetch_add(shown, Ordering::Relaxed);
        clock.passed.fetch_add(passed, Ordering::Relaxed);
    };
    advance(before + step, before);
    let mut readings = vec![watched.read()];
    for pause in later {
        advance(*pause, *pause);
        readings.push(watched.read());
    }
    readings
}

fn step_at(object: &Object<Instance>, seen: &Observed, now: Moment) -> String {
    name(&plan(&Desired::Present(object), seen, now))
}

/// Returns a machine that was launched at 10,000 s.
fn launched(vmm: VmmState, phase: GuestPhase) -> Machine {
    Machine { launched_at: at(10_000), listening_since: at(10_000), ..machine(vmm, phase) }
}

#[test]
fn a_standby_after_the_clock_was_set_back_during_the_boot_goes_on() {
    let [now, ..] = readings(5, -3600, &[])[..] else { panic!("a reading") };
    let mut object = instance(Power::Standby, 1, 0);
    object.spec.standby = StandbyNo(1);
    let ready = seen(Some(launched(VmmState::Running, GuestPhase::Ready)));
    assert_eq!(step_at(&object, &ready, now), "Record Converging");
    object.status = status(&object, Some(&ready), &PassEnd { now, outcome: Outcome::Converged });
    assert_eq!(step_at(&object, &ready, now), "Pause", "the start is recorded once");
}

#[test]
fn a_vmm_that_died_is_started_again_in_time_although_the_clock_was_set_back() {
    let times = readings(5, -3600, &[1, 400]);
    let mut object = instance(Power::Running, 1, 0);
    object.status.vmm_deaths = 2;
    object.status.last_death =
        Some(VmmDeath { launch: LaunchId(1), noticed_at: at(10_002), is_out_of_memory: false });
    let steps = times.iter().map(|&now| step_at(&object, &seen(None), now)).collect::<Vec<_>>();
    assert_eq!(steps, ["Wait VmmDied", "Launch", "Launch"]);
}

#[test]
fn a_program_that_is_restarted_waits_for_its_delay_although_the_clock_was_set_back() {
    let mut object = instance(Power::Running, 1, 0);
    object.spec.restart = RestartPolicy { when: RestartWhen::Always, ..RestartPolicy::default() };
    object.status.ended_launch = Some(LaunchId(1));
    object.status.ended_launch_at = Some(at(10_003));
    object.status.restart.run = RunNo(1);
    object.status.restart.next_attempt_at = Some(at(10_008));
    for (index, expected) in ["Wait ProgramExited", "Wait ProgramExited", "Launch"].into_iter().enumerate() {
        let now = readings(5, -3600, &[3, 3])[index];
        assert_eq!(step_at(&object, &seen(None), now), expected, "{index}");
        object.status = status(&object, Some(&seen(None)), &PassEnd { now, outcome: Outcome::Acting });
    }
}

#[test]
fn a_stop_lasts_as_long_as_its_grace_however_the_clock_is_set() {
    let asked = |mut machine: Machine| {
        machine.guest.is_shutdown_requested = true;
        seen(Some(machine))
    };
    let (program, system) = (limits::SHUTDOWN_GRACE, limits::SYSTEM_SHUTDOWN_GRACE);
    for (command, is_silent, step, grace) in [
        ("/app/server", false, -3600, program),
        ("/app/server", false, 3600, program),
        ("/sbin/init", false, -3600, system),
        ("/usr/lib/systemd/systemd", false, 3600, system),
        ("systemd", false, 3600, system),
        ("systemd", true, 3600, program),
        ("/app/init.d", false, 3600, program),
    ] {
        let grace = i64::try_from((grace + limits::SHUTDOWN_GRACE).as_secs()).expect("short");
        let times = readings(5, step, &[grace - 1, 1]);
        let mut object = instance(Power::Stopped, 1, 0);
        object.spec.power_since = at(10_002);
        object.spec.cmd = Some(vec![command.to_owned()]);
        object.status.started_launch = Some(LaunchId(1));
        let mut stopping = launched(VmmState::Running, GuestPhase::Ready);
        stopping.guest.is_unresponsive = is_silent;
        let stopping = asked(stopping);
        let steps = times.iter().map(|&now| step_at(&object, &stopping, now)).collect::<Vec<_>>();
        assert_eq!(steps, ["Wait Converging", "Wait Converging", "Kill"], "{command} {step}");
    }
}

#[test]
fn a_guest_is_not_overdue_because_the_clock_was_set_forward_while_it_boots() {
    let deadline = i64::try_from(limits::GUEST_BOOT_DEADLINE.as_secs()).expect("short");
    for step in [-3600, 300] {
        let times = readings(5, step, &[deadline - 1, 1]);
        let object = instance(Power::Running, 1, 0);
        let booting = seen(Some(launched(VmmState::Running, GuestPhase::Silent)));
        let ended = times.iter().map(|&now| {
            let end = PassEnd { now, outcome: Outcome::Converged };
            status(&object, Some(&booting), &end).ended_run.0
        });
        assert_eq!(ended.collect::<Vec<_>>(), [0, 0, 1], "{step}");
    }
}

#[test]
fn a_vmm_that_does_not_answer_keeps_its_grace_when_the_clock_is_set_forward() {
    let times = readings(5, 300, &[29, 1]);
    let mut object = instance(Power::Running, 1, 0);
    object.status.unreachable_since = Some(at(10_004));
    let silent = seen(Some(launched(VmmState::Unreachable("no answer".to_owned()), GuestPhase::Ready)));
    let steps = times.iter().map(|&now| step_at(&object, &silent, now)).collect::<Vec<_>>();
    assert_eq!(steps, ["Wait ObservationFailed", "Wait ObservationFailed", "Kill"]);
}
