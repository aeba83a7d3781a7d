//! The snapshot reconciler: one directory of files that hold one moment of an instance.
//!
//! Guarantees: a snapshot is captured once, from the run that was asked for, or fails and says why; it
//! is Ready only when all of it is durable. One that only serves a fork goes by itself when the fork
//! has what it needs. A snapshot that was never taken gives its name up at once and is removed after a while,
//! whether or not a client waits for it. A pool has as many members as wished, each an instance that is restored and held.
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

use std::sync::Arc;

use jiff::Timestamp;
use stead_schemas::compression::Compression;
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;
use stead_schemas::snapshot::{Snapshot, SnapshotStatus};

use crate::host::{CapturePlan, Host, HostError, HostErrorKind, Snapshots};
use crate::runtime::{Desired, Moment, PassEnd, Plan, Reconciler};
use crate::store::{Store, Tx};

pub use observe::{Observed, Source};

/// Capabilities of the snapshot reconciler.
#[derive(Debug)]
pub struct SnapshotReconciler<H> {
    pub host: H,
    pub store: Store,
    pub pools: Pools,
}

/// How members of pools come and go: the rules of instances, which this kind does not know.
#[derive(Clone)]
pub struct Pools(pub Arc<Tend>);

/// Brings the members of a snapshot's pool in line with its wish; a refusal says why.
pub type Tend = dyn Fn(&mut Tx<'_>, &Uid) -> Result<(), String> + Send + Sync;

impl std::fmt::Debug for Pools {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pools").finish_non_exhaustive()
    }
}

/// One step on a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, strum::IntoStaticStr, strum::VariantNames)]
pub enum Action {
    Capture(Box<CapturePlan>),
    Compress(Uid, Compression),
    Remove(Uid),
    /// Nobody needs it any more, or it failed a while ago: its deletion is asked for.
    Expire(Uid),
    /// One member of the pool more, or one less.
    TendPool(Uid),
}

impl<H> SnapshotReconciler<H> {
    async fn expire(&self, uid: &Uid) -> Result<(), HostError> {
        let of_transaction = uid.clone();
        let expired = self.store.transact(move |tx| admission::delete(tx, &of_transaction)).await;
        expired.map(drop).map_err(|error| {
            let failed = HostError::new(HostErrorKind::Transient, "delete the spent snapshot", uid.as_str());
            failed.because(error.to_string())
        })
    }
}

impl<H> SnapshotReconciler<H> {
    async fn tend(&self, uid: &Uid) -> Result<(), HostError> {
        let failed = |why: String| {
            HostError::new(HostErrorKind::Transient, "tend the pool of", uid.as_str()).because(why)
        };
        let (Pools(tend), of_transaction) = (self.pools.clone(), uid.clone());
        let tended = self.store.transact(move |tx| tend(tx, &of_transaction)).await;
        tended.map_err(|error| failed(error.to_string()))
    }
}

impl<H: Host> Reconciler for SnapshotReconciler<H> {
    type Kind = Snapshot;
    type Observed = Observed;
    type Action = Action;

    async fn observe(&self, uid: &Uid, object: Option<&Object<Snapshot>>) -> Result<Observed, HostError> {
        observe::observe(self, uid, object).await
    }

    fn plan(desired: &Desired<'_, Snapshot>, seen: &Observed, now: Moment) -> Plan<Action> {
        plan::plan(desired, seen, now)
    }

    async fn act(&self, action: &Action) -> Result<(), HostError> {
        match action {
            Action::Capture(plan) => self.host.snapshots().capture(plan).await,
            Action::Compress(uid, how) => self.host.snapshots().compress(uid, *how).await,
            Action::Remove(uid) => self.host.snapshots().remove(uid).await,
            Action::Expire(uid) => self.expire(uid).await,
            Action::TendPool(uid) => self.tend(uid).await,
        }
    }

    fn status(object: &Object<Snapshot>, seen: Option<&Observed>, end: &PassEnd) -> SnapshotStatus {
        status::status(object, seen, end)
    }

    fn next_look(object: &Object<Snapshot>, now: Timestamp) -> Option<Timestamp> {
        plan::next_look(object, now)
    }

    async fn owned(&self) -> Result<Vec<Uid>, HostError> {
        self.host.snapshots().list().await
    }
}
