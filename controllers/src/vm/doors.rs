//! The door of a VM in standby: watched while a connection shall wake it, left before its VMM
//! takes the card, and what was kept handed over once it runs.

use stead_schemas::instance::{Instance, Power, PowerCause};
use stead_schemas::meta::Object;

use super::steps::{act, wake};
use super::{Action, Observed, PortSeen};
use crate::host::{Door, Knock, VmmState};
use crate::runtime::{Desired, Plan};

/// The card that somebody shall be at.
fn wanted<'a>(object: &Object<Instance>, seen: &'a Observed) -> Option<&'a PortSeen> {
    // From the VMM's end on nobody else is at its card.
    let is_down = seen.machine.as_ref().is_none_or(|machine| machine.vmm == VmmState::Dead);
    let is_asleep = object.spec.power == Power::Standby && is_down && seen.saved(object).is_some();
    let policy = object.spec.auto_standby.as_ref()?;
    seen.parts.port.as_ref().filter(|_| is_asleep && policy.is_waking())
}

/// In standby as wished.
pub(super) fn plan_asleep(object: &Object<Instance>, seen: &Observed) -> Plan<Action> {
    let Some(port) = wanted(object, seen) else { return Plan::Converged };
    let policy = object.spec.auto_standby.as_ref();
    let counts = |knock: &Knock| policy.is_some_and(|policy| policy.counts(knock.source.into(), knock.port));
    match &seen.door {
        Some(door) if door.knocks.iter().any(counts) => wake(object, PowerCause::Traffic),
        Some(Door { is_watched: true, .. }) => Plan::Converged,
        // Its port's reconciler makes it again; that wakes this one.
        _ if !port.is_ready => Plan::Converged,
        _ => act(Action::Watch(object.meta.uid.clone(), Box::new(port.card.clone()))),
    }
}

/// Somebody knocked while the VM could not answer, and is to be let in once it runs.
pub(super) fn is_knocked(seen: &Observed) -> bool {
    seen.door.as_ref().is_some_and(|door| !door.is_watched && !door.knocks.is_empty())
}

/// A door that is watched where it shall not be is left before anything else is done.
pub(super) fn leave_first(
    desired: &Desired<'_, Instance>,
    seen: &Observed,
    plan: Plan<Action>,
) -> Plan<Action> {
    let is_wanted = match desired {
        Desired::Present(object) => wanted(object, seen).is_some(),
        Desired::Absent(_) => false,
    };
    if is_wanted || !seen.door.as_ref().is_some_and(|door| door.is_watched) {
        return plan;
    }
    let mut steps = vec![Action::Unwatch(seen.uid.clone())];
    if let Plan::Act(further) = plan {
        steps.extend(further);
    }
    Plan::Act(steps)
}
