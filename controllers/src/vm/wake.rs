//! The wake listener of a VM in standby. It listens while a connection should wake the VM, stops before the
//! VMM takes the card, and hands over the kept packets once the VM runs.

use stead_schemas::instance::{Instance, Power, PowerCause};
use stead_schemas::meta::Object;

use super::steps::{act, wake};
use super::{Action, NicSeen, Observed};
use crate::host::{PendingConnection, VmmState, WakeListener};
use crate::runtime::{Desired, Plan};

/// Returns the nic at whose card the wake listener should listen, if any.
fn wanted<'a>(object: &Object<Instance>, seen: &'a Observed) -> Option<&'a NicSeen> {
    // After the VM's end its card is free.
    let is_down = seen.machine.as_ref().is_none_or(|machine| machine.vmm == VmmState::Dead);
    let is_asleep = object.spec.power == Power::Standby && is_down && seen.saved(object).is_some();
    let policy = object.spec.auto_standby.as_ref()?;
    seen.parts.nic.as_ref().filter(|_| is_asleep && policy.is_waking())
}

/// Plans for an instance that is in standby as the spec asks.
pub(super) fn plan_asleep(object: &Object<Instance>, seen: &Observed) -> Plan<Action> {
    let Some(nic) = wanted(object, seen) else { return Plan::Converged };
    let policy = object.spec.auto_standby.as_ref();
    let counts = |pending: &PendingConnection| {
        policy.is_some_and(|policy| policy.counts(pending.source.into(), pending.port))
    };
    match &seen.listener {
        Some(listener) if listener.all_pending.iter().any(counts) => wake(object, seen, PowerCause::Traffic),
        Some(WakeListener { is_watched: true, .. }) => Plan::Converged,
        // The nic's reconciler makes the card again, and that wakes this reconciler.
        _ if !nic.is_ready => Plan::Converged,
        _ => act(Action::Watch(object.meta.uid.clone(), Box::new(nic.card.clone()))),
    }
}

/// True if a client tried to connect while the VM could not answer, so its packets must be handed over once
/// the VM runs.
pub(super) fn has_pending(seen: &Observed) -> bool {
    seen.listener.as_ref().is_some_and(|listener| !listener.is_watched && !listener.all_pending.is_empty())
}

/// Puts the stop of an unwanted wake listener before all other steps.
pub(super) fn leave_first(
    desired: &Desired<'_, Instance>,
    seen: &Observed,
    plan: Plan<Action>,
) -> Plan<Action> {
    let is_wanted = match desired {
        Desired::Present(object) => wanted(object, seen).is_some(),
        Desired::Absent(_) => false,
    };
    if is_wanted || !seen.listener.as_ref().is_some_and(|listener| listener.is_watched) {
        return plan;
    }
    let mut steps = vec![Action::Unwatch(seen.uid.clone())];
    if let Plan::Act(further) = plan {
        steps.extend(further);
    }
    Plan::Act(steps)
}
