//! The plan of a port: from the spec and the observation to the next steps.

use stead_schemas::condition::Reason;
use stead_schemas::limits::TAP_KEPT;
use stead_schemas::meta::Object;
use stead_schemas::network::Nic;

use super::need::released_at;
use super::{Action, Observed, rule, shaping};
use crate::host::{Link, LinkKind};
use crate::runtime::{Desired, Moment, Plan, Record, Refusal, Wait};

pub(super) fn plan(desired: &Desired<'_, Nic>, seen: &Observed, now: Moment) -> Plan<Action> {
    match desired {
        Desired::Present(object) => plan_present(object, seen, now),
        Desired::Absent(object) => plan_absent(*object, seen),
    }
}

fn plan_present(object: &Object<Nic>, seen: &Observed, now: Moment) -> Plan<Action> {
    let mut links = [(&seen.tap, LinkKind::Tap), (&seen.ifb, LinkKind::Ifb)].into_iter();
    let taken = links.find_map(|(link, kind)| link.as_ref().filter(|link| !is_ours(object, link, kind)));
    if let Some(link) = taken {
        let message = format!("the link {} is in use for something else", link.name);
        return Plan::Refuse(Refusal { reason: Reason::NameTaken, message });
    }
    if !seen.is_needed {
        return plan_released(object, seen, now);
    }
    if !seen.is_network_ready {
        return Plan::Wait(Wait {
            reason: Reason::WaitingForNetwork,
            message: match &seen.network_trouble {
                Some(why) => format!("the network is not ready: {why}"),
                None => "the network is not ready".to_owned(),
            },
            until: None,
        });
    }
    let spec = &object.spec;
    let name = || spec.tap.clone();
    let is_enslaved = seen.tap.as_ref().is_some_and(|tap| tap.master.as_ref() == Some(&spec.bridge));
    let mut steps = Vec::new();
    if seen.tap.is_none() {
        let (owner, has_queues) = (object.meta.uid.clone(), spec.has_queues);
        steps.push(Action::CreateTap { name: name(), owner, has_queues });
    }
    if !is_enslaved {
        steps.push(Action::Enslave { tap: name(), bridge: spec.bridge.clone() });
    }
    // Isolation belongs to the attachment to a bridge: a new attachment is not isolated yet.
    if !is_enslaved || !seen.tap.as_ref().is_some_and(|tap| tap.is_isolated) {
        steps.push(Action::Isolate(name()));
    }
    if !seen.has_rule {
        steps.push(Action::AddRule { table: spec.table.clone(), rule: rule(object) });
    }
    steps.extend(shaping::steps(object, seen));
    if !seen.tap.as_ref().is_some_and(|tap| tap.is_up) {
        steps.push(Action::RaiseTap(name()));
    }
    act_or_converged(steps)
}

/// Plans for a port that is not needed. The rule stays with its addresses, so that a VM that comes back waits
/// for one step less.
fn plan_released(object: &Object<Nic>, seen: &Observed, now: Moment) -> Plan<Action> {
    let mut steps = Vec::new();
    if seen.is_network_ready && !seen.has_rule {
        steps.push(Action::AddRule { table: object.spec.table.clone(), rule: rule(object) });
    }
    let has_links = seen.tap.is_some() || seen.ifb.is_some();
    let kept_until = released_at(object).map(|at| now.end(at, TAP_KEPT)).filter(|_| has_links);
    if kept_until.is_some_and(|until| now.at() >= until) {
        steps.extend(removals(seen.tap.as_ref(), seen.ifb.as_ref()));
    }
    if !steps.is_empty() {
        return Plan::Act(steps);
    }
    if kept_until.is_none() && has_links {
        // The TAP may be removed once the record exists, and is removed after a while.
        return Plan::Record(Record { reason: Reason::NotNeeded, what: "recording that its VM is down" });
    }
    Plan::Wait(Wait { reason: Reason::NotNeeded, message: "its VM is down".to_owned(), until: kept_until })
}

fn plan_absent(object: Option<&Object<Nic>>, seen: &Observed) -> Plan<Action> {
    let mut steps = Vec::new();
    if let Some(object) = object.filter(|_| seen.has_rule) {
        steps.push(Action::RemoveRule { table: object.spec.table.clone(), rule: rule(object) });
    }
    let is_its = |link: &&Link, kind| object.is_none_or(|object| is_ours(object, link, kind));
    let tap = seen.tap.as_ref().filter(|link| is_its(link, LinkKind::Tap));
    let ifb = seen.ifb.as_ref().filter(|link| is_its(link, LinkKind::Ifb));
    steps.extend(removals(tap, ifb));
    act_or_converged(steps)
}

/// Returns the steps that remove the links. The IFB goes last, so that no frame is led to it any more.
fn removals(tap: Option<&Link>, ifb: Option<&Link>) -> impl Iterator<Item = Action> {
    let tap = tap.map(|link| Action::RemoveTap(link.name.clone()));
    tap.into_iter().chain(ifb.map(|link| Action::RemoveIfb(link.name.clone())))
}

fn is_ours(object: &Object<Nic>, link: &Link, kind: LinkKind) -> bool {
    link.owner == object.meta.uid && link.kind == kind
}

fn act_or_converged(steps: Vec<Action>) -> Plan<Action> {
    if steps.is_empty() { Plan::Converged } else { Plan::Act(steps) }
}
