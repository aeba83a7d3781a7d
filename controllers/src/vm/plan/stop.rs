//! Stops: the guest gets its grace period, then the process ends, then its remains are removed.

use jiff::Timestamp;
use stead_schemas::condition::{self, ConditionStatus, ConditionType, Reason};
use stead_schemas::instance::Instance;
use stead_schemas::limits;
use stead_schemas::meta::Object;
use stead_schemas::quantity::Bytes;

use super::plan_configure;
use crate::host::{GuestPhase, Machine, VmmState};
use crate::runtime::{Moment, Plan, after};
use crate::vm::facts::{has_started, is_spent};
use crate::vm::program::shutdown_grace;
use crate::vm::steps::{act, record, wait};
use crate::vm::{Action, Observed};

/// Ends a VM that should not exist.
pub(super) fn plan_down(
    object: Option<&Object<Instance>>,
    machine: &Machine,
    seen: &Observed,
    now: Moment,
) -> Plan<Action> {
    let uid = || machine.owner.clone();
    match &machine.vmm {
        VmmState::Dead => act(Action::Release(uid())),
        // Data in the guest's memory is written only if the guest continues to run; its grace period counts
        // all the same.
        VmmState::Paused if object.is_some_and(|object| !is_grace_over(object, seen, now)) => {
            match seen.has_saved() {
                true => act(Action::DiscardMemory(uid())),
                false => act(Action::Resume(uid())),
            }
        }
        VmmState::Stalled(free) => match object.filter(|object| !is_grace_over(object, seen, now)) {
            Some(object) => plan_stalled(object, *free, Some(grace_end(object, seen, now)), now),
            None => act(Action::Kill(uid())),
        },
        VmmState::Created | VmmState::Shutdown | VmmState::Paused | VmmState::Unreachable(_) => {
            act(Action::Kill(uid()))
        }
        VmmState::Running => match object {
            // No record exists, so the program belongs to no instance: it is an orphan of a lost store.
            None => act(Action::Kill(uid())),
            Some(object) => plan_graceful(object, machine, seen, now),
        },
    }
}

fn plan_graceful(object: &Object<Instance>, machine: &Machine, seen: &Observed, now: Moment) -> Plan<Action> {
    let uid = || machine.owner.clone();
    let deadline = grace_end(object, seen, now);
    let guest = &machine.guest;
    if is_grace_over(object, seen, now) {
        return act(Action::Kill(uid()));
    }
    match (guest.phase, has_started(object, machine)) {
        (GuestPhase::Silent, true) => {
            return wait(Reason::Converging, "the guest has not answered yet", Some(deadline));
        }
        // The guest accepts a request to end only with the token that its configuration brings.
        (GuestPhase::AwaitingConfig, true) => return plan_configure(object, seen),
        (GuestPhase::Silent | GuestPhase::AwaitingConfig, false) => return act(Action::Kill(uid())),
        (GuestPhase::Configured | GuestPhase::Ready | GuestPhase::Exited, _) => {}
    }
    if guest.exit.is_some() {
        let is_recorded =
            object.meta.is_deleting() || object.status.ended_run >= machine.run || is_spent(object, machine);
        return match (is_recorded, guest.is_exit_acknowledged) {
            (false, _) => record(Reason::ProgramExited, "recording the program's end"),
            (true, false) => act(Action::AcknowledgeExit(uid())),
            (true, true) => wait(Reason::Converging, "the guest is powering off", Some(deadline)),
        };
    }
    if guest.is_shutdown_requested {
        return wait(Reason::Converging, "the program was asked to end", Some(deadline));
    }
    act(Action::Shutdown(uid()))
}

/// Resumes a VM whose write failed for lack of space once there is space, or ends it at the end of its grace
/// period.
pub(super) fn plan_stalled(
    object: &Object<Instance>,
    free: Bytes,
    grace_end: Option<Timestamp>,
    now: Moment,
) -> Plan<Action> {
    if free >= limits::DISK_ROOM_MIN {
        return act(Action::Resume(object.meta.uid.clone()));
    }
    let poll_at = now.after(limits::DISK_FULL_RETRY);
    let message = format!("the guest waits with a write to its disk: {free} are free on the host's");
    wait(Reason::DiskFull, message, Some(grace_end.map_or(poll_at, |end| end.min(poll_at))))
}

pub(super) fn plan_unreachable(object: &Object<Instance>, machine: &Machine, now: Moment) -> Plan<Action> {
    let since = object.status.unreachable_since.unwrap_or(now.at());
    let until = now.end(since, limits::UNREACHABLE_GRACE);
    if now.at() >= until {
        return act(Action::Kill(machine.owner.clone()));
    }
    wait(Reason::ObservationFailed, "the VMM does not answer; it is ended after a grace", Some(until))
}

/// Returns the end of the guest's grace period.
fn grace_end(object: &Object<Instance>, seen: &Observed, now: Moment) -> Timestamp {
    let asked_at = now.since(object.meta.deletion_requested_at.unwrap_or(object.spec.power_since));
    // The guest's own timer ends the program first, and its end still arrives within the time added here. A
    // program that ends by itself still has its guest's power-off to come, however long ago the spec changed:
    // its writes reach the disk only then.
    let ready = condition::find(&object.status.conditions, ConditionType::Ready);
    let down_since = ready.filter(|ready| ready.status != ConditionStatus::True);
    let since = down_since.map_or(asked_at, |ready| asked_at.max(now.since(ready.last_transition_time)));
    let since = object.status.ended_launch_at.map_or(since, |ended_at| since.max(now.since(ended_at)));
    let is_silent = seen.machine.as_ref().is_some_and(|machine| machine.guest.is_unresponsive);
    // A guest that answers nothing stops no services either.
    let grace = match is_silent {
        true => limits::SHUTDOWN_GRACE,
        false => shutdown_grace(&object.spec, seen.parts.image_config.as_ref()),
    };
    after(since, grace + limits::SHUTDOWN_GRACE)
}

fn is_grace_over(object: &Object<Instance>, seen: &Observed, now: Moment) -> bool {
    object.spec.is_forced || now.at() >= grace_end(object, seen, now)
}
