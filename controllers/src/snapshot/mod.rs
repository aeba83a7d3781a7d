//! The snapshot reconciler: one directory of files that hold an instance at one moment.
//!
//! Guarantees: a snapshot is captured once, from the requested run, or fails with a reason. It is Ready only
//! when all of it is durable. A snapshot that only serves a fork is removed automatically when the fork has
//! everything it needs. A snapshot that was never taken gives its name up at once and is removed after a
//! while, whether or not a client waits for it. A pool has the desired number of pooled instances; each is an
//! instance that is restored and held.
//! Assumes: the source's own reconciler brings it back to its spec, whatever state a capture left.
//! Never: observes the source again once it is captured, or captures again over a snapshot that was lost,
//! because its moment is gone.
//! Cancel/crash: the remainder of a cut-off capture has no value and is replaced by the next.
//!
//! ```text
//! Pending --Capture--> Ready --Compress--> Ready, compressed      Pending --(its moment is gone)--> Failed
//! Failed --(may be read for a while)--> Remove      of a fork: Ready --(the fork has everything)--> Remove
//! with a pool: Ready --ScalePool--> the desired number of pooled instances
//! ```

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

/// The operation that scales pools. It follows the rules of instances, which this kind does not know.
#[derive(Clone)]
pub struct Pools(pub Arc<PoolScaler>);

/// A function that scales the pool of a snapshot towards its spec. A refusal gives the reason.
pub type PoolScaler = dyn Fn(&mut Tx<'_>, &Uid) -> Result<(), String> + Send + Sync;

impl std::fmt::Debug for Pools {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pools").finish_non_exhaustive()
    }
}

/// A single step on a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, strum::IntoStaticStr, strum::VariantNames)]
pub enum Action {
    Capture(Box<CapturePlan>),
    Compress(Uid, Compression),
    Remove(Uid),
    /// Requests the deletion of a snapshot that is no longer needed, or that failed a while ago.
    Expire(Uid),
    /// Adds one pooled instance or removes one.
    ScalePool(Uid),
}

impl<H> SnapshotReconciler<H> {
    async fn expire(&self, uid: &Uid) -> Result<(), HostError> {
        let moved = uid.clone();
        let expired = self.store.transact(move |tx| admission::delete(tx, &moved)).await;
        expired.map(drop).map_err(|error| {
            let failed = HostError::new(HostErrorKind::Transient, "delete the spent snapshot", uid.as_str());
            failed.because(error.to_string())
        })
    }
}

impl<H> SnapshotReconciler<H> {
    async fn scale(&self, uid: &Uid) -> Result<(), HostError> {
        let failed = |why: String| {
            HostError::new(HostErrorKind::Transient, "tend the pool of", uid.as_str()).because(why)
        };
        let (Pools(scale), moved) = (self.pools.clone(), uid.clone());
        let scaled = self.store.transact(move |tx| scale(tx, &moved)).await;
        scaled.map_err(|error| failed(error.to_string()))
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
            Action::ScalePool(uid) => self.scale(uid).await,
        }
    }

    fn status(object: &Object<Snapshot>, seen: Option<&Observed>, end: &PassEnd) -> SnapshotStatus {
        status::status(object, seen, end)
    }

    fn next_poll(object: &Object<Snapshot>, now: Timestamp) -> Option<Timestamp> {
        plan::next_poll(object, now)
    }

    async fn owned(&self) -> Result<Vec<Uid>, HostError> {
        self.host.snapshots().list().await
    }
}
