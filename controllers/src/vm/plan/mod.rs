//! The life-cycle table of a VM: from the goal and the situation to the next step.

mod fork;
mod launch;
mod standby;
mod stop;

use stead_schemas::condition::Reason;
use stead_schemas::goal::Goal;
use stead_schemas::instance::{Instance, Power, PowerCause};
use stead_schemas::meta::Object;

use crate::host::{DiskLimit, GuestPhase, Machine, VmmState};
use crate::runtime::{Desired, Moment, Plan};
use crate::vm::facts::{
    Situation, answer_deadline, boot_deadline, can_stand_by, goal, has_ended, has_started, is_another,
    is_cut_off, is_idle_standby, is_used_up, lacks,
};
use crate::vm::guest_config::guest_config;
use crate::vm::restarts::Follows;
use crate::vm::steps::{act, record, refuse, regrant, wait, wake};
use crate::vm::{Action, Observed, failed_forks, health, idle, live_volumes, memory, vmm_limits, wake};

pub(super) fn plan(desired: &Desired<'_, Instance>, seen: &Observed, now: Moment) -> Plan<Action> {
    let planned = match health::plan_probe(desired, seen, now) {
        Some(step) => act(step),
        None => match desired {
            Desired::Absent(object) => plan_absent(*object, seen, now),
            Desired::Present(object) => plan_present(object, seen, now),
        },
    };
    wake::leave_first(desired, seen, planned)
}

/// Removes everything, from the VM to the records.
fn plan_absent(object: Option<&Object<Instance>>, seen: &Observed, now: Moment) -> Plan<Action> {
    match &seen.machine {
        Some(machine) => stop::plan_down(object, machine, seen, now),
        None if seen.memory.is_some() => act(Action::DiscardMemory(seen.uid.clone())),
        None if seen.has_records => act(Action::DiscardRecords(seen.uid.clone())),
        None => Plan::Converged,
    }
}

fn plan_present(object: &Object<Instance>, seen: &Observed, now: Moment) -> Plan<Action> {
    if object.spec.expires_at.is_some_and(|at| at <= now.at()) {
        return act(Action::Expire(seen.uid.clone()));
    }
    if failed_forks::has_failed(object, seen) {
        return failed_forks::plan_failed(object, seen, now);
    }
    if is_used_up(object, seen) {
        return fork::plan_used_up(object, seen, now);
    }
    if is_idle_standby(object) && !can_stand_by(object, seen) {
        // The VM that was to be saved ended on the way: the standby is treated as if it had not begun.
        return wake(object, seen, PowerCause::Client);
    }
    let desired = Desired::Present(object);
    match (Situation::of(&desired, seen), goal(&desired)) {
        (Situation::Wanted(_), Goal::Running(_)) if object.is_restart_due() && !wake::has_pending(seen) => {
            apply_changes(object)
        }
        (Situation::Wanted(_), Goal::Running(_)) if is_next_image_new(object, seen) => {
            record(Reason::WaitingForImage, "recording the content of the image of the next start")
        }
        (Situation::Wanted(machine), _) => match plan_up(object, machine, seen, now) {
            Plan::Converged => {
                let live = live_volumes::plan(object, machine, seen);
                match live.or_else(|| memory::plan(object, machine, now)) {
                    Some(step) => act(step),
                    None => vmm_limits::plan(object, machine, seen),
                }
            }
            planned => planned,
        },
        (Situation::Unwanted(machine), _) => stop::plan_down(Some(object), machine, seen, now),
        (Situation::Nothing, Goal::Absent) => Plan::Converged,
        // Nothing is left of the program that could not see the changes.
        (Situation::Nothing, _) if has_changes(object) => apply_changes(object),
        (Situation::Nothing, Goal::Stopped) => Plan::Converged,
        (Situation::Saved(_) | Situation::UselessMemory, Goal::Absent | Goal::Stopped) => {
            act(Action::DiscardMemory(object.meta.uid.clone()))
        }
        _ if object.awaits_memory().is_some() => fork::plan_adopt(object, seen),
        (Situation::UselessMemory, _) => act(Action::DiscardMemory(object.meta.uid.clone())),
        (Situation::Saved(saved), Goal::Standby(_)) => standby::plan_asleep(object, saved, seen, now),
        // The room was given back when the memory was saved, which is lost since.
        (Situation::Nothing, Goal::Standby(_)) if !object.holds_resources() => regrant(object, seen),
        (
            Situation::Nothing | Situation::Saved(_),
            Goal::Running(run) | Goal::Standby(run) | Goal::Pooled(run),
        ) => launch::plan_launch(object, seen, run, now),
    }
}

/// True if changes wait for a start that boots: a memory that is still to come has the machine of its save.
fn has_changes(object: &Object<Instance>) -> bool {
    let is_changed =
        !object.spec.pending.is_empty() || object.spec.volumes.iter().any(|mount| mount.is_leaving);
    is_changed && object.awaits_memory().is_none()
}

fn apply_changes(object: &Object<Instance>) -> Plan<Action> {
    act(Action::ApplyChanges(object.meta.uid.clone(), object.meta.generation))
}

/// True if the content of the image that waits for the next start is on the host, and not recorded yet.
fn is_next_image_new(object: &Object<Instance>, seen: &Observed) -> bool {
    object.spec.pending.image.is_some()
        && object.next_content().is_none()
        && seen.parts.next_image_ready.is_some()
}

/// Brings a VM of the wanted run to a running program, or records its end.
fn plan_up(object: &Object<Instance>, machine: &Machine, seen: &Observed, now: Moment) -> Plan<Action> {
    let uid = || object.meta.uid.clone();
    if matches!(machine.vmm, VmmState::Running | VmmState::Paused)
        && let Some(step) = live_volumes::plan_unsure(machine)
    {
        return act(step);
    }
    match &machine.vmm {
        // The daemon crashed between spawn and start: nothing ran yet, so a new VMM loses nothing.
        VmmState::Created => act(Action::Kill(uid())),
        VmmState::Paused => standby::plan_paused(object, machine, seen),
        VmmState::Stalled(free) => stop::plan_stalled(object, *free, None, now),
        // A saved memory must not exist for a VM that runs.
        VmmState::Running if seen.memory.is_some() => act(Action::DiscardMemory(uid())),
        VmmState::Dead => plan_dead(object, machine, seen),
        VmmState::Unreachable(_) => stop::plan_unreachable(object, machine, now),
        _ if has_ended(object, machine, now) => record(Reason::ProgramExited, "recording the program's end"),
        VmmState::Shutdown => act(Action::Kill(uid())),
        // Whatever the guest does: its driver may need the TAP while it starts.
        VmmState::Running if can_reconnect(machine, seen) => plan_reconnect(object, seen),
        VmmState::Running if has_other_disk_limit(object, machine) => {
            act(Action::LimitDisks(uid(), object.spec.disk_rate()))
        }
        VmmState::Running => match machine.guest.phase {
            GuestPhase::Ready => plan_ready(object, machine, seen, now),
            GuestPhase::AwaitingConfig => plan_configure(object, seen),
            _ if has_started(object, machine) => {
                let until = Some(answer_deadline(machine, now)).filter(|&until| now.at() < until);
                wait(Reason::WaitingForGuest, "the guest has not answered yet", until)
            }
            GuestPhase::Silent | GuestPhase::Configured | GuestPhase::Exited => {
                wait(Reason::WaitingForGuest, "the guest is booting", Some(boot_deadline(machine, now)))
            }
        },
    }
}

/// Plans for a VMM whose process ended. It ended after its standby or unexpectedly; an unexpected death is
/// recorded before its remains are removed.
fn plan_dead(object: &Object<Instance>, machine: &Machine, seen: &Observed) -> Plan<Action> {
    let is_saved = seen.saved(object).is_some();
    let is_recorded = object.status.last_death.is_some_and(|death| death.launch == machine.launch);
    if is_saved && object.spec.power == Power::Standby {
        return standby::plan_just_asleep(object, seen);
    }
    if is_saved || is_recorded {
        return act(Action::Release(object.meta.uid.clone()));
    }
    let reason = if machine.is_out_of_memory { Reason::OutOfMemory } else { Reason::VmmDied };
    record(reason, "recording the death of the VMM")
}

/// Plans for a VM whose program runs.
fn plan_ready(object: &Object<Instance>, machine: &Machine, seen: &Observed, now: Moment) -> Plan<Action> {
    let uid = || object.meta.uid.clone();
    if is_cut_off(object, machine, seen) {
        return record(Reason::NetworkLost, "recording that the VM has to be launched again for its network");
    }
    if is_another(object, machine) {
        return fork::plan_identity(object, machine, seen);
    }
    match object.spec.power {
        Power::Warm => act(Action::Pause(uid())),
        // A VM that is paused before its start is recorded would be resumed to be observed running.
        Power::Standby if !has_started(object, machine) => {
            record(Reason::Converging, "recording that the program started")
        }
        Power::Standby => match idle::disturbance(object, seen) {
            Some(by) => wake(object, seen, by),
            None if lacks(seen, |has| has.standby) => {
                refuse("its hypervisor does not declare that it can save the memory of a VM")
            }
            None => act(Action::Pause(uid())),
        },
        Power::Running | Power::Stopped if wake::has_pending(seen) => act(Action::HandOver(uid())),
        Power::Running | Power::Stopped => match health::failed(object, seen, now) {
            Some((_, Follows::Restart { .. })) => {
                record(Reason::HealthCheckFailed, "recording that the health check failed")
            }
            Some((_, Follows::Nothing | Follows::NoMore)) | None => idle::plan_running(object, seen, now),
        },
    }
}

/// Configures a guest that boots, or an agent that the guest's system started again.
fn plan_configure(object: &Object<Instance>, seen: &Observed) -> Plan<Action> {
    match guest_config(object, seen) {
        Some(config) => act(Action::Configure(object.meta.uid.clone(), Box::new(config))),
        None => wait(Reason::WaitingForImage, "the image's parameters are not readable", None),
    }
}

/// True if the VM lost its TAP, and its hypervisor can connect it to another one.
fn can_reconnect(machine: &Machine, seen: &Observed) -> bool {
    machine.is_network_cut && !lacks(seen, |has| has.replace_tap)
}

/// True if the limit of the machine's disks can be changed, and is another one than the spec's.
fn has_other_disk_limit(object: &Object<Instance>, machine: &Machine) -> bool {
    machine.disk_limit != DiskLimit::Fixed && machine.disk_limit != object.spec.disk_rate().into()
}

/// Connects the card of a running guest to the TAP that replaces the removed one.
fn plan_reconnect(object: &Object<Instance>, seen: &Observed) -> Plan<Action> {
    match &seen.parts.nic {
        Some(nic) if nic.is_ready => act(Action::Reconnect(object.meta.uid.clone(), nic.card.tap.clone())),
        _ => wait(Reason::WaitingForNetwork, "the network port is being made again", None),
    }
}
