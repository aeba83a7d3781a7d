//! The snapshot reconciler: one directory of files that hold one moment of an instance.
//!
//! Guarantees: a snapshot is captured once, from the run that was asked for, or fails and says why; it
//! is Ready only when all of it is durable. One that only serves a fork goes by itself when the fork
//! has what it needs.
//! Assumes: the source is brought back to its wish by its own reconciler, whatever a capture left.
//! Never: takes a second look at the source once it is captured, or captures over one that was lost:
//! the moment is gone.
//! Cancel/crash: what a capture leaves counts as nothing and is replaced by the next.

pub mod admission;
mod observe;
mod plan;
mod status;
#[cfg(test)]
mod tests;

use jiff::Timestamp;
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;
use stead_schemas::snapshot::{Snapshot, SnapshotStatus};

use crate::host::{CapturePlan, Disks, HostError, HostErrorKind, Machines, Snapshots};
use crate::runtime::{Desired, PassEnd, Plan, Reconciler};
use crate::store::Store;

pub use observe::{Observed, Source};

/// Capabilities of the snapshot reconciler.
#[derive(Debug)]
pub struct SnapshotReconciler<S, M, D> {
    pub snapshots: S,
    pub machines: M,
    pub disks: D,
    pub store: Store,
}

/// One step on a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    Capture(Box<CapturePlan>),
    Remove(Uid),
    /// Nobody needs it any more: its deletion is asked for.
    Expire(Uid),
}

impl<S, M, D> SnapshotReconciler<S, M, D> {
    async fn expire(&self, uid: &Uid) -> Result<(), HostError> {
        let of_transaction = uid.clone();
        let expired = self.store.transact(move |tx| admission::delete(tx, &of_transaction)).await;
        expired.map_err(|error| {
            let failed = HostError::new(HostErrorKind::Transient, "delete the spent snapshot", uid.as_str());
            failed.because(error.to_string())
        })
    }
}

impl<S: Snapshots, M: Machines, D: Disks> Reconciler for SnapshotReconciler<S, M, D> {
    type Kind = Snapshot;
    type Observed = Observed;
    type Action = Action;

    const ACTIONS: &'static [&'static str] = &["Capture", "Remove", "Expire"];

    async fn observe(&self, uid: &Uid, object: Option<&Object<Snapshot>>) -> Result<Observed, HostError> {
        observe::observe(self, uid, object).await
    }

    fn plan(desired: &Desired<'_, Snapshot>, seen: &Observed, now: Timestamp) -> Plan<Action> {
        plan::plan(desired, seen, now)
    }

    fn action_name(action: &Action) -> &'static str {
        match action {
            Action::Capture(_) => "Capture",
            Action::Remove(_) => "Remove",
            Action::Expire(_) => "Expire",
        }
    }

    async fn act(&self, action: &Action) -> Result<(), HostError> {
        match action {
            Action::Capture(plan) => self.snapshots.capture(plan).await,
            Action::Remove(uid) => self.snapshots.remove(uid).await,
            Action::Expire(uid) => self.expire(uid).await,
        }
    }

    fn status(object: &Object<Snapshot>, seen: Option<&Observed>, end: &PassEnd) -> SnapshotStatus {
        status::status(object, seen, end)
    }

    async fn owned(&self) -> Result<Vec<Uid>, HostError> {
        self.snapshots.list().await
    }
}
