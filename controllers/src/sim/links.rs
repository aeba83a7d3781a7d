//! Simulated network interfaces.

use stead_schemas::names::LinkName;

use super::{State, World};
use crate::host::{
    Forwarding, HostError, HostErrorKind, Link, LinkChange, LinkKind, LinkPlan, Links, Route, Routes,
};

impl Links for World {
    async fn list(&self) -> Result<Vec<Link>, HostError> {
        self.verb("list", "links", |state| Ok(state.links.values().cloned().collect())).await
    }

    async fn inspect(&self, name: &LinkName) -> Result<Option<Link>, HostError> {
        self.verb("inspect link", name.as_str(), |state| Ok(state.links.get(name).cloned())).await
    }

    async fn create(&self, plan: &LinkPlan) -> Result<(), HostError> {
        self.verb("create link", plan.name.as_str(), |state| create(state, plan)).await?;
        self.announce(&plan.owner);
        Ok(())
    }

    async fn change(&self, name: &LinkName, change: &LinkChange) -> Result<(), HostError> {
        self.verb("change link", name.as_str(), |state| apply(state, name, change)).await
    }

    async fn remove(&self, name: &LinkName) -> Result<(), HostError> {
        self.verb("remove link", name.as_str(), |state| {
            if state.foreign_links.contains(name) {
                return Err(conflict("remove link", name));
            }
            state.remove_link(name);
            Ok(())
        })
        .await
    }

    async fn routes(&self) -> Result<Routes, HostError> {
        self.verb("list", "routes", |state| {
            let link_routes = state.links.values().filter(|link| link.is_up).flat_map(|link| {
                let name = link.name.clone();
                link.addresses
                    .iter()
                    .map(move |address| Route { destination: address.subnet(), link: Some(name.clone()) })
            });
            let routes = state.routes.iter().cloned().chain(link_routes).collect();
            Ok(Routes { routes, uplink_mtu: None })
        })
        .await
    }

    async fn forwarding(&self) -> Result<Forwarding, HostError> {
        self.verb("read", "forwarding", |state| Ok(state.forwarding)).await
    }

    async fn set_forwarding(&self) -> Result<(), HostError> {
        self.verb("set", "forwarding", |state| {
            if state.forwarding == Forwarding::Off {
                state.forwarding = Forwarding::ForGuests;
            }
            Ok(())
        })
        .await
    }
}

impl State {
    /// Removes a link; a removed bridge releases its ports.
    pub(super) fn remove_link(&mut self, name: &LinkName) {
        self.links.remove(name);
        self.lose_shaping(name);
        self.lose_card(name);
        // A removed TAP leaves its VMM with a dead descriptor.
        for vmm in self.machines.values_mut().filter(|vmm| vmm.tap.as_ref() == Some(name)) {
            vmm.is_network_cut = true;
        }
        for link in self.links.values_mut() {
            if link.master.as_ref() == Some(name) {
                link.master = None;
                link.is_isolated = false;
            }
        }
    }
}

fn conflict(operation: &'static str, name: &LinkName) -> HostError {
    HostError::new(HostErrorKind::Conflict, operation, name.as_str()).because("it is not ours")
}

fn create(state: &mut State, plan: &LinkPlan) -> Result<(), HostError> {
    if state.foreign_links.contains(&plan.name) {
        return Err(conflict("create link", &plan.name));
    }
    state.links.entry(plan.name.clone()).or_insert_with(|| Link {
        name: plan.name.clone(),
        owner: plan.owner.clone(),
        kind: plan.kind,
        master: None,
        is_up: false,
        is_isolated: false,
        addresses: Vec::new(),
    });
    Ok(())
}

fn apply(state: &mut State, name: &LinkName, change: &LinkChange) -> Result<(), HostError> {
    let missing = |what: &LinkName| HostError::new(HostErrorKind::Missing, "change link", what.as_str());
    if let LinkChange::Master(bridge) = change {
        let is_bridge = state.links.get(bridge).is_some_and(|link| link.kind == LinkKind::Bridge);
        if !is_bridge {
            return Err(missing(bridge));
        }
    }
    let link = state.links.get_mut(name).ok_or_else(|| missing(name))?;
    match change {
        LinkChange::Up => link.is_up = true,
        LinkChange::Master(bridge) => link.master = Some(bridge.clone()),
        LinkChange::Isolated if link.master.is_none() => return Err(missing(name)),
        LinkChange::Isolated => link.is_isolated = true,
        LinkChange::AddAddress(address) if link.addresses.contains(address) => {}
        LinkChange::AddAddress(address) => link.addresses.push(*address),
        LinkChange::RemoveAddress(address) => link.addresses.retain(|other| other != address),
    }
    Ok(())
}
