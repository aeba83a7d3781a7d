//! The reconciler of network cards (nics): one TAP per instance, isolated on the bridge of its network, and the
//! rule that allows only the instance's addresses to send through it. The TAP is released while the VM is down.
//!
//! Guarantees: a TAP is set up only when it is isolated and its rule is loaded, so that a guest never sends
//! with a foreign address. The rule of a nic that is deleted is removed before its TAP.
//! Never: acts while the network is not ready.
//! Cancel/crash: a TAP is marked before it can outlive its maker. The release is recorded before the TAP is
//! removed, so that no VM is started at a TAP that is about to be removed.
//!
//! ```text
//! needed:   nothing --CreateTap--> TAP --Enslave, Isolate, AddRule, RaiseTap--> Ready
//! VM down:  Ready --(release recorded) RemoveTap--> addresses and rule only
//! deleted:  --RemoveRule, RemoveTap--> nothing
//! ```

pub(crate) mod admission;
mod need;
mod observe;
mod plan;
mod status;
#[cfg(test)]
mod tests;

use stead_schemas::meta::Object;
use stead_schemas::names::{LinkName, Uid};
use stead_schemas::network::{Nic, NicStatus};

use crate::host::{Firewall, Host, HostError, LinkChange, LinkKind, LinkPlan, Links, NicRule};
use crate::runtime::{Desired, Moment, PassEnd, Plan, Reconciler};
use crate::store::Store;

pub use observe::Observed;

/// Capabilities of the port reconciler.
#[derive(Debug)]
pub struct NicReconciler<H> {
    pub host: H,
    pub store: Store,
}

/// A single step on a TAP or its rule.
#[derive(Debug, Clone, PartialEq, Eq, strum::IntoStaticStr, strum::VariantNames)]
pub enum Action {
    CreateTap { name: LinkName, owner: Uid, has_queues: bool },
    Enslave { tap: LinkName, bridge: LinkName },
    Isolate(LinkName),
    AddRule { table: String, rule: NicRule },
    RaiseTap(LinkName),
    RemoveRule { table: String, rule: NicRule },
    RemoveTap(LinkName),
}

impl<H: Host> Reconciler for NicReconciler<H> {
    type Kind = Nic;
    type Observed = Observed;
    type Action = Action;

    async fn observe(&self, uid: &Uid, object: Option<&Object<Nic>>) -> Result<Observed, HostError> {
        observe::observe(self, uid, object).await
    }

    fn plan(desired: &Desired<'_, Nic>, seen: &Observed, now: Moment) -> Plan<Action> {
        plan::plan(desired, seen, now)
    }

    async fn act(&self, action: &Action) -> Result<(), HostError> {
        let (links, firewall) = (self.host.links(), self.host.firewall());
        match action {
            Action::CreateTap { name, owner, has_queues } => {
                let (name, owner, has_queues) = (name.clone(), owner.clone(), *has_queues);
                links.create(&LinkPlan { name, owner, kind: LinkKind::Tap, has_queues }).await
            }
            Action::Enslave { tap, bridge } => links.change(tap, &LinkChange::Master(bridge.clone())).await,
            Action::Isolate(tap) => links.change(tap, &LinkChange::Isolated).await,
            Action::AddRule { table, rule } => firewall.add_nic(table, rule).await,
            Action::RaiseTap(tap) => links.change(tap, &LinkChange::Up).await,
            Action::RemoveRule { table, rule } => firewall.remove_nic(table, rule).await,
            Action::RemoveTap(tap) => links.remove(tap).await,
        }
    }

    fn status(object: &Object<Nic>, _: Option<&Observed>, end: &PassEnd) -> NicStatus {
        status::status(object, end)
    }

    async fn owned(&self) -> Result<Vec<Uid>, HostError> {
        let links = self.host.links().list().await?.into_iter();
        Ok(links.filter(|link| link.kind == LinkKind::Tap).map(|link| link.owner).collect())
    }
}

/// Returns the only combination of addresses that may send through the port's TAP.
fn rule(object: &Object<Nic>) -> NicRule {
    let spec = &object.spec;
    NicRule { tap: spec.tap.clone(), mac: spec.mac, address: spec.address }
}
