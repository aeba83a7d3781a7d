//! Invariants of networks and ports. They are part of `checks` and so independent of every plan.

use std::collections::BTreeSet;

use jiff::Timestamp;
use stead_schemas::condition::{self, ConditionType, Reason};
use stead_schemas::instance::{Power, State};
use stead_schemas::limits::TAP_KEPT;
use stead_schemas::meta::{Kind, Object};
use stead_schemas::names::LinkName;
use stead_schemas::network::{Network, Nic, NicSpec};

use super::{Broken, HostSnapshot, Records, check_owner, check_ready, shaping};
use crate::host::{Forwarding, LinkKind, NicRule};

/// Checks the bridges, tables and links.
pub(super) fn check(broken: &mut Broken, records: &Records, host: &HostSnapshot, now: Timestamp) {
    let mut expected_links = BTreeSet::new();
    for network in &records.networks {
        let spec = &network.spec;
        expected_links.insert(spec.bridge.clone());
        let bridge = host.links.iter().find(|link| link.name == spec.bridge);
        let is_good = bridge.is_some_and(|link| {
            link.kind == LinkKind::Bridge && link.is_up && link.addresses == [spec.gateway]
        });
        if !is_good {
            broken.push(format!("bridge {} is {bridge:?}", spec.bridge));
        }
        if host.forwarding == Forwarding::Off {
            broken.push("forwarding is off".to_owned());
        }
        let mut rules: Vec<NicRule> = records.nics.iter().map(|nic| rule(nic)).collect();
        rules.sort();
        let seen = host.firewall.get(&spec.table);
        let is_loaded = seen.is_some_and(|seen| {
            let mut loaded = seen.nics.clone();
            loaded.sort();
            seen.is_intact && loaded == rules
        });
        if !is_loaded {
            broken.push(format!("table {} is {seen:?}, ports are {rules:?}", spec.table));
        }
        check_ready(broken, Network::NAME, &network.meta.uid, &network.status.conditions);
    }
    check_nics(broken, records, host, now, &mut expected_links);
    for link in &host.links {
        if !expected_links.contains(&link.name) {
            broken.push(format!("link {} is left over", link.name));
        }
    }
}

/// Checks the links of all nics, and adds those that may be there to `expected_links`.
fn check_nics(
    broken: &mut Broken,
    records: &Records,
    host: &HostSnapshot,
    now: Timestamp,
    expected_links: &mut BTreeSet<LinkName>,
) {
    for nic in &records.nics {
        let owner = nic.meta.owner.as_ref().map(|owner| &owner.uid);
        check_owner(broken, records, Nic::NAME, &nic.meta.uid, owner);
        let tap = host.links.iter().find(|link| link.name == nic.spec.tap);
        match is_behind(records, nic) {
            Some(true) => {
                shaping::limits(broken, nic, host);
                expected_links.extend(nic.spec.bandwidth.upload.map(|_| nic.spec.ifb()));
            }
            // A program that is restarted after a delay may or may not have kept the TAP.
            None if tap.is_none() => continue,
            // The limits of a TAP that is kept may be those of an earlier spec.
            None => drop(expected_links.insert(nic.spec.ifb())),
            Some(false) => {
                if tap.is_some() && is_kept(nic, now) {
                    expected_links.extend([nic.spec.tap.clone(), nic.spec.ifb()]);
                } else if let Some(tap) = tap {
                    broken.push(format!("port {} of a VM that is down has {tap:?}", nic.meta.uid));
                }
                if condition::is_ready(&nic.status.conditions) {
                    broken.push(format!("port {} of a VM that is down is Ready", nic.meta.uid));
                }
                continue;
            }
        }
        expected_links.insert(nic.spec.tap.clone());
        let is_good = tap.is_some_and(|link| {
            link.kind == LinkKind::Tap
                && link.is_up
                && link.is_isolated
                && link.master.as_ref() == Some(&nic.spec.bridge)
        });
        if !is_good {
            broken.push(format!("tap of port {} is {tap:?}", nic.meta.uid));
        }
        check_ready(broken, Nic::NAME, &nic.meta.uid, &nic.status.conditions);
    }
}

/// Returns whether a VM or a wake listener is at the port, or `None` if both answers are valid.
fn is_behind(records: &Records, nic: &Object<Nic>) -> Option<bool> {
    let owner = nic.meta.owner.as_ref()?;
    let instance = records.instances.iter().find(|instance| instance.meta.uid == owner.uid)?;
    if instance.spec.allocated.nic.as_ref() != Some(&nic.meta.uid) {
        // It waits for the next start.
        return Some(false);
    }
    let has_wake_listener = instance.spec.auto_standby.as_ref().is_some_and(|policy| policy.is_waking());
    match instance.status.state {
        // The instance should continue, and waits for its image.
        State::Standby if instance.spec.power != Power::Standby => Some(true),
        State::Standby => Some(has_wake_listener),
        State::Stopped if instance.status.restart.next_attempt_at.is_some() => None,
        State::Stopped => Some(false),
        _ => Some(true),
    }
}

/// True if the port was reported as not needed so recently that its TAP is still kept for a VM that comes
/// back.
fn is_kept(nic: &Object<Nic>, now: Timestamp) -> bool {
    let ready = condition::find(&nic.status.conditions, ConditionType::Ready);
    let found = ready.filter(|ready| ready.reason == Reason::NotNeeded);
    found.is_some_and(|ready| now < ready.last_transition_time.saturating_add(TAP_KEPT).unwrap_or(now))
}

fn rule(nic: &Object<Nic>) -> NicRule {
    let NicSpec { tap, mac, address, lane, .. } = nic.spec.clone();
    NicRule { tap, mac, address, lane }
}
