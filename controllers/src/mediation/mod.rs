//! The mediation reconciler: the policy of one instance in the process that carries its connections.
//!
//! Guarantees: the policy is in force before the VM of its instance runs, has the credentials of the instance's spec, and
//! is removed while the VM is down, which cuts its connections.
//! Never: writes a credential anywhere but to the process.
//! Cancel/crash: putting a policy again changes nothing. The release is recorded before the policy is removed, so that no
//! VM is started that is about to lose it.
//!
//! ```text
//! VM needed:  nothing --(process ready) Put--> in force --(spec changed) Put--> in force
//! VM down:    in force --(release recorded) Remove--> nothing, and the log is kept
//! deleted:    --Remove, DiscardLog--> nothing
//! ```

pub(crate) mod admission;
mod observe;
mod plan;
mod status;
#[cfg(test)]
mod tests;

use stead_schemas::egress::Policy;
use stead_schemas::mediation::{Mediation, MediationStatus};
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;

use crate::host::{Host, HostError, Policies};
use crate::runtime::{Desired, Moment, PassEnd, Plan, Reconciler};
use crate::store::Store;

pub use observe::Observed;

/// Capabilities of the mediation reconciler.
#[derive(Debug)]
pub struct MediationReconciler<H> {
    pub host: H,
    pub store: Store,
}

/// A single step on a policy or its log.
#[derive(Debug, Clone, PartialEq, Eq, strum::IntoStaticStr, strum::VariantNames)]
pub enum Action {
    Put(Box<Policy>),
    Remove(Uid),
    DiscardLog(Uid),
}

impl<H: Host> Reconciler for MediationReconciler<H> {
    type Kind = Mediation;
    type Observed = Observed;
    type Action = Action;

    async fn observe(&self, uid: &Uid, object: Option<&Object<Mediation>>) -> Result<Observed, HostError> {
        observe::observe(self, uid, object).await
    }

    fn plan(desired: &Desired<'_, Mediation>, seen: &Observed, _: Moment) -> Plan<Action> {
        plan::plan(desired, seen)
    }

    async fn act(&self, action: &Action) -> Result<(), HostError> {
        let policies = self.host.policies();
        match action {
            Action::Put(policy) => policies.put(policy).await,
            Action::Remove(owner) => policies.remove(owner).await,
            Action::DiscardLog(owner) => policies.discard_log(owner).await,
        }
    }

    fn status(object: &Object<Mediation>, _: Option<&Observed>, end: &PassEnd) -> MediationStatus {
        status::status(object, end)
    }

    async fn owned(&self) -> Result<Vec<Uid>, HostError> {
        self.host.policies().list().await
    }
}
