//! The plan of a network: from the spec and the observation to the next steps.

use std::time::Duration;

use jiff::Timestamp;
use stead_schemas::condition::Reason;
use stead_schemas::meta::Object;
use stead_schemas::network::Network;

use super::{Action, Observed, rules};
use crate::host::{Forwarding, Link, LinkKind, Route};
use crate::runtime::{Desired, Plan, Refusal, Wait};

/// Time between two checks for the removal of an earlier network's bridge, which the earlier network's own
/// pass does.
const PREDECESSOR_WAIT: Duration = Duration::from_secs(1);

/// Greatest number of foreign addresses that one round removes; the next round removes more.
const ADDRESSES_AT_ONCE: usize = 16;

pub(super) fn plan(desired: &Desired<'_, Network>, seen: &Observed, now: Timestamp) -> Plan<Action> {
    match desired {
        Desired::Present(object) => plan_present(object, seen, now),
        Desired::Absent(Some(object)) => plan_absent(object, seen),
        Desired::Absent(None) => {
            // The table's name is not known without a record; a later network with that table loads it again.
            let steps = seen.bridge.iter().map(|link| Action::RemoveBridge(link.name.clone()));
            act_or_converged(steps.collect())
        }
    }
}

fn plan_present(object: &Object<Network>, seen: &Observed, now: Timestamp) -> Plan<Action> {
    let ours = match &seen.bridge {
        Some(link) if link.kind != LinkKind::Bridge => {
            let message = format!("the link {} is in use for something else", link.name);
            return Plan::Refuse(Refusal { reason: Reason::NameTaken, message });
        }
        Some(link) if link.owner != object.meta.uid => {
            return Plan::Wait(Wait {
                reason: Reason::Converging,
                message: format!("the bridge {} still belongs to network {}", link.name, link.owner),
                until: Some(now.saturating_add(PREDECESSOR_WAIT).unwrap_or(Timestamp::MAX)),
            });
        }
        other => other.as_ref(),
    };
    // Guests rely on a bridge that exists; a conflict is then only reported (`status`).
    if let (None, Some(route)) = (ours, seen.conflicts.first()) {
        return Plan::Refuse(Refusal { reason: Reason::SubnetConflict, message: conflict(object, route) });
    }
    let mut steps = Vec::new();
    if !seen.firewall.as_ref().is_some_and(|firewall| firewall.is_intact) {
        steps.push(Action::LoadFirewall(rules(object, seen.forwarding)));
    }
    plan_bridge(object, ours, &mut steps);
    if seen.forwarding == Forwarding::Off {
        steps.push(Action::Forward);
    }
    act_or_converged(steps)
}

fn plan_bridge(object: &Object<Network>, ours: Option<&Link>, steps: &mut Vec<Action>) {
    let bridge = &object.spec.bridge;
    let gateway = object.spec.gateway;
    if ours.is_none() {
        steps.push(Action::CreateBridge { name: bridge.clone(), owner: object.meta.uid.clone() });
    }
    let addresses = ours.map_or(&[][..], |link| &link.addresses);
    for &address in addresses.iter().filter(|&&address| address != gateway).take(ADDRESSES_AT_ONCE) {
        steps.push(Action::RemoveAddress { bridge: bridge.clone(), address });
    }
    if !addresses.contains(&gateway) {
        steps.push(Action::AddAddress { bridge: bridge.clone(), address: gateway });
    }
    if !ours.is_some_and(|link| link.is_up) {
        steps.push(Action::RaiseBridge(bridge.clone()));
    }
}

fn plan_absent(object: &Object<Network>, seen: &Observed) -> Plan<Action> {
    let is_ours = seen.bridge.as_ref().is_some_and(|link| link.owner == object.meta.uid);
    let is_another = seen.bridge.is_some() && !is_ours;
    // Tables that a successor continues to use belong to the successor.
    let has_tables = seen.firewall.is_some() && !seen.is_table_shared;
    if !is_ours && !has_tables {
        return Plan::Converged;
    }
    let mut steps = Vec::new();
    // The step is taken even if no bridge is observed, because only `remove` finds a bridge whose mark is not
    // complete. The bridge of an earlier or later network stays.
    if !is_another {
        steps.push(Action::RemoveBridge(object.spec.bridge.clone()));
    }
    if !seen.is_table_shared {
        steps.push(Action::RemoveFirewall { table: object.spec.table.clone() });
    }
    Plan::Act(steps)
}

pub(super) fn conflict(object: &Object<Network>, route: &Route) -> String {
    let subnet = object.spec.gateway.subnet();
    let by = route.link.as_ref().map_or_else(String::new, |link| format!(" by {link}"));
    format!("the subnet {subnet} overlaps the host's route to {}{by}", route.destination)
}

fn act_or_converged(steps: Vec<Action>) -> Plan<Action> {
    if steps.is_empty() { Plan::Converged } else { Plan::Act(steps) }
}
