//! The reconciler of network cards (nics): one TAP per instance, isolated on the bridge of its network, the
//! rule that allows only the instance's addresses to send through it, and the limits of its traffic. The TAP is released
//! while the VM is down.
//!
//! Guarantees: a TAP is set up only when it is isolated, its rule is loaded and its traffic is limited, so that a guest
//! never sends with a foreign address or faster than it may. The rule of a nic that is deleted is removed before its TAP.
//! Never: acts while the network is not ready.
//! Cancel/crash: a TAP is marked before it can outlive its maker. The release is recorded before the TAP is
//! removed, so that no VM is started at a TAP that is about to be removed.
//!
//! ```text
//! needed:   nothing --CreateTap--> TAP --Enslave, Isolate, AddRule, (limits), RaiseTap--> Ready
//! limits:   download --Limit--> TAP; upload --CreateIfb, Limit, RaiseIfb--> IFB --Divert--> TAP
//! VM down:  Ready --(release recorded) RemoveTap, RemoveIfb--> addresses and rule only
//! deleted:  --RemoveRule, RemoveTap, RemoveIfb--> nothing
//! ```

pub(crate) mod admission;
mod need;
mod observe;
mod plan;
mod shaping;
mod status;
#[cfg(test)]
mod tests;

use stead_schemas::meta::Object;
use stead_schemas::names::{LinkName, Uid};
use stead_schemas::network::{Nic, NicStatus};
use stead_schemas::quantity::Rate;

use crate::host::{Firewall, Host, HostError, LinkChange, LinkKind, LinkPlan, Links, NicRule, Shapers};
use crate::runtime::{Desired, Moment, PassEnd, Plan, Reconciler};
use crate::store::Store;

pub use observe::Observed;

/// Capabilities of the port reconciler.
#[derive(Debug)]
pub struct NicReconciler<H> {
    pub host: H,
    pub store: Store,
}

/// A single step on a TAP, its rule or its limits.
#[derive(Debug, Clone, PartialEq, Eq, strum::IntoStaticStr, strum::VariantNames)]
pub enum Action {
    CreateTap {
        name: LinkName,
        owner: Uid,
        has_queues: bool,
    },
    Enslave {
        tap: LinkName,
        bridge: LinkName,
    },
    Isolate(LinkName),
    AddRule {
        table: String,
        rule: NicRule,
    },
    CreateIfb {
        name: LinkName,
        owner: Uid,
    },
    /// Sets the limit of what a TAP or an IFB sends; `None` removes it.
    Limit {
        link: LinkName,
        rate: Option<Rate>,
    },
    RaiseIfb(LinkName),
    /// Leads what a guest sends through an IFB; `None` leads it straight on.
    Divert {
        tap: LinkName,
        through: Option<LinkName>,
    },
    RaiseTap(LinkName),
    RemoveRule {
        table: String,
        rule: NicRule,
    },
    RemoveTap(LinkName),
    RemoveIfb(LinkName),
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
        let (links, firewall, shapers) = (self.host.links(), self.host.firewall(), self.host.shapers());
        match action {
            Action::CreateTap { name, owner, has_queues } => {
                let (name, owner, has_queues) = (name.clone(), owner.clone(), *has_queues);
                links.create(&LinkPlan { name, owner, kind: LinkKind::Tap, has_queues }).await
            }
            Action::Enslave { tap, bridge } => links.change(tap, &LinkChange::Master(bridge.clone())).await,
            Action::Isolate(tap) => links.change(tap, &LinkChange::Isolated).await,
            Action::AddRule { table, rule } => firewall.add_nic(table, rule).await,
            Action::CreateIfb { name, owner } => {
                let (name, owner) = (name.clone(), owner.clone());
                links.create(&LinkPlan { name, owner, kind: LinkKind::Ifb, has_queues: false }).await
            }
            Action::Limit { link, rate: Some(rate) } => shapers.limit(link, *rate).await,
            Action::Limit { link, rate: None } => shapers.unlimit(link).await,
            Action::Divert { tap, through: Some(through) } => shapers.divert(tap, through).await,
            Action::Divert { tap, through: None } => shapers.undivert(tap).await,
            Action::RaiseTap(link) | Action::RaiseIfb(link) => links.change(link, &LinkChange::Up).await,
            Action::RemoveRule { table, rule } => firewall.remove_nic(table, rule).await,
            Action::RemoveTap(link) | Action::RemoveIfb(link) => links.remove(link).await,
        }
    }

    fn status(object: &Object<Nic>, _: Option<&Observed>, end: &PassEnd) -> NicStatus {
        status::status(object, end)
    }

    async fn owned(&self) -> Result<Vec<Uid>, HostError> {
        let links = self.host.links().list().await?.into_iter();
        Ok(links.filter(|link| link.kind != LinkKind::Bridge).map(|link| link.owner).collect())
    }
}

/// Returns the only combination of addresses that may send through the port's TAP.
fn rule(object: &Object<Nic>) -> NicRule {
    let spec = &object.spec;
    NicRule { tap: spec.tap.clone(), mac: spec.mac, address: spec.address, lane: spec.lane }
}
