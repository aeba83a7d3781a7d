//! The plan of an ingress: from the spec and the observation to the next steps at its ports.

use std::collections::BTreeSet;

use jiff::Timestamp;
use stead_schemas::condition::Reason;
use stead_schemas::ingress::Ingress;
use stead_schemas::limits::{INGRESS_PORT_POLL_INTERVAL, PLAN_STEPS_MAX};

use super::{Action, Observed, by_port};
use crate::runtime::{Desired, Plan, Wait};

pub(super) fn plan(desired: &Desired<'_, Ingress>, seen: &Observed, now: Timestamp) -> Plan<Action> {
    let wanted = match desired {
        Desired::Present(object) => by_port(&object.spec.rules),
        Desired::Absent(_) => Default::default(),
    };
    let owner = || seen.owner.clone();
    let strange = seen.served.keys().filter(|port| !wanted.contains_key(port));
    let closed = strange.map(|&port| Action::Close { owner: owner(), port });
    // Every port that can be opened is opened, whatever is in the way of the others.
    let missing = wanted
        .iter()
        .filter(|(port, rules)| seen.served.get(port) != Some(rules) && !seen.taken.contains(port));
    let opened = missing.map(|(&port, rules)| Action::Open { owner: owner(), port, rules: rules.clone() });
    let steps: Vec<Action> = closed.chain(opened).take(PLAN_STEPS_MAX).collect();
    if !steps.is_empty() {
        return Plan::Act(steps);
    }
    match taken(&seen.taken) {
        Some(message) => Plan::Wait(Wait {
            reason: Reason::PortInUse,
            message,
            until: Some(now.saturating_add(INGRESS_PORT_POLL_INTERVAL).unwrap_or(Timestamp::MAX)),
        }),
        None => Plan::Converged,
    }
}

/// Returns a message that names the ports that another program has, if there are any.
pub(super) fn taken(ports: &BTreeSet<u16>) -> Option<String> {
    let list = ports.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let noun = if ports.len() == 1 { "port" } else { "ports" };
    (!ports.is_empty()).then(|| format!("{noun} {list}: in use by another program"))
}
