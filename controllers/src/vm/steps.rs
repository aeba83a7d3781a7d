//! Plans of one step, and the waits that several plans share.

use jiff::Timestamp;
use stead_schemas::condition::Reason;
use stead_schemas::instance::{Instance, PowerCause};
use stead_schemas::meta::Object;

use super::{Action, Observed};
use crate::runtime::{Plan, Record, Refusal, Wait};

pub(super) fn act(action: Action) -> Plan<Action> {
    Plan::Act(vec![action])
}

pub(super) fn record(reason: Reason, what: &'static str) -> Plan<Action> {
    Plan::Record(Record { reason, what })
}

pub(super) fn wait(reason: Reason, message: impl Into<String>, until: Option<Timestamp>) -> Plan<Action> {
    Plan::Wait(Wait { reason, message: message.into(), until })
}

/// Refuses a spec that the instance's hypervisor cannot carry out.
pub(super) fn refuse(why: &str) -> Plan<Action> {
    Plan::Refuse(Refusal { reason: Reason::Unsupported, message: why.to_owned() })
}

/// Ends the standby that the spec asks for, once the host has room for the VM.
pub(super) fn wake(object: &Object<Instance>, seen: &Observed, by: PowerCause) -> Plan<Action> {
    let wake = Action::Wake { uid: object.meta.uid.clone(), standby: object.spec.standby, by };
    wait_for_room(seen).unwrap_or_else(|| act(wake))
}

/// Asks for room for a VM that has to run before its memory can be kept: the memory that it kept is lost.
pub(super) fn regrant(object: &Object<Instance>, seen: &Observed) -> Plan<Action> {
    let regrant = Action::Regrant { uid: object.meta.uid.clone(), standby: object.spec.standby };
    wait_for_room(seen).unwrap_or_else(|| act(regrant))
}

/// Waits if the host has no room for the VM. Whatever gives room back wakes the instance.
fn wait_for_room(seen: &Observed) -> Option<Plan<Action>> {
    let short = seen.short_of.as_ref()?;
    let message = format!("the host has not enough {short} left; it goes on when there is room");
    Some(wait(Reason::InsufficientResources, message, None))
}

/// Waits for the root disk, with the disk's own message if it has one.
pub(super) fn wait_for_disk(seen: &Observed, what: &str) -> Plan<Action> {
    let message = match &seen.parts.disk_trouble {
        Some(trouble) => format!("{what}: {trouble}"),
        None => what.to_owned(),
    };
    wait(Reason::WaitingForDisk, message, None)
}
