//! The plan of a policy: from the observation to the next steps.

use stead_schemas::condition::{self, ConditionType, Reason};
use stead_schemas::mediation::Mediation;
use stead_schemas::meta::Object;

use super::{Action, Observed};
use crate::runtime::{Desired, Plan, Record, Wait};

pub(super) fn plan(desired: &Desired<'_, Mediation>, seen: &Observed) -> Plan<Action> {
    let Desired::Present(object) = desired else { return plan_absent(seen) };
    let Some(wanted) = seen.wanted.as_ref().filter(|_| seen.is_needed) else {
        return plan_released(object, seen);
    };
    if !seen.is_mediator_ready {
        let why = seen.mediator_trouble.clone();
        let message = why.unwrap_or_else(|| "the process that carries egress is being started".to_owned());
        return wait(Reason::WaitingForEgress, message);
    }
    if seen.policy.fingerprint.as_ref() != Some(&wanted.fingerprint) {
        return Plan::Act(vec![Action::Put(wanted.clone())]);
    }
    Plan::Converged
}

/// Plans for a policy whose VM is down.
fn plan_released(object: &Object<Mediation>, seen: &Observed) -> Plan<Action> {
    if seen.policy.fingerprint.is_none() {
        return wait(Reason::NotNeeded, "its VM is down".to_owned());
    }
    let ready = condition::find(&object.status.conditions, ConditionType::Ready);
    if ready.is_none_or(|ready| ready.reason != Reason::NotNeeded) {
        return Plan::Record(Record { reason: Reason::NotNeeded, what: "recording that its VM is down" });
    }
    Plan::Act(vec![Action::Remove(seen.owner.clone())])
}

fn plan_absent(seen: &Observed) -> Plan<Action> {
    let policy = seen.policy.fingerprint.as_ref().map(|_| Action::Remove(seen.owner.clone()));
    let log = seen.policy.has_log.then(|| Action::DiscardLog(seen.owner.clone()));
    let steps: Vec<Action> = policy.into_iter().chain(log).collect();
    if steps.is_empty() { Plan::Converged } else { Plan::Act(steps) }
}

fn wait(reason: Reason, message: String) -> Plan<Action> {
    Plan::Wait(Wait { reason, message, until: None })
}
