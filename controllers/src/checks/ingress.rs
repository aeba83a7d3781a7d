//! Invariants of the ports of this host that ingresses use. They are part of `checks` and so independent of
//! every plan.

use std::collections::{BTreeMap, BTreeSet};

use stead_schemas::condition::{self, ConditionStatus, ConditionType, Reason};
use stead_schemas::ingress::Ingress;
use stead_schemas::meta::Object;

use super::{Broken, HostSnapshot, Records};

/// Checks that no two rules are for the same hosts at the same port, and that no port belongs both to another
/// program and to us.
pub(crate) fn always(broken: &mut Broken, records: &Records, host: &HostSnapshot) {
    let mut seen: BTreeMap<(u16, String), &Object<Ingress>> = BTreeMap::new();
    for ingress in &records.ingresses {
        for rule in &ingress.spec.rules {
            if let Some(other) = seen.insert((rule.port, rule.hostname.shape()), ingress) {
                let (name, port) = (&rule.hostname, rule.port);
                let both = [&other.meta.uid, &ingress.meta.uid];
                broken.push(format!("{name} at port {port} is in two rules, of {both:?}"));
            }
        }
    }
    for port in host.listeners.iter().flat_map(BTreeMap::keys).filter(|port| host.taken_ports.contains(port))
    {
        broken.push(format!("port {port} is ours and another program's"));
    }
}

/// Checks that every rule is served at its port and no other rule is, and that a rule that cannot be served
/// is reported.
pub(crate) fn settled(broken: &mut Broken, records: &Records, host: &HostSnapshot) {
    let Some(listeners) = &host.listeners else { return };
    let mut wanted = BTreeSet::new();
    for ingress in &records.ingresses {
        let uid = &ingress.meta.uid;
        let mut is_held_up = false;
        for rule in &ingress.spec.rules {
            wanted.insert((rule.port, uid.clone()));
            if host.taken_ports.contains(&rule.port) {
                is_held_up = true;
                continue;
            }
            let served = listeners.get(&rule.port).and_then(|owners| owners.get(uid));
            if !served.is_some_and(|served| served.contains(rule)) {
                broken.push(format!("ingress {uid}: {} is not served at port {}", rule.hostname, rule.port));
            }
        }
        let conditions = &ingress.status.conditions;
        let degraded = condition::find(conditions, ConditionType::Degraded);
        let is_reported = degraded.is_some_and(|degraded| {
            degraded.status == ConditionStatus::True && degraded.reason == Reason::PortInUse
        });
        if (condition::is_ready(conditions), is_reported) != (!is_held_up, is_held_up) {
            broken.push(format!("ingress {uid}: held up {is_held_up}, reported as {conditions:?}"));
        }
    }
    for (port, owners) in listeners {
        if owners.is_empty() {
            broken.push(format!("port {port} is open although no ingress needs it"));
        }
        for (owner, rules) in owners {
            if !wanted.contains(&(*port, owner.clone())) {
                broken.push(format!("port {port} is open for {owner}, which does not want it"));
            }
            let owned_ingress = records.ingresses.iter().find(|ingress| ingress.meta.uid == *owner);
            let is_stored = |rule| owned_ingress.is_some_and(|ingress| ingress.spec.rules.contains(rule));
            for rule in rules.iter().filter(|rule| rule.port != *port || !is_stored(rule)) {
                broken.push(format!("{} is served at port {port} for {owner}: no such rule", rule.hostname));
            }
        }
    }
}
