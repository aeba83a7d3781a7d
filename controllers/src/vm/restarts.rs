//! Restarts of a program that ended, by the instance's policy. They are kept in the status, so that the next
//! daemon continues where the last one stopped.
//!
//! A restart is another launch of the same run: the end of the launch is recorded, its machine is removed as
//! after any end, and the next launch follows when its time has come.

use std::time::Duration;

use jiff::Timestamp;
use stead_schemas::instance::{Exit, Instance, InstanceStatus, Power};
use stead_schemas::limits::RESTART_DELAY_MAX;
use stead_schemas::meta::Object;
use stead_schemas::policy::{RestartBlocked, RestartReason, RestartStatus, RestartWhen};

use super::Observed;
use crate::host::Machine;
use crate::runtime::Moment;

/// Clears the results of an earlier run, because they do not describe the new one.
pub(super) fn begin_run(status: &mut InstanceStatus, object: &Object<Instance>) {
    let Some(run) = object.goal().run() else { return };
    if status.exit_run != run {
        status.exit = None;
    }
    if status.restart.run != run {
        status.restart = RestartStatus { run, ..RestartStatus::default() };
        (status.ended_launch, status.ended_launch_at) = (None, None);
    }
}

/// The decision of the policy after an end, or for a program that should not continue as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Follows {
    /// The policy does not ask for another launch.
    Nothing,
    /// The policy asks for another launch, but allows no more attempts.
    NoMore,
    /// A further launch follows, after this number of attempts in a row.
    Restart { attempts: u32 },
}

/// Returns what follows by the policy. `until` is the time until which the program ran well.
pub(super) fn follows(
    object: &Object<Instance>,
    machine: &Machine,
    is_failure: bool,
    until: Timestamp,
    now: Moment,
) -> Follows {
    let policy = &object.spec.restart;
    let is_desired = match policy.when {
        RestartWhen::Never => false,
        RestartWhen::Always => true,
        RestartWhen::OnFailure => is_failure,
    };
    if !is_desired || object.goal().run() != Some(machine.run) {
        return Follows::Nothing;
    }
    let is_stable = until >= now.end(machine.launched_at, policy.stable_after.0);
    let attempts = if is_stable { 0 } else { object.status.restart.attempts };
    let is_allowed = policy.max_attempts == 0 || attempts < policy.max_attempts;
    if is_allowed { Follows::Restart { attempts } } else { Follows::NoMore }
}

/// Records that a launch ended. Its run ends with it, unless the policy asks for another launch.
pub(super) fn end_launch(
    status: &mut InstanceStatus,
    object: &Object<Instance>,
    machine: &Machine,
    exit: &Exit,
    now: Moment,
) {
    let follows = follows(object, machine, exit.code != Some(0), now.at(), now);
    if let Follows::Restart { attempts } = follows {
        restart(status, object, machine, attempts, now);
        status.restart.last_reason = None;
        return;
    }
    status.ended_run = machine.run;
    status.restart.blocked = (follows == Follows::NoMore).then_some(RestartBlocked::MaxAttemptsExceeded);
    status.restart.next_attempt_at = None;
}

/// Records what follows for a program whose health check failed. A program that may not be launched again
/// continues to run, because it may recover.
pub(super) fn end_unhealthy(
    status: &mut InstanceStatus,
    object: &Object<Instance>,
    failed: Option<(&Machine, Follows)>,
    now: Moment,
) {
    match failed {
        Some((machine, Follows::Restart { attempts })) => {
            restart(status, object, machine, attempts, now);
            status.restart.last_reason = Some(RestartReason::HealthCheckFailed);
        }
        Some((_, Follows::NoMore)) => {
            status.restart.blocked = Some(RestartBlocked::MaxAttemptsExceeded);
        }
        // The program recovered or is no longer probed. A run that ended stays ended.
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
    now: Moment,
) {
    (status.ended_launch, status.ended_launch_at) = (Some(machine.launch), Some(now.at()));
    status.restart.attempts = attempts + 1;
    status.restart.blocked = None;
    status.restart.next_attempt_at = Some(now.after(delay(object.spec.restart.backoff.0, attempts)));
}

/// Updates what the policy reports while the spec or the machine changes.
pub(super) fn follow(status: &mut InstanceStatus, object: &Object<Instance>, seen: &Observed, now: Moment) {
    status.restart.next_attempt_at = next_attempt(status, now);
    status.ended_launch_at = status.ended_launch_at.map(|ended_at| now.since(ended_at));
    let restart = &mut status.restart;
    if object.spec.power == Power::Stopped || object.spec.restart.when == RestartWhen::Never {
        // A manual stop holds until the next start; without a policy no restart is due.
        restart.next_attempt_at = None;
        let is_manual = object.spec.restart.when != RestartWhen::Never;
        restart.blocked = is_manual.then_some(RestartBlocked::ManualStop);
        return;
    }
    if restart.blocked == Some(RestartBlocked::ManualStop) {
        restart.blocked = None;
    }
    let next = seen.machine.as_ref().filter(|machine| status.ended_launch != Some(machine.launch));
    if let (Some(_), Some(next)) = (restart.next_attempt_at, next) {
        restart.next_attempt_at = None;
        restart.last_attempt_at = Some(next.launched_at);
    }
}

/// Returns when the next launch is due. The delay counts from the end of the last launch, however the clock
/// is set meanwhile.
pub(super) fn next_attempt(status: &InstanceStatus, now: Moment) -> Option<Timestamp> {
    let next = status.restart.next_attempt_at?;
    let Some(ended_at) = status.ended_launch_at else { return Some(next) };
    Some(now.end(ended_at, next.duration_since(ended_at).try_into().unwrap_or_default()))
}

/// Returns the delay, which doubles with every attempt in a row.
fn delay(first: Duration, attempts: u32) -> Duration {
    first.saturating_mul(1 << attempts.min(16)).min(RESTART_DELAY_MAX)
}
