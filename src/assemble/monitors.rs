//! Reports of the host's monitors, and the objects that they are passed on to.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use stead_controllers::daemon::Drifts;
use stead_controllers::store::Store;
use stead_schemas::instance::Instance;
use stead_schemas::meta::{Kind, Object};
use stead_schemas::names::Uid;
use stead_schemas::network::{Network, Port};
use stead_schemas::references::{Ref, Role, Target};
use tokio::sync::mpsc;

use super::Reports;
use crate::host::flows::{Conntrack, Interest, Moved};
use crate::host::monitor::Heard;

/// Length of the part of a uid that ends the name of a TAP (`Uid::short`), in bytes.
const TAP_UID_BYTES: usize = 10;
/// The reference that running instances with a policy that counts connections have.
const COUNTING: Ref = Ref { role: Role::Counts, target: Target::Connections };

/// Passes on reports of a network monitor to the objects that they concern.
pub(super) fn follow(mut heard: mpsc::Receiver<Heard>, reports: Reports, store: Store) {
    tokio::spawn(async move {
        while let Some(heard) = heard.recv().await {
            reports.tell(|drifts| match heard {
                Heard::Owner(uid) => link_changed(drifts, &store, uid),
                // A link whose record is gone too concerns no object.
                Heard::Gone(uid)
                    if store.get::<Port>(&uid).is_none() && store.get::<Network>(&uid).is_none() => {}
                Heard::Gone(uid) => link_changed(drifts, &store, uid),
                Heard::Port(tap) => {
                    // The name of a TAP ends in the beginning of its port's uid.
                    let short =
                        tap.as_str().len().checked_sub(TAP_UID_BYTES).and_then(|at| tap.as_str().get(at..));
                    let ports =
                        short.map(|short| store.starting_with::<Port>(short, usize::MAX)).unwrap_or_default();
                    let concerned = ports.into_iter().filter(|port| port.spec.tap == tap);
                    concerned.for_each(|port| drifts.ports.object(port.meta.uid.clone()));
                }
                Heard::Host => drifts.networks.everything(),
                Heard::Everything => {
                    drifts.networks.everything();
                    drifts.ports.everything();
                }
            });
        }
    });
}

/// Notifies the owner of the link with this mark.
fn link_changed(drifts: &Drifts, store: &Store, uid: Uid) {
    let port = store.get::<Port>(&uid);
    // A link without a record may be of either kind.
    if port.is_none() {
        drifts.networks.object(uid.clone());
    }
    // A running guest may have lost its TAP.
    if let Some(owner) = port.and_then(|port| port.meta.owner.clone()) {
        drifts.instances.object(owner.uid);
    }
    drifts.ports.object(uid);
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
            reports.tell(|drifts| concerned.iter().for_each(|uid| drifts.instances.object(uid.clone())));
        }
    });
}

/// Returns the addresses of running instances whose policy counts connections, each with the instance and
/// its timeout.
fn counted(store: &Store) -> BTreeMap<Ipv4Addr, (Uid, Duration)> {
    let of = |instance: &Object<Instance>| {
        let timeout = instance.spec.auto_standby.as_ref()?.timeout()?;
        let port = store.get::<Port>(instance.spec.allocated.port.as_ref()?)?;
        Some((port.spec.address, (instance.meta.uid.clone(), timeout)))
    };
    store.referring::<Instance>(&COUNTING).iter().filter_map(|instance| of(instance)).collect()
}

/// Returns the instance with this address, if its policy counts connections now.
fn at_address(store: &Store, address: Ipv4Addr) -> Option<Uid> {
    let reference = Ref { role: Role::Address, target: Target::Address(address) };
    let port = store.find_referring::<Port>(&reference, |port| !port.meta.is_deleting())?;
    let instance = store.get::<Instance>(&port.meta.owner.as_ref()?.uid)?;
    Instance::references(&instance).contains(&COUNTING).then(|| instance.meta.uid.clone())
}
