//! Restarts of a program that ended, by the instance's policy; kept in the status, so that a daemon
//! that comes back goes on where the last one was.
//!
//! A restart is another launch of the same run: the end of the launch is recorded, its machine goes
//! as after any end, and the next one is launched when its time has come.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use stead_schemas::instance::{Exit, Instance, InstanceStatus, Power};
use stead_schemas::limits::RESTART_DELAY_MAX;
use stead_schemas::meta::Object;
use stead_schemas::policy::{RestartBlocked, RestartReason, RestartStatus, RestartWhen};

use super::Observed;
use super::plan::wanted_run;
use crate::host::Machine;

/// Another run begins anew: how an earlier one ended says nothing of it.
pub(super) fn begin_run(status: &mut InstanceStatus, object: &Object<Instance>) {
    let Some(run) = wanted_run(object) else { return };
    if status.exit_run != run {
        status.exit = None;
    }
    if status.restart.run != run {
        status.restart = RestartStatus { run, ..RestartStatus::default() };
        (status.ended_launch, status.ended_launch_at) = (None, None);
    }
}

/// What the policy makes of an end, or of a program that should not go on as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Follows {
    /// The policy does not ask for another launch.
    Nothing,
    /// It would, but for the attempts that it allows.
    NoMore,
    /// Another launch, after so many attempts in a row.
    Restart { attempts: u32 },
}

/// `until`: how long the program ran well.
pub(super) fn follows(
    object: &Object<Instance>,
    machine: &Machine,
    is_failure: bool,
    until: Timestamp,
) -> Follows {
    let policy = &object.spec.restart;
    let is_wished = match policy.when {
        RestartWhen::Never => false,
        RestartWhen::Always => true,
        RestartWhen::OnFailure => is_failure,
    };
    if !is_wished || wanted_run(object) != Some(machine.run) {
        return Follows::Nothing;
    }
    let is_stable = until.duration_since(machine.launched_at) >= signed(policy.stable_after.0);
    let attempts = if is_stable { 0 } else { object.status.restart.attempts };
    let is_allowed = policy.max_attempts == 0 || attempts < policy.max_attempts;
    if is_allowed { Follows::Restart { attempts } } else { Follows::NoMore }
}

/// Records that a launch ended: its run ends with it, unless the policy has another launch follow.
pub(super) fn end_launch(
    status: &mut InstanceStatus,
    object: &Object<Instance>,
    machine: &Machine,
    exit: &Exit,
    now: Timestamp,
) {
    let follows = follows(object, machine, exit.code != Some(0), now);
    if let Follows::Restart { attempts } = follows {
        restart(status, object, machine, attempts, now);
        status.restart.last_reason = None;
        return;
    }
    status.ended_run = machine.run;
    status.restart.blocked = (follows == Follows::NoMore).then_some(RestartBlocked::MaxAttemptsExceeded);
    status.restart.next_attempt_at = None;
}

/// Records what becomes of a program whose health check failed. One that may not be launched again
/// runs on: it may get well.
pub(super) fn end_unhealthy(
    status: &mut InstanceStatus,
    object: &Object<Instance>,
    failed: Option<(&Machine, Follows)>,
    now: Timestamp,
) {
    match failed {
        Some((machine, Follows::Restart { attempts })) => {
            restart(status, object, machine, attempts, now);
            status.restart.last_reason = Some(RestartReason::HealthCheckFailed);
        }
        Some((_, Follows::NoMore)) => {
            status.restart.blocked = Some(RestartBlocked::MaxAttemptsExceeded);
        }
        // Well again, or not asked about any more; a run that ended stays ended.
        Some((_, Follows::Nothing)) | None if status.ended_run < object.spec.run => {
            status.restart.blocked = None;
        }
        Some((_, Follows::Nothing)) | None => {}
    }
}

fn restart(
    status: &mut InstanceStatus,
    object: &Object<Instance>,
    machine: &Machine,
    attempts: u32,
    now: Timestamp,
) {
    (status.ended_launch, status.ended_launch_at) = (Some(machine.launched_at), Some(now));
    status.restart.attempts = attempts + 1;
    status.restart.blocked = None;
    status.restart.next_attempt_at = Some(after(now, delay(object.spec.restart.backoff.0, attempts)));
}

/// What the policy shows while the wish or the machine goes on.
pub(super) fn follow(status: &mut InstanceStatus, object: &Object<Instance>, seen: &Observed) {
    let restart = &mut status.restart;
    if object.spec.power == Power::Stopped || object.spec.restart.when == RestartWhen::Never {
        // A stop by hand holds until the next start; without a policy nothing is to come.
        restart.next_attempt_at = None;
        let is_manual = object.spec.restart.when != RestartWhen::Never;
        restart.blocked = is_manual.then_some(RestartBlocked::ManualStop);
        return;
    }
    if restart.blocked == Some(RestartBlocked::ManualStop) {
        restart.blocked = None;
    }
    let launched_at = seen.machine.as_ref().map(|machine| machine.launched_at);
    if let (Some(at), Some(launched_at)) = (restart.next_attempt_at, launched_at)
        && launched_at >= at
    {
        restart.next_attempt_at = None;
        restart.last_attempt_at = Some(launched_at);
    }
}

/// Doubles with every attempt in a row.
fn delay(first: Duration, attempts: u32) -> Duration {
    first.saturating_mul(1 << attempts.min(16)).min(RESTART_DELAY_MAX)
}

fn signed(duration: Duration) -> SignedDuration {
    SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX)
}

fn after(at: Timestamp, delay: Duration) -> Timestamp {
    at.checked_add(signed(delay)).unwrap_or(Timestamp::MAX)
}
