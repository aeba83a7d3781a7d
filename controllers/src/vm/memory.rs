//! The hotplug memory of an instance: how much of it the guest should use, and how much it uses.

use jiff::Timestamp;
use stead_schemas::condition::{ConditionStatus, ConditionType, Reason};
use stead_schemas::instance::{Instance, InstanceStatus};
use stead_schemas::meta::Object;
use stead_schemas::quantity::Bytes;

use super::facts::is_up;
use super::passing_condition::{self, Found};
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
    let last_asked = machine.guest.memory_asked.or(memory.target);
    let is_so = last_asked.is_none() && memory.used == target;
    if last_asked != Some(target) && !is_so {
        return Some(Action::ResizeMemory(object.meta.uid.clone(), target));
    }
    // A guest that was asked for more may use blocks by now that it reported as unused before.
    let has_followed = memory.target == Some(target);
    (has_followed && machine.has_unused_memory).then(|| Action::TakeMemory(object.meta.uid.clone()))
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
    let difference = memory.zip(status.hotplugged).filter(|(_, used)| *used != target);
    let found = difference.map(|(memory, used)| {
        let (reason, why) = match &memory.error {
            Some(why) => (Reason::MemoryInUse, why.as_str()),
            None => (Reason::ResizingMemory, "it is about to change that"),
        };
        let message = format!("the guest uses {used} of its hotplug memory and should use {target}: {why}");
        Found { status: ConditionStatus::False, reason, message }
    });
    passing_condition::report(status, object, ConditionType::MemoryResized, found, now);
}

/// Returns when memory that was taken back for the host is given back.
pub(super) fn next_poll(object: &Object<Instance>) -> Option<Timestamp> {
    object.spec.memory_hold.map(|hold| hold.until)
}

#[cfg(test)]
mod tests {
    use stead_schemas::instance::Power;

    use super::*;
    use crate::host::{GuestPhase, VmmState};

    #[test]
    fn nothing_is_taken_from_a_guest_that_was_asked_for_more_and_the_last_request_counts() {
        const BLOCK: u64 = 128 << 20;
        let mut object = crate::vm::example(Power::Running, 1, 0);
        object.spec.hotplug = Bytes(4 * BLOCK);
        let now = Moment::from(object.meta.created_at);
        let mut planned = |wanted: u64, asked: Option<u64>, target: Option<u64>, used: u64| {
            object.spec.hotplugged = Some(Bytes(wanted * BLOCK));
            let mut machine = crate::vm::example_machine(VmmState::Running, GuestPhase::Ready);
            machine.has_unused_memory = true;
            machine.guest.memory_asked = asked.map(|blocks| Bytes(blocks * BLOCK));
            let (target, used) = (target.map(|blocks| Bytes(blocks * BLOCK)), Bytes(used * BLOCK));
            machine.guest.memory =
                Some(GuestMemory { target, used, error: None, unused: Vec::new(), change: 1 });
            plan(&object, &machine, now).map(|action| <&str>::from(&action))
        };
        assert_eq!(planned(4, None, None, 4), None, "as it booted");
        assert_eq!(planned(2, None, None, 4), Some("ResizeMemory"));
        assert_eq!(planned(2, Some(2), None, 4), None, "it has not followed yet");
        assert_eq!(planned(2, Some(2), Some(2), 2), Some("TakeMemory"));
        assert_eq!(planned(2, None, Some(2), 2), Some("TakeMemory"), "asked by an earlier daemon");
        assert_eq!(planned(4, Some(2), Some(2), 2), Some("ResizeMemory"));
        assert_eq!(planned(4, Some(4), Some(2), 2), None, "the blocks may be used by now");
        assert_eq!(
            planned(2, Some(4), Some(2), 2),
            Some("ResizeMemory"),
            "the request for more is on its way"
        );
    }
}
