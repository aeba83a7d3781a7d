//! The mediator reconciler: the process that carries the connections of guests whose egress is mediated.
//!
//! Guarantees: the process runs while an instance has a policy, with the settings of the spec and the program of this
//! daemon. Nothing leaves a mediated guest while it does not run: the firewall leads everything to its ports.
//! Cancel/crash: a process is found again by its mark; its policies are put again by their own reconciler.
//!
//! ```text
//! a policy exists: nothing --Launch--> process --(other program, other settings, silent) Retire--> nothing
//! none exists, or deleted: --Retire--> nothing
//! ```

pub mod admission;
mod observe;
mod plan;
mod status;
#[cfg(test)]
mod tests;

use jiff::Timestamp;
use stead_schemas::egress::MediatorSettings;
use stead_schemas::limits::MEDIATOR_POLL_INTERVAL;
use stead_schemas::mediation::{Mediator, MediatorStatus};
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;

use crate::host::{Host, HostError, Mediators};
use crate::runtime::{Desired, Moment, PassEnd, Plan, Reconciler, after};
use crate::store::Store;

pub use observe::Observed;

/// Capabilities of the mediator reconciler.
#[derive(Debug)]
pub struct MediatorReconciler<H> {
    pub host: H,
    /// The store, which is only read: it shows whether there are policies.
    pub store: Store,
}

/// A single step on the process.
#[derive(Debug, Clone, PartialEq, Eq, strum::IntoStaticStr, strum::VariantNames)]
pub enum Action {
    Launch { owner: Uid, settings: MediatorSettings },
    Retire(Uid),
}

impl<H: Host> Reconciler for MediatorReconciler<H> {
    type Kind = Mediator;
    type Observed = Observed;
    type Action = Action;

    async fn observe(&self, uid: &Uid, object: Option<&Object<Mediator>>) -> Result<Observed, HostError> {
        observe::observe(self, uid, object).await
    }

    fn plan(desired: &Desired<'_, Mediator>, seen: &Observed, now: Moment) -> Plan<Action> {
        plan::plan(desired, seen, now)
    }

    async fn act(&self, action: &Action) -> Result<(), HostError> {
        let mediators = self.host.mediators();
        match action {
            Action::Launch { owner, settings } => mediators.launch(owner, settings).await,
            Action::Retire(owner) => mediators.retire(owner).await,
        }
    }

    fn status(object: &Object<Mediator>, seen: Option<&Observed>, end: &PassEnd) -> MediatorStatus {
        status::status(object, seen, end)
    }

    fn next_poll(object: &Object<Mediator>, now: Timestamp) -> Option<Timestamp> {
        // Nothing reports that a process has stopped to answer.
        let runs = object.status.pid.is_some();
        runs.then(|| after(now, MEDIATOR_POLL_INTERVAL))
    }

    async fn owned(&self) -> Result<Vec<Uid>, HostError> {
        self.host.mediators().list().await
    }
}
