//! The hotplug memory of an instance: how much of it the guest should use, and how much it uses.

use jiff::Timestamp;
use stead_schemas::condition::{self, Condition, ConditionStatus, ConditionType, Reason};
use stead_schemas::instance::{Instance, InstanceStatus};
use stead_schemas::limits::MESSAGE_CHARS_MAX;
use stead_schemas::meta::Object;
use stead_schemas::quantity::Bytes;
use stead_schemas::validate::printable;

use super::facts::is_up;
use super::{Action, Observed};
use crate::host::{GuestMemory, Machine};
use crate::runtime::Moment;

/// Returns the memory that a guest with hotplug memory reports.
fn reported<'a>(object: &Object<Instance>, machine: &'a Machine) -> Option<&'a GuestMemory> {
    machine.guest.memory.as_ref().filter(|_| object.spec.hotplug > Bytes(0))
}

/// Asks a guest that should use another part of its hotplug memory, and was not asked yet, and takes back what it does not
/// use any more.
pub(super) fn plan(object: &Object<Instance>, machine: &Machine, now: Moment) -> Option<Action> {
    let memory = reported(object, machine).filter(|_| is_up(machine))?;
    let target = object.spec.hotplug_target(now.at());
    let is_asked = [memory.target, machine.guest.memory_asked].contains(&Some(target));
    let is_so = memory.target.is_none() && memory.used == target;
    if !is_asked && !is_so {
        return Some(Action::ResizeMemory(object.meta.uid.clone(), target));
    }
    machine.has_unused_memory.then(|| Action::TakeMemory(object.meta.uid.clone()))
}

/// Records how much the guest uses, and reports it while that is another part than it should be. The guest is not
/// trusted: it uses no more than it was given.
pub(super) fn record(
    status: &mut InstanceStatus,
    object: &Object<Instance>,
    seen: Option<&Observed>,
    now: Moment,
) {
    let Some(seen) = seen else { return };
    status.returns_memory = seen.machine.as_ref().is_some_and(|machine| machine.returns_memory);
    let memory = seen.machine.as_ref().and_then(|machine| reported(object, machine));
    match memory {
        Some(memory) => status.hotplugged = Some(memory.used.min(object.spec.hotplug)),
        None if seen.machine.is_none() && !seen.has_saved() => status.hotplugged = None,
        None => {}
    }
    let target = object.spec.hotplug_target(now.at());
    let Some((memory, used)) = memory.zip(status.hotplugged).filter(|(_, used)| *used != target) else {
        status.conditions.retain(|condition| condition.kind != ConditionType::MemoryResized);
        return;
    };
    let (reason, why) = match &memory.error {
        Some(why) => (Reason::MemoryInUse, why.as_str()),
        None => (Reason::ResizingMemory, "it is about to change that"),
    };
    let message = format!("the guest uses {used} of its hotplug memory and should use {target}: {why}");
    let new = Condition {
        kind: ConditionType::MemoryResized,
        status: ConditionStatus::False,
        reason,
        message: printable(&message, MESSAGE_CHARS_MAX),
        observed_generation: object.meta.generation,
        last_transition_time: now.at(),
    };
    condition::set(&mut status.conditions, new);
}

/// Returns when memory that was taken back for the host is given back.
pub(super) fn next_poll(object: &Object<Instance>) -> Option<Timestamp> {
    object.spec.memory_hold.map(|hold| hold.until)
}
