//! The schedule reconciler: it takes snapshots of an instance when they are due, and removes old ones.
//!
//! Guarantees: each run is carried out once, whatever crashes and however the clock is set. After missed runs
//! only the last one is carried out late. Only snapshots of this very schedule are ever deleted.
//! Assumes: the snapshot reconciler takes a snapshot once it is requested.
//! Never: waits for a snapshot, or takes a second snapshot while the first is in progress.
//! Cancel/crash: a snapshot records the run that it belongs to, so a snapshot that was requested already is
//! recognised.
//!
//! ```text
//! waits --(due)--> Take --(recorded)--> waits      more snapshots than it keeps: --Prune--> fewer
//! deleted: the record goes; its snapshots stay
//! ```

pub mod admission;
mod observe;
mod plan;
mod status;
#[cfg(test)]
mod tests;

use jiff::Timestamp;
use stead_schemas::meta::{Object, Tags};
use stead_schemas::names::Uid;
use stead_schemas::schedule::{SnapshotSchedule, SnapshotScheduleStatus};
use stead_schemas::snapshot::{ScheduledRun, SnapshotKind};

use crate::host::{HostError, HostErrorKind};
use crate::runtime::{Desired, Moment, PassEnd, Plan, Reconciler};
use crate::store::{Store, TransactError};

use admission::NotTaken;
pub use observe::{Observed, Source, Taken};

/// Capabilities of the schedule reconciler. It does not use the host; the snapshot reconciler does.
#[derive(Debug)]
pub struct ScheduleReconciler {
    pub store: Store,
}

/// A single step of a schedule.
#[derive(Debug, Clone, PartialEq, Eq, strum::IntoStaticStr, strum::VariantNames)]
pub enum Action {
    /// Requests a snapshot.
    Take(Box<TakePlan>),
    /// Requests the deletion of a snapshot.
    Prune(Uid),
}

/// The parameters of a snapshot that is due.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TakePlan {
    pub instance: Uid,
    pub kind: SnapshotKind,
    pub run: ScheduledRun,
    pub name: String,
    pub tags: Tags,
}

impl ScheduleReconciler {
    async fn take(&self, plan: &TakePlan) -> Result<(), HostError> {
        let moved = plan.clone();
        let taken = self.store.transact(move |tx| admission::take(tx, &moved)).await;
        taken.map_err(|error| {
            let kind = match &error {
                TransactError::Refused(NotTaken { kind, .. }) => *kind,
                TransactError::Store(_) => HostErrorKind::Transient,
            };
            let why = match error {
                TransactError::Refused(refused) => refused.message,
                TransactError::Store(error) => error.to_string(),
            };
            HostError::new(kind, "take a snapshot of", plan.instance.as_str()).because(why)
        })
    }

    async fn prune(&self, snapshot: &Uid) -> Result<(), HostError> {
        let moved = snapshot.clone();
        let pruned = self.store.transact(move |tx| admission::prune(tx, &moved)).await;
        pruned.map_err(|error| {
            let failed = HostError::new(HostErrorKind::Transient, "delete the snapshot", snapshot.as_str());
            failed.because(error.to_string())
        })
    }
}

impl Reconciler for ScheduleReconciler {
    type Kind = SnapshotSchedule;
    type Observed = Observed;
    type Action = Action;

    async fn observe(
        &self,
        uid: &Uid,
        object: Option<&Object<SnapshotSchedule>>,
    ) -> Result<Observed, HostError> {
        Ok(observe::observe(&self.store, uid, object))
    }

    fn plan(desired: &Desired<'_, SnapshotSchedule>, seen: &Observed, now: Moment) -> Plan<Action> {
        plan::plan(desired, seen, now)
    }

    async fn act(&self, action: &Action) -> Result<(), HostError> {
        match action {
            Action::Take(plan) => self.take(plan).await,
            Action::Prune(snapshot) => self.prune(snapshot).await,
        }
    }

    fn status(
        object: &Object<SnapshotSchedule>,
        seen: Option<&Observed>,
        end: &PassEnd,
    ) -> SnapshotScheduleStatus {
        status::status(object, seen, end)
    }

    fn next_poll(object: &Object<SnapshotSchedule>, now: Timestamp) -> Option<Timestamp> {
        object.status.next_poll.filter(|&at| at > now && !object.meta.is_deleting())
    }

    /// Returns no uids, because nothing of this kind is on the host.
    async fn owned(&self) -> Result<Vec<Uid>, HostError> {
        Ok(Vec::new())
    }
}
