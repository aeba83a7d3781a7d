//! Standby: the way between a running VM and its saved memory, in either direction.

use stead_schemas::condition::Reason;
use stead_schemas::instance::{Instance, Power, State};
use stead_schemas::meta::Object;
use stead_schemas::snapshot::CompressionState;

use crate::host::{Machine, SavedMemory};
use crate::runtime::{Moment, Plan};
use crate::vm::facts::{has_started, is_prepared};
use crate::vm::steps::{act, record, wake};
use crate::vm::{Action, Observed, idle, wake};

/// Listens for connections, and compresses the memory when that is due.
pub(super) fn plan_asleep(
    object: &Object<Instance>,
    saved: &SavedMemory,
    seen: &Observed,
    now: Moment,
) -> Plan<Action> {
    match wake::plan_asleep(object, seen) {
        Plan::Converged => plan_compression(object, saved, now),
        planned => planned,
    }
}

fn plan_compression(object: &Object<Instance>, saved: &SavedMemory, now: Moment) -> Plan<Action> {
    match (object.spec.compression, saved.compression_state) {
        (Some(asked), CompressionState::Plain) if now.at() >= asked.not_before => {
            act(Action::Compress(object.meta.uid.clone(), asked.how))
        }
        _ => Plan::Converged,
    }
}

/// Listens for connections and records the state before the VMM's remains are removed, because no client
/// waits for the removal.
pub(super) fn plan_just_asleep(object: &Object<Instance>, seen: &Observed) -> Plan<Action> {
    match wake::plan_asleep(object, seen) {
        Plan::Converged if object.status.state != State::Standby => {
            record(Reason::Converging, "recording that it is in standby")
        }
        // The remains of the VMM go, too, while the VM waits for room.
        Plan::Converged | Plan::Wait(_) => act(Action::Release(object.meta.uid.clone())),
        planned => planned,
    }
}

/// Saves and ends a paused VM, or lets it continue, whatever paused it.
pub(super) fn plan_paused(object: &Object<Instance>, machine: &Machine, seen: &Observed) -> Plan<Action> {
    let uid = || object.meta.uid.clone();
    let is_standby = object.spec.power == Power::Standby;
    // A standby can be undone until its process is gone, so that a client that came meanwhile is answered.
    if let Some(by) = idle::disturbance(object, seen) {
        return wake(object, seen, by);
    }
    match seen.saved(object) {
        Some(_) if is_standby => act(Action::Kill(uid())),
        _ if seen.has_saved() => act(Action::DiscardMemory(uid())),
        // An end is recorded and not saved.
        _ if is_standby && machine.guest.exit.is_none() && has_started(object, machine) => {
            act(Action::Save(uid(), object.spec.standby))
        }
        // A pooled instance stays paused until a fork takes it.
        _ if object.is_pooled() && is_prepared(object, machine) => Plan::Converged,
        _ => act(Action::Resume(uid())),
    }
}
