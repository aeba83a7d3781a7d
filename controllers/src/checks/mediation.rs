//! Invariants of mediated egress. They are part of `checks` and so independent of every plan.

use std::collections::BTreeMap;

use stead_schemas::egress::EgressMode;
use stead_schemas::instance::Instance;
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;
use stead_schemas::network::{Lane, Nic};

use super::{Broken, HostSnapshot, Records};
use crate::host::{NicRule, VmmState};

/// Returns the mediated instances with their cards.
fn mediated(records: &Records) -> impl Iterator<Item = (&Object<Instance>, &Object<Nic>)> {
    let cards: BTreeMap<&Uid, &Object<Nic>> =
        records.nics.iter().map(|nic| (&nic.meta.uid, nic.as_ref())).collect();
    records.instances.iter().filter_map(move |instance| {
        instance.spec.egress.as_ref()?;
        Some((instance.as_ref(), *cards.get(instance.spec.allocated.nic.as_ref()?)?))
    })
}

/// Checks that no mediated guest that runs can send by itself.
pub(crate) fn always(broken: &mut Broken, records: &Records, host: &HostSnapshot) {
    let loaded = || host.firewall.values().flat_map(|table| &table.nics);
    for (instance, nic) in mediated(records) {
        let uid = &instance.meta.uid;
        let runs = host.machines.get(uid).is_some_and(|machine| machine.vmm == VmmState::Running);
        let is_direct = |rule: &NicRule| rule.address == nic.spec.address && rule.lane == Lane::Direct;
        if runs && loaded().any(is_direct) {
            broken.push(format!("{uid} is mediated and can reach the outside by itself"));
        }
    }
}

/// Checks that each guest that runs has its policy with its credentials, that nothing else has one, and that no process
/// or log is left over.
pub(crate) fn settled(broken: &mut Broken, records: &Records, host: &HostSnapshot) {
    let Some(policies) = &host.policies else { return };
    for (instance, nic) in mediated(records) {
        let uid = &instance.meta.uid;
        let Some(mediation) = records.mediations.iter().find(|one| one.spec.nic == nic.meta.uid) else {
            broken.push(format!("{uid} is mediated and has no policy stored"));
            continue;
        };
        let runs = host.machines.get(uid).is_some_and(|machine| machine.pid.is_some());
        match policies.get(&mediation.meta.uid) {
            None if runs => broken.push(format!("{uid} runs without its policy")),
            None => {}
            Some(policy) => {
                let egress = instance.spec.egress.as_ref();
                let is_its = egress.is_some_and(|egress| {
                    let all = egress.mode == EgressMode::All;
                    let values = egress.credentials.iter().all(|(name, credential)| {
                        let held = policy.credentials.get(name).map(|held| &held.value);
                        held == instance.spec.env.get(&credential.source.env)
                    });
                    let lane = if all { Lane::All } else { Lane::Web };
                    values
                        && policy.mode == egress.mode
                        && policy.allow_hosts == egress.allow_hosts
                        && policy.is_observing == egress.is_observing
                        && nic.spec.lane == lane
                });
                if !is_its || policy.address != std::net::IpAddr::from(nic.spec.address) {
                    broken.push(format!("{uid} has another policy than its spec asks for"));
                }
            }
        }
    }
    for nic in records.nics.iter().filter(|nic| nic.spec.lane != Lane::Direct) {
        if !records.mediations.iter().any(|one| one.spec.nic == nic.meta.uid) {
            broken.push(format!("port {} is led through a mediator without a policy", nic.meta.uid));
        }
    }
    let stored = |uid: &Uid| records.mediations.iter().any(|one| one.meta.uid == *uid);
    for owner in policies.keys().chain(&host.policy_logs).filter(|owner| !stored(owner)) {
        broken.push(format!("the policy or log of {owner} is left over"));
    }
    let needed = !records.mediations.is_empty();
    for mediator in &records.mediators {
        let process = host.mediators.get(&mediator.meta.uid);
        let is_good = process.is_some_and(|process| {
            process.is_current && process.settings.as_ref() == Some(&mediator.spec.settings)
        });
        if needed != process.is_some() || (needed && !is_good) {
            broken.push(format!("the mediator is {process:?}, needed: {needed}"));
        }
        if mediator.status.pid != process.map(|process| process.pid) {
            broken.push("the status of the mediator names another process".to_owned());
        }
    }
}
