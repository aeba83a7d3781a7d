//! Look-up of an instance for a request: whether the request may be sent to it, and its address.
//!
//! Guarantees: an address is always that of an instance in the store. An instance that a connection wakes
//! counts as reachable: the client waits at its wake listener until the instance runs.

use std::net::Ipv4Addr;

use stead_schemas::instance::{Instance, Power, State};
use stead_schemas::meta::Object;
use stead_schemas::names::{Name, Uid};
use stead_schemas::network::{Network, Nic, NicSpec};

use crate::store::Store;

/// The result of the look-up of an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reach {
    /// The instance may be connected to, though its program may not run yet in this state.
    At {
        instance: Uid,
        address: Ipv4Addr,
        state: State,
    },
    /// The instance exists but cannot be connected to in this state.
    Down(State),
    /// The instance has no network.
    Nowhere,
    Unknown,
}

/// Looks up an instance by id or exact name, for a connection to this port of it.
#[must_use]
pub fn reach(store: &Store, word: &str, port: u16) -> Reach {
    let by_id = word.parse::<Uid>().ok().and_then(|uid| store.get::<Instance>(&uid));
    let by_name = || Name::resource(word).ok().and_then(|name| store.find::<Instance>(&name));
    let found = by_id.or_else(by_name);
    let Some(instance) = found.filter(|one| !one.meta.is_deleting() && !one.is_pooled()) else {
        return Reach::Unknown;
    };
    let card = instance.spec.allocated.nic.as_ref().and_then(|uid| store.get::<Nic>(uid));
    let Some(card) = card else { return Reach::Nowhere };
    let state = instance.status.state;
    let is_up = match state {
        State::Standby => {
            instance.spec.power == Power::Running || is_woken(store, &instance, &card.spec, port)
        }
        // A guest that boots, or is paused for a moment, may answer before its state is reported.
        State::Initializing | State::Running | State::Paused | State::Unknown => true,
        State::Created | State::Shutdown | State::Stopped => false,
    };
    match is_up {
        true => Reach::At { instance: instance.meta.uid.clone(), address: card.spec.address, state },
        false => Reach::Down(state),
    }
}

/// True if a connection from this host wakes the instance.
fn is_woken(store: &Store, instance: &Object<Instance>, card: &NicSpec, port: u16) -> bool {
    let Some(policy) = instance.spec.auto_standby.as_ref().filter(|policy| policy.is_waking()) else {
        return false;
    };
    // A connection from this host comes from the bridge's own address.
    let gateway = store.get::<Network>(&card.network).map(|network| network.spec.gateway.address);
    gateway.is_some_and(|gateway| policy.counts(gateway.into(), port))
}
