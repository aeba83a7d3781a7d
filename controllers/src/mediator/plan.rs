//! The plan of a mediator: from the spec and the observation to the next step.

use jiff::Timestamp;
use stead_schemas::condition::Reason;
use stead_schemas::limits::{MEDIATOR_RELAUNCH_DELAY_FIRST, MEDIATOR_RELAUNCH_DELAY_MAX};
use stead_schemas::mediation::{Mediator, MediatorStatus};
use stead_schemas::meta::Object;

use super::{Action, Observed};
use crate::runtime::{Desired, Moment, Plan, Wait};

/// Largest number of doublings of the delay: the longest delay is reached before.
const DOUBLINGS_MAX: u32 = 16;

pub(super) fn plan(desired: &Desired<'_, Mediator>, seen: &Observed, now: Moment) -> Plan<Action> {
    let object = match desired {
        Desired::Present(object) if seen.is_needed => object,
        Desired::Present(_) if seen.process.is_none() => {
            return wait(Reason::NotNeeded, "no instance has mediated egress", None);
        }
        Desired::Absent(_) if seen.process.is_none() => return Plan::Converged,
        Desired::Present(_) | Desired::Absent(_) => return retire(seen),
    };
    match &seen.process {
        None => plan_launch(object, seen, now),
        Some(process) if !process.is_current => retire(seen),
        Some(process) if process.settings.as_ref() != Some(&object.spec.settings) => retire(seen),
        Some(_) => Plan::Converged,
    }
}

fn plan_launch(object: &Object<Mediator>, seen: &Observed, now: Moment) -> Plan<Action> {
    if let Some(until) = relaunch_at(&object.status, now).filter(|&until| now.at() < until) {
        return wait(Reason::Retrying, "the process ended; it is started again after a delay", Some(until));
    }
    Plan::Act(vec![Action::Launch { owner: seen.owner.clone(), settings: object.spec.settings.clone() }])
}

/// Returns when a process that ended may be started again: at once after it ran for a while, then with doubling delays.
fn relaunch_at(status: &MediatorStatus, now: Moment) -> Option<Timestamp> {
    let doublings = status.short_lives.checked_sub(1)?.min(DOUBLINGS_MAX);
    let delay = MEDIATOR_RELAUNCH_DELAY_FIRST.saturating_mul(1 << doublings).min(MEDIATOR_RELAUNCH_DELAY_MAX);
    Some(now.end(status.launched_at?, delay))
}

fn retire(seen: &Observed) -> Plan<Action> {
    Plan::Act(vec![Action::Retire(seen.owner.clone())])
}

fn wait(reason: Reason, message: &str, until: Option<Timestamp>) -> Plan<Action> {
    Plan::Wait(Wait { reason, message: message.to_owned(), until })
}
