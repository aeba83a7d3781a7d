//! Pools of a snapshot: instances that are restored in advance and held, so that a fork only takes one of
//! them.

use std::sync::Arc;

use stead_schemas::instance::{Instance, InstanceSpec, Power, PowerCause};
use stead_schemas::meta::{Kind, Object, OwnerRef, Tags};
use stead_schemas::names::{Name, Uid};
use stead_schemas::snapshot::{Snapshot, SnapshotPhase};

use super::from_snapshot::{Goal, NewFork, begin_at, ready};
use super::power::set_power;
use crate::node::admission::within_room;
use crate::refused::Refused;
use crate::store::Tx;

/// Returns a pooled instance of a snapshot that a fork may take.
pub(super) fn find_warm(tx: &Tx<'_>, snapshot: &Uid) -> Option<Arc<Object<Instance>>> {
    all_pooled(tx, snapshot).into_iter().find(|pooled| pooled.is_warm())
}

/// Turns a pooled instance into a fork, which continues to run.
pub(super) fn take(
    tx: &mut Tx<'_>,
    pooled: &Object<Instance>,
    name: Name,
) -> Result<Arc<Object<Instance>>, Refused> {
    let (uid, now) = (&pooled.meta.uid, tx.now());
    tx.release_as::<Instance>(uid, name, Tags::new())?;
    let run_on = |spec: &mut InstanceSpec| set_power(spec, Power::Running, PowerCause::Client, now);
    Ok(tx.update_spec::<Instance>(uid, None, run_on)?)
}

/// Returns the pooled instances of a snapshot.
fn all_pooled(tx: &Tx<'_>, snapshot: &Uid) -> Vec<Arc<Object<Instance>>> {
    let mut owned = tx.owned_by::<Instance>(snapshot);
    owned.retain(|pooled| pooled.is_pooled() && !pooled.meta.is_deleting());
    owned
}

/// Scales the pool by one instance towards the desired size. The desired size of a failed snapshot is zero,
/// because no fork could take its pooled instances.
///
/// # Errors
/// Returns the errors of a fork.
pub fn scale(tx: &mut Tx<'_>, snapshot: &Uid, tap_prefix: &str) -> Result<(), Refused> {
    let failed = tx.get::<Snapshot>(snapshot).filter(|found| found.status.phase == SnapshotPhase::Failed);
    let is_given_up = failed.is_some();
    let snapshot = failed.map_or_else(|| ready(tx, snapshot), Ok)?;
    let desired = if is_given_up { 0 } else { usize::try_from(snapshot.spec.pool).unwrap_or(usize::MAX) };
    let all_pooled = all_pooled(tx, &snapshot.meta.uid);
    if all_pooled.len() > desired {
        // An instance that is not ready is removed first.
        let spare = all_pooled.iter().find(|pooled| !pooled.is_warm()).or(all_pooled.first());
        if let Some(spare) = spare {
            tx.request_deletion::<Instance>(&spare.meta.uid)?;
        }
    } else if all_pooled.len() < desired {
        let uid = tx.next_uid();
        let name = Name::from(&uid);
        let pool_owner = OwnerRef { kind: Snapshot::NAME.to_owned(), uid: snapshot.meta.uid.clone() };
        let new_fork = NewFork { uid, name, tags: Tags::new(), owner: Some(pool_owner) };
        let goal = Goal { power: Power::Warm, hypervisor: snapshot.spec.instance.hypervisor };
        within_room(tx, |tx| begin_at(tx, &snapshot, new_fork, goal, tap_prefix))?;
    }
    Ok(())
}
