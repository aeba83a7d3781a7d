//! Forks: instances whose disk, and possibly memory, begin as those of a snapshot. Checks and allocations are
//! all within the commit that stores the spec.
//!
//! Guarantees: a refused request stages nothing. The origin of a fork is chosen here, once, and the
//! reconcilers of disks and VMs carry it out whatever crashes in between.

use std::sync::Arc;

use stead_schemas::instance::{Instance, Power, State};
use stead_schemas::meta::{Object, Tags};
use stead_schemas::names::{Name, Uid};
use stead_schemas::snapshot::{Snapshot, SnapshotKind, SnapshotPurpose};

use super::capabilities::Declared;
use super::from_snapshot::{Goal, NewFork, Target, begin_at, goal, ready};
use super::{declared, live, pool};
use crate::node::admission::{self as nodes, check_verb, within_room};
use crate::refused::Refused;
use crate::snapshot::admission as snapshots;
use crate::store::Tx;

/// A request to fork an instance.
#[derive(Debug, Clone)]
pub struct ForkRequest {
    pub name: Name,
    /// True if the source may be running.
    pub from_running: bool,
    /// The desired power state of the fork; `None` means the state of the source.
    pub target: Option<Power>,
}

/// A fork, and the snapshot that it begins with. The snapshot is `None` if the fork takes a pooled instance,
/// which has begun already.
#[derive(Debug, Clone)]
pub struct Forked {
    pub instance: Arc<Object<Instance>>,
    pub snapshot: Option<Uid>,
}

/// Forks an instance in its present state. A snapshot of it is taken for the fork and removed afterwards.
///
/// # Errors
/// Returns `NotFound`, `InvalidState`, `NameTaken`, `Invalid` or `NoRoom`.
pub fn fork(
    tx: &mut Tx<'_>,
    source: &Uid,
    request: ForkRequest,
    tap_prefix: &str,
) -> Result<Forked, Refused> {
    within_room(tx, |tx| stage(tx, source, request, tap_prefix))
}

fn stage(tx: &mut Tx<'_>, source: &Uid, request: ForkRequest, tap_prefix: &str) -> Result<Forked, Refused> {
    let object = live(tx, source)?;
    let state = object.status.state;
    let (kind, target) = match state {
        State::Running | State::Paused if object.spec.power == Power::Running && request.from_running => {
            (SnapshotKind::Standby, Power::Running)
        }
        State::Standby => (SnapshotKind::Standby, Power::Standby),
        State::Stopped => (SnapshotKind::Stopped, Power::Stopped),
        _ => {
            let legal = "Stopped, Standby, or Running with from_running";
            return Err(Refused::state("fork", state, legal));
        }
    };
    if kind == SnapshotKind::Standby {
        let Declared { hypervisor, has } = declared(tx, object.spec.hypervisor)?;
        check_verb(hypervisor, has.standby && has.fork_memory, "a fork of an instance that is not Stopped")?;
    }
    let purpose = SnapshotPurpose::Fork;
    let fork_snapshot = snapshots::CreateRequest {
        kind,
        name: None,
        tags: Tags::new(),
        purpose,
        compression: None,
        pool: 0,
        schedule: None,
    };
    let snapshot = snapshots::create(tx, source, fork_snapshot)?;
    let tags = object.meta.tags.clone();
    let target = Target { power: Some(request.target.unwrap_or(target)), hypervisor: None };
    let node = nodes::local(tx)?;
    let goal = goal(&node, &snapshot, target)?;
    let instance = begin(tx, &snapshot, request.name, tags, goal, tap_prefix)?;
    Ok(Forked { instance, snapshot: Some(snapshot.meta.uid.clone()) })
}

/// Forks a snapshot.
///
/// # Errors
/// Returns `NotFound`, `Conflict` unless the snapshot is ready, `NameTaken`, `Invalid` or
/// `NoRoom`.
pub fn fork_snapshot(
    tx: &mut Tx<'_>,
    snapshot: &Uid,
    name: Name,
    target: Target,
    tap_prefix: &str,
) -> Result<Forked, Refused> {
    let snapshot = ready(tx, snapshot)?;
    let node = nodes::local(tx)?;
    let goal = goal(&node, &snapshot, target)?;
    let warm = match goal.power {
        Power::Running => pool::find_warm(tx, &snapshot.meta.uid),
        Power::Stopped | Power::Standby | Power::Warm => None,
    };
    if let Some(pooled) = warm {
        return Ok(Forked { instance: pool::take(tx, &pooled, name)?, snapshot: None });
    }
    let instance = within_room(tx, |tx| begin(tx, &snapshot, name, Tags::new(), goal, tap_prefix))?;
    Ok(Forked { instance, snapshot: Some(snapshot.meta.uid.clone()) })
}

/// Creates an instance that begins with a snapshot. The snapshot may still have to be taken.
fn begin(
    tx: &mut Tx<'_>,
    snapshot: &Object<Snapshot>,
    name: Name,
    tags: Tags,
    goal: Goal,
    tap_prefix: &str,
) -> Result<Arc<Object<Instance>>, Refused> {
    let new_fork = NewFork { uid: tx.next_uid(), name, tags, owner: None };
    begin_at(tx, snapshot, new_fork, goal, tap_prefix)
}
