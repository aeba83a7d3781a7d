//! Reports of the host's monitors, and the objects that they are passed on to.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use stead_controllers::daemon::Drifts;
use stead_controllers::store::Store;
use stead_schemas::instance::Instance;
use stead_schemas::meta::{Kind, Object};
use stead_schemas::names::Uid;
use stead_schemas::network::{Network, Nic};
use stead_schemas::references::{Ref, Role, Target};
use tokio::sync::mpsc;

use super::Reports;
use crate::host::flows::{Conntrack, Interest, Moved};
use crate::host::monitor::Notification;

/// Length of the part of a uid that ends the name of a TAP (`Uid::short`), in bytes.
const TAP_UID_BYTES: usize = 10;
/// The reference that running instances with a policy that counts connections have.
const COUNTING: Ref = Ref { role: Role::Counts, target: Target::Connections };

/// Passes on reports of a network monitor to the objects that they concern.
pub(super) fn follow(mut notification: mpsc::Receiver<Notification>, reports: Reports, store: Store) {
    tokio::spawn(async move {
        while let Some(notification) = notification.recv().await {
            reports.report(|drifts| match notification {
                Notification::Owner(uid) => link_changed(drifts, &store, uid),
                // A link whose record is gone too concerns no object.
                Notification::Gone(uid)
                    if store.get::<Nic>(&uid).is_none() && store.get::<Network>(&uid).is_none() => {}
                Notification::Gone(uid) => link_changed(drifts, &store, uid),
                Notification::Nic(tap) => {
                    // The name of a TAP ends in the beginning of its port's uid.
                    let short =
                        tap.as_str().len().checked_sub(TAP_UID_BYTES).and_then(|at| tap.as_str().get(at..));
                    let nics =
                        short.map(|short| store.starting_with::<Nic>(short, usize::MAX)).unwrap_or_default();
                    let concerned = nics.into_iter().filter(|nic| nic.spec.tap == tap);
                    concerned.for_each(|nic| drifts.nics.object(nic.meta.uid.clone()));
                }
                Notification::Lane(address) => {
                    let reference = Ref { role: Role::Address, target: Target::Address(address) };
                    let nics = store.uids_referring::<Nic>(&reference);
                    nics.into_iter().for_each(|uid| drifts.nics.object(uid));
                }
                Notification::Host => drifts.networks.everything(),
                Notification::Everything => {
                    drifts.networks.everything();
                    drifts.nics.everything();
                }
            });
        }
    });
}

/// Notifies the owner of the link with this mark.
fn link_changed(drifts: &Drifts, store: &Store, uid: Uid) {
    let nic = store.get::<Nic>(&uid);
    // A link without a record may be of either kind.
    if nic.is_none() {
        drifts.networks.object(uid.clone());
    }
    // A running guest may have lost its TAP.
    if let Some(owner) = nic.and_then(|nic| nic.meta.owner.clone()) {
        drifts.instances.object(owner.uid);
    }
    drifts.nics.object(uid);
}

/// Passes on new and ended connections to the instances that may go to standby because of them.
pub(super) fn follow_flows(flows: &Conntrack, reports: Reports, store: Store) {
    let for_monitor = store.clone();
    let mut moves = flows.monitor(move || {
        let counted = counted(&for_monitor);
        let patience = counted.values().map(|(_, timeout)| *timeout).min();
        Interest { addresses: counted.into_keys().collect(), patience }
    });
    tokio::spawn(async move {
        while let Some(moved) = moves.recv().await {
            let concerned: Vec<Uid> = match moved {
                Moved::At(address) => at_address(&store, address).into_iter().collect(),
                Moved::Anywhere => store.uids_referring::<Instance>(&COUNTING),
            };
            reports.report(|drifts| concerned.iter().for_each(|uid| drifts.instances.object(uid.clone())));
        }
    });
}

/// Returns the addresses of running instances whose policy counts connections, each with the instance and
/// its timeout.
fn counted(store: &Store) -> BTreeMap<Ipv4Addr, (Uid, Duration)> {
    let of = |instance: &Object<Instance>| {
        let timeout = instance.spec.auto_standby.as_ref()?.timeout()?;
        let nic = store.get::<Nic>(instance.spec.allocated.nic.as_ref()?)?;
        Some((nic.spec.address, (instance.meta.uid.clone(), timeout)))
    };
    store.referring::<Instance>(&COUNTING).iter().filter_map(|instance| of(instance)).collect()
}

/// Returns the instance with this address, if its policy counts connections now.
fn at_address(store: &Store, address: Ipv4Addr) -> Option<Uid> {
    let reference = Ref { role: Role::Address, target: Target::Address(address) };
    let nic = store.find_referring::<Nic>(&reference, |nic| !nic.meta.is_deleting())?;
    let instance = store.get::<Instance>(&nic.meta.owner.as_ref()?.uid)?;
    Instance::references(&instance).contains(&COUNTING).then(|| instance.meta.uid.clone())
}
