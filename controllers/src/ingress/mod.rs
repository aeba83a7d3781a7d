//! The ingress reconciler: the ports of this host at which the rules of an ingress are served.
//!
//! Guarantees: the served rules are the stored ones. A port that several ingresses need is opened once, and
//! closed when none needs it. A port that another program has is reported, is opened when it is free, and
//! delays no other port.
//! Never: observes instances. The instance of a request is looked up when the request arrives (`reach`).
//! Cancel/crash: listening ends with the daemon, so the next daemon begins without ports.
//!
//! ```text
//! nothing --Open each port--> served --(rules changed) Open--> served      deleted: --Close--> nothing
//! port taken by another program: reported, and tried again
//! ```

pub mod admission;
mod observe;
mod plan;
mod reach;
mod routes;
mod status;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use stead_schemas::ingress::{Ingress, IngressRule, IngressStatus};
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;

use crate::host::{Host, HostError, Listeners};
use crate::runtime::{Desired, Moment, PassEnd, Plan, Reconciler};

pub use observe::Observed;
pub use reach::{Reach, reach};
pub use routes::{Found, Routes};

/// Capabilities of the ingress reconciler.
#[derive(Debug)]
pub struct IngressReconciler<H> {
    pub host: H,
}

/// A single step at a port.
#[derive(Debug, Clone, PartialEq, Eq, strum::IntoStaticStr, strum::VariantNames)]
pub enum Action {
    Close { owner: Uid, port: u16 },
    Open { owner: Uid, port: u16, rules: Vec<IngressRule> },
}

impl<H: Host> Reconciler for IngressReconciler<H> {
    type Kind = Ingress;
    type Observed = Observed;
    type Action = Action;

    async fn observe(&self, uid: &Uid, object: Option<&Object<Ingress>>) -> Result<Observed, HostError> {
        observe::observe(self, uid, object).await
    }

    fn plan(desired: &Desired<'_, Ingress>, seen: &Observed, now: Moment) -> Plan<Action> {
        plan::plan(desired, seen, now.at())
    }

    async fn act(&self, action: &Action) -> Result<(), HostError> {
        let listeners = self.host.listeners();
        match action {
            Action::Close { owner, port } => listeners.close(owner, *port).await,
            Action::Open { owner, port, rules } => listeners.open(owner, *port, rules).await,
        }
    }

    fn status(object: &Object<Ingress>, seen: Option<&Observed>, end: &PassEnd) -> IngressStatus {
        status::status(object, seen, end)
    }

    async fn owned(&self) -> Result<Vec<Uid>, HostError> {
        self.host.listeners().list().await
    }
}

/// Returns the rules at each port.
fn by_port(rules: &[IngressRule]) -> BTreeMap<u16, Vec<IngressRule>> {
    let mut ports: BTreeMap<u16, Vec<IngressRule>> = BTreeMap::new();
    for rule in rules {
        ports.entry(rule.port).or_default().push(rule.clone());
    }
    ports
}
