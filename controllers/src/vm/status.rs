//! Status of a VM as clients read it, derived from the observation.

use stead_schemas::condition::{self, Condition, ConditionStatus, ConditionType, Reason};
use stead_schemas::goal::Goal;
use stead_schemas::health::HealthStatus;
use stead_schemas::instance::{Exit, Instance, InstanceStatus, Power, State, VmmDeath};
use stead_schemas::limits;
use stead_schemas::meta::Object;
use stead_schemas::numbers::LaunchId;
use stead_schemas::root_image::PinnedImage;

use super::facts::{
    answer_deadline, has_ended, has_started, is_another, is_boot_overdue, is_cut_off, is_idle_standby,
    is_prepared, is_spent, is_wanted,
};
use super::passing_condition::{self, Found};
use super::{
    Observed, confinement, health, idle, live_volumes, mediation, memory, pending, restarts, room, vmm_limits,
};
use crate::host::{GuestPhase, Machine, Memory, VmmState};
use crate::runtime::{Moment, Outcome, PassEnd, conditions};

/// Exit code of what SIGKILL ended.
const KILLED: i32 = 137;

pub(super) fn status(object: &Object<Instance>, seen: Option<&Observed>, end: &PassEnd) -> InstanceStatus {
    let mut status = object.status.clone();
    match seen {
        Some(seen) => {
            pin_image(&mut status, object, seen);
            record_launch(&mut status, seen);
            record_adoption(&mut status, object, seen);
            status.prepared_launch = prepared_launch(object, seen);
            restarts::begin_run(&mut status, object);
            record_end(&mut status, object, seen, end.now);
            record_death(&mut status, object, seen, end.now);
            record_cut(&mut status, object, seen, end.now);
            status.health = health::health(object, seen, end.now);
            restarts::end_unhealthy(&mut status, object, health::failed(object, seen, end.now), end.now);
            status.has_saved_memory = seen.has_saved();
            room::record_return(&mut status, object, seen);
            status.vmm_pid = seen.machine.as_ref().and_then(|machine| machine.pid);
            restarts::follow(&mut status, object, seen, end.now);
            idle::follow(&mut status, object, seen, end.now.at());
            let next = state(object, &status, seen, end.now);
            record_times(&mut status, object, seen, next, end.now);
            enter(&mut status, next, end.now);
            status.state_error = unreachable(seen).map(ToOwned::to_owned);
            status.unreachable_since =
                status.state_error.as_ref().map(|_| status.unreachable_since.unwrap_or(end.now.at()));
        }
        None => {
            // A health check that was removed from the spec is known without an observation.
            if object.spec.health.is_none() {
                status.health = HealthStatus::default();
            }
            enter(&mut status, State::Unknown, end.now);
            status.state_error = Some(match &end.outcome {
                Outcome::Failed { message, .. } => message.clone(),
                _ => "the host could not be observed".to_owned(),
            });
        }
    }
    status.observed_generation = object.meta.generation;
    status.conditions = conditions::standard(&object.status.conditions, object.meta.generation, end);
    explain(&mut status, object, end.now);
    report_unresponsive(&mut status, object, seen, end.now);
    report_cut(&mut status, object, seen, end.now);
    report_headers(&mut status, object, seen, end.now);
    vmm_limits::report(&mut status, object, end.now);
    confinement::report(&mut status, object, seen, end.now);
    pending::report(&mut status, object, seen, end.now);
    memory::record(&mut status, object, seen, end.now);
    live_volumes::record(&mut status, object, seen, end.now);
    mediation::report(&mut status, object, seen, end.now);
    status
}

/// Sets a condition if a guest runs without the headers that it wants. The guest runs all the same; the
/// condition explains how to correct it.
fn report_headers(
    status: &mut InstanceStatus,
    object: &Object<Instance>,
    seen: Option<&Observed>,
    now: Moment,
) {
    let Some(seen) = seen else { return };
    let lacks = seen.machine.as_ref().is_some_and(|machine| !machine.has_headers);
    let found = (lacks && !object.spec.skip_kernel_headers).then(|| Found {
        status: ConditionStatus::False,
        reason: Reason::KernelHeadersMissing,
        message:
            "this host has no headers of the guest kernel: run deploy/fetch-kernel for the instances started \
                  afterwards, or set skip_kernel_headers"
                .to_owned(),
    });
    passing_condition::report(status, object, ConditionType::KernelHeaders, found, now);
}

/// Pins the content once, when the image is first observed ready, and the content of the image that waits for the next
/// start.
fn pin_image(status: &mut InstanceStatus, object: &Object<Instance>, seen: &Observed) {
    status.image_digest = object.content().or(seen.parts.image_ready.as_ref()).cloned();
    status.image_version = object.spec.image_version;
    status.next_image = object.spec.pending.image.as_ref().and_then(|next| {
        let digest = object.next_content().or(seen.parts.next_image_ready.as_ref())?.clone();
        Some(PinnedImage { image: next.image.clone(), pull: next.pull, digest })
    });
}

/// Records the highest number of a launch or a saved memory. The next launch has the number after it.
fn record_launch(status: &mut InstanceStatus, seen: &Observed) {
    let launched = seen.machine.as_ref().map(|machine| machine.launch);
    let saved = match &seen.memory {
        Some(Memory::Saved(saved)) => Some(saved.launch),
        Some(Memory::Incomplete) | None => None,
    };
    status.launch = launched.into_iter().chain(saved).fold(status.launch, LaunchId::max);
}

/// Records that the memory of the origin exists; from now on it counts as used.
fn record_adoption(status: &mut InstanceStatus, object: &Object<Instance>, seen: &Observed) {
    if let Some(origin) = object.awaits_memory()
        && seen.saved(object).is_some()
    {
        status.adopted = origin.standby;
    }
}

fn prepared_launch(object: &Object<Instance>, seen: &Observed) -> Option<LaunchId> {
    let machine =
        seen.machine.as_ref().filter(|machine| object.is_pooled() && is_prepared(object, machine))?;
    Some(machine.launch)
}

/// Stores the end of a run, before the end is acknowledged to the guest.
fn record_end(status: &mut InstanceStatus, object: &Object<Instance>, seen: &Observed, now: Moment) {
    let Some(machine) = &seen.machine else {
        if object.spec.power == Power::Stopped && status.ended_run < object.spec.run {
            // The instance was stopped before an end was reported: the run is over all the same.
            status.ended_run = object.spec.run;
        }
        return;
    };
    if machine.run <= status.ended_run || is_spent(object, machine) || !has_ended(object, machine, now) {
        return;
    }
    let exit = match &machine.guest.exit {
        Some(exit) => exit.clone(),
        None if is_boot_overdue(object, machine, now) && machine.vmm == VmmState::Running => Exit {
            code: None,
            message: format!(
                "the guest did not report its program started within {} s",
                limits::GUEST_BOOT_DEADLINE.as_secs()
            ),
            is_boot_failure: true,
        },
        None => Exit {
            code: None,
            message: "the guest powered off without reporting how its program ended".to_owned(),
            is_boot_failure: machine.guest.phase < GuestPhase::Ready,
        },
    };
    restarts::end_launch(status, object, machine, &exit, now);
    (status.exit, status.exit_run) = (Some(exit), machine.run);
}

fn record_death(status: &mut InstanceStatus, object: &Object<Instance>, seen: &Observed, now: Moment) {
    let Some(machine) = &seen.machine else { return };
    let is_new = status.last_death.is_none_or(|death| death.launch != machine.launch);
    let is_unasked = is_wanted(object, machine) && seen.saved(object).is_none();
    if machine.vmm == VmmState::Dead && is_unasked && is_new {
        status.vmm_deaths = status.vmm_deaths.saturating_add(1);
        let is_out_of_memory = machine.is_out_of_memory;
        status.last_death = Some(VmmDeath { launch: machine.launch, noticed_at: now.at(), is_out_of_memory });
        if is_out_of_memory {
            let message = "the VMM was killed by signal 9 (SIGKILL) - OOM".to_owned();
            let exit = Exit { code: Some(KILLED), message, is_boot_failure: false };
            (status.exit, status.exit_run) = (Some(exit), machine.run);
        }
    }
    let is_stable =
        machine.vmm == VmmState::Running && now.elapsed(machine.launched_at) >= limits::VMM_STABLE_AFTER;
    if is_stable {
        status.vmm_deaths = 0;
    }
}

/// Records the end of a launch whose VM lost its network for good: another launch of the same run follows.
fn record_cut(status: &mut InstanceStatus, object: &Object<Instance>, seen: &Observed, now: Moment) {
    let machine = seen.machine.as_ref().filter(|machine| is_wanted(object, machine));
    if let Some(machine) = machine.filter(|machine| is_cut_off(object, machine, seen)) {
        (status.ended_launch, status.ended_launch_at) = (Some(machine.launch), Some(now.at()));
    }
}

/// Reports the reason of that restart for as long as the VM without a network exists.
fn report_cut(status: &mut InstanceStatus, object: &Object<Instance>, seen: Option<&Observed>, now: Moment) {
    let Some(seen) = seen else { return };
    let lost = seen.machine.as_ref().filter(|machine| status.ended_launch == Some(machine.launch));
    if lost.is_some_and(|machine| is_cut_off(object, machine, seen)) {
        let message = "the TAP of the VM was replaced, and its hypervisor cannot connect a running VM to another \
                       TAP: the VM is started again";
        not_ready(status, object, (Reason::NetworkLost, message), true, now);
    }
}

/// Returns the state, as the wire names it.
fn state(object: &Object<Instance>, status: &InstanceStatus, seen: &Observed, now: Moment) -> State {
    let is_delayed = status.restart.next_attempt_at.is_some_and(|at| now.at() < at);
    let is_wanted = Goal::under(object, status).run().is_some() && !is_delayed;
    match &seen.machine {
        None if is_wanted && seen.saved(object).is_some() => State::Standby,
        None if is_wanted => State::Created,
        None => State::Stopped,
        Some(machine @ Machine { vmm, guest, .. }) => match vmm {
            VmmState::Dead if is_wanted && seen.saved(object).is_some() => State::Standby,
            VmmState::Dead if is_wanted => State::Created,
            VmmState::Dead => State::Stopped,
            VmmState::Created => State::Created,
            VmmState::Paused | VmmState::Stalled(_) => State::Paused,
            VmmState::Shutdown => State::Shutdown,
            VmmState::Unreachable(_) => State::Unknown,
            VmmState::Running => match guest.phase {
                GuestPhase::Ready if is_another(object, machine) => State::Initializing,
                GuestPhase::Ready => State::Running,
                GuestPhase::Exited => State::Shutdown,
                // The daemon has just begun to listen, so the recorded state still counts.
                GuestPhase::Silent if is_as_recorded(object, machine, now) => State::Running,
                GuestPhase::Silent | GuestPhase::AwaitingConfig | GuestPhase::Configured => {
                    State::Initializing
                }
            },
        },
    }
}

fn is_as_recorded(object: &Object<Instance>, machine: &Machine, now: Moment) -> bool {
    object.status.state == State::Running
        && has_started(object, machine)
        && now.at() < answer_deadline(machine, now)
}

/// Changes the state and counts the time that was spent in the state before.
fn enter(status: &mut InstanceStatus, next: State, now: Moment) {
    if next != status.state {
        let spent = status.state_since.map(|since| now.elapsed(since).as_millis());
        let millis = u64::try_from(spent.unwrap_or_default()).unwrap_or(u64::MAX);
        let phase = status.phases.entry(status.state).or_default();
        *phase = phase.saturating_add(millis);
        status.state_since = Some(now.at());
        status.state = next;
    } else if status.state_since.is_none() {
        status.state_since = Some(now.at());
    }
}

fn unreachable(seen: &Observed) -> Option<&str> {
    match seen.machine.as_ref().map(|machine| &machine.vmm) {
        Some(VmmState::Unreachable(how)) => Some(how),
        _ => None,
    }
}

fn record_times(
    status: &mut InstanceStatus,
    object: &Object<Instance>,
    seen: &Observed,
    next: State,
    now: Moment,
) {
    // The start is recorded once for each launch: a later daemon finds it recorded.
    let is_recorded = seen.machine.as_ref().is_some_and(|machine| has_started(object, machine));
    if next == State::Running && !is_recorded {
        status.started_at = Some(now.at());
        status.started_launch = seen.machine.as_ref().map(|machine| machine.launch);
    }
    let is_end = next == State::Stopped && !matches!(status.state, State::Stopped);
    if is_end && status.started_at.is_some_and(|started| status.stopped_at.is_none_or(|at| at < started)) {
        status.stopped_at = Some(now.at());
    }
}

/// Sets Ready only if the program runs: for a converged instance that is down, the condition reports it and the reason.
fn explain(status: &mut InstanceStatus, object: &Object<Instance>, now: Moment) {
    let is_down = condition::is_ready(&status.conditions) && status.state != State::Running;
    if !is_down {
        return;
    }
    let (reason, message) = match &status.exit {
        _ if object.spec.power == Power::Stopped => (Reason::Stopped, "stopped on request".to_owned()),
        _ if status.state == State::Standby => {
            let how = if is_idle_standby(object) { "because nobody was connected" } else { "on request" };
            (Reason::Standby, format!("in standby {how}"))
        }
        Some(exit) if exit.is_boot_failure => (Reason::GuestBootFailed, exit.message.clone()),
        Some(exit) => (Reason::ProgramExited, exit.message.clone()),
        None => (Reason::Stopped, "not running".to_owned()),
    };
    let is_degraded = reason == Reason::GuestBootFailed;
    not_ready(status, object, (reason, &message), is_degraded, now);
}

/// Reports a guest that does not answer. A hanging guest is detected only by its silence; its program may or
/// may not continue to run.
fn report_unresponsive(
    status: &mut InstanceStatus,
    object: &Object<Instance>,
    seen: Option<&Observed>,
    now: Moment,
) {
    let machine = seen.and_then(|seen| seen.machine.as_ref());
    let is_unresponsive =
        machine.is_some_and(|machine| machine.vmm == VmmState::Running && machine.guest.is_unresponsive);
    if is_unresponsive && status.state == State::Running {
        let message = "the guest has not answered for half a minute: it hangs, or was halted from inside";
        not_ready(status, object, (Reason::AgentUnreachable, message), true, now);
    }
}

/// Sets the reason why an instance that is otherwise as it should be is not Ready.
fn not_ready(
    status: &mut InstanceStatus,
    object: &Object<Instance>,
    (reason, message): (Reason, &str),
    is_degraded: bool,
    now: Moment,
) {
    let new = |kind, status| Condition {
        kind,
        status,
        reason,
        message: message.to_owned(),
        observed_generation: object.meta.generation,
        last_transition_time: now.at(),
    };
    // The transition time is that of the condition before this pass.
    let mut conditions = object.status.conditions.clone();
    for fresh in std::mem::take(&mut status.conditions) {
        let replaced = match fresh.kind {
            ConditionType::Ready => new(ConditionType::Ready, ConditionStatus::False),
            ConditionType::Degraded if is_degraded => new(ConditionType::Degraded, ConditionStatus::True),
            ConditionType::Progressing
            | ConditionType::Degraded
            | ConditionType::KernelHeaders
            | ConditionType::Confined
            | ConditionType::PendingChanges
            | ConditionType::MemoryResized
            | ConditionType::VolumesMounted
            | ConditionType::EgressMediated => fresh,
        };
        condition::set(&mut conditions, replaced);
    }
    status.conditions = conditions;
}
