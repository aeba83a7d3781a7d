//! The network reconciler: a bridge with its gateway address, forwarding, and the base firewall.
//!
//! Guarantees: the firewall is loaded before the bridge is created, so that no packet passes unfiltered. A
//! subnet that overlaps a route of the host is refused before anything is made.
//! Never: takes over a link that is not ours, or turns forwarding off again (others may rely on it).
//! Cancel/crash: every step is recognised by its mark. The bridge is removed before the tables, so that a
//! bridge whose creation was interrupted is still removed with them.
//!
//! ```text
//! nothing --LoadFirewall--> tables --CreateBridge, AddAddress, RaiseBridge, Forward--> Ready
//! deleted: --RemoveBridge--> tables --RemoveFirewall--> nothing
//! ```

pub mod admission;
mod observe;
mod plan;
mod status;
#[cfg(test)]
mod tests;

use stead_schemas::meta::Object;
use stead_schemas::names::{LinkName, Uid};
use stead_schemas::network::{Cidr, Network, NetworkStatus};

use crate::host::{
    Firewall, FirewallRules, Forwarding, Host, HostError, LinkChange, LinkKind, LinkPlan, Links,
};
use crate::runtime::{Desired, Moment, PassEnd, Plan, Reconciler};
use crate::store::Store;

pub use observe::Observed;

/// Capabilities of the network reconciler.
#[derive(Debug)]
pub struct NetworkReconciler<H> {
    pub host: H,
    /// The store, which is only read: it shows which networks share a table.
    pub store: Store,
}

/// A single step on the bridge, the tables or the host's forwarding.
#[derive(Debug, Clone, PartialEq, Eq, strum::IntoStaticStr, strum::VariantNames)]
pub enum Action {
    LoadFirewall(FirewallRules),
    CreateBridge { name: LinkName, owner: Uid },
    AddAddress { bridge: LinkName, address: Cidr },
    RemoveAddress { bridge: LinkName, address: Cidr },
    RaiseBridge(LinkName),
    Forward,
    RemoveBridge(LinkName),
    RemoveFirewall { table: String },
}

impl<H: Host> Reconciler for NetworkReconciler<H> {
    type Kind = Network;
    type Observed = Observed;
    type Action = Action;

    async fn observe(&self, uid: &Uid, object: Option<&Object<Network>>) -> Result<Observed, HostError> {
        observe::observe(self, uid, object).await
    }

    fn plan(desired: &Desired<'_, Network>, seen: &Observed, now: Moment) -> Plan<Action> {
        plan::plan(desired, seen, now.at())
    }

    async fn act(&self, action: &Action) -> Result<(), HostError> {
        let (links, firewall) = (self.host.links(), self.host.firewall());
        match action {
            Action::LoadFirewall(rules) => firewall.replace(rules).await,
            Action::CreateBridge { name, owner } => {
                let (name, owner) = (name.clone(), owner.clone());
                links.create(&LinkPlan { name, owner, kind: LinkKind::Bridge, has_queues: false }).await
            }
            Action::AddAddress { bridge, address } => {
                links.change(bridge, &LinkChange::AddAddress(*address)).await
            }
            Action::RemoveAddress { bridge, address } => {
                links.change(bridge, &LinkChange::RemoveAddress(*address)).await
            }
            Action::RaiseBridge(bridge) => links.change(bridge, &LinkChange::Up).await,
            Action::Forward => links.set_forwarding().await,
            Action::RemoveBridge(bridge) => links.remove(bridge).await,
            Action::RemoveFirewall { table } => firewall.remove(table).await,
        }
    }

    fn status(object: &Object<Network>, seen: Option<&Observed>, end: &PassEnd) -> NetworkStatus {
        status::status(object, seen, end)
    }

    async fn owned(&self) -> Result<Vec<Uid>, HostError> {
        let links = self.host.links().list().await?.into_iter();
        Ok(links.filter(|link| link.kind == LinkKind::Bridge).map(|link| link.owner).collect())
    }
}

/// Returns the parameters of a network's base tables.
fn rules(object: &Object<Network>, forwarding: Forwarding) -> FirewallRules {
    let spec = &object.spec;
    FirewallRules {
        table: spec.table.clone(),
        bridge: spec.bridge.clone(),
        subnet: spec.gateway,
        dns: spec.dns.clone(),
        reach: spec.reach.clone(),
        is_for_guests_only: forwarding != Forwarding::ByHost,
        mediator: spec.mediator.clone(),
    }
}
