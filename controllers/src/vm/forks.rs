//! Forks, and restores in place: instances whose disk, and perhaps memory, begin as those of a
//! snapshot. Checks and allocations, all within the commit that stores the wish.
//!
//! Guarantees: a refused request stages nothing; what a fork begins with is chosen here, once, and is
//! carried out by the reconcilers of disks and VMs whatever crashes in between.

use std::sync::Arc;

use stead_schemas::disk::{DiskPurpose, DiskSpec};
use stead_schemas::instance::{Instance, InstanceSpec, Origin, Power, State};
use stead_schemas::meta::{Object, Tags};
use stead_schemas::names::{Name, Uid};
use stead_schemas::snapshot::{Snapshot, SnapshotKind, SnapshotPhase, SnapshotPurpose};

use super::admission::{Refused, allocate, live, new_disk, owner};
use crate::snapshot::admission as snapshots;
use crate::store::{New, Tx};

/// Of a request to fork an instance.
#[derive(Debug, Clone)]
pub struct ForkWish {
    pub name: Name,
    /// The source may be running.
    pub from_running: bool,
    /// As the source is when nothing is said.
    pub target: Option<Power>,
}

/// A fork, and what it is made of.
#[derive(Debug, Clone)]
pub struct Forked {
    pub instance: Arc<Object<Instance>>,
    pub snapshot: Uid,
}

/// Forks an instance as it is now; a snapshot of it is taken for that, and goes afterwards.
///
/// # Errors
/// `NotFound`, `InvalidState`, `NameTaken`, `InvalidRequest`, `InsufficientResources`.
pub fn fork(tx: &mut Tx<'_>, source: &Uid, wish: ForkWish, tap_prefix: &str) -> Result<Forked, Refused> {
    let object = live(tx, source)?;
    let state = object.status.state;
    let (kind, target) = match state {
        State::Running | State::Paused if object.spec.power == Power::Running && wish.from_running => {
            (SnapshotKind::Standby, Power::Running)
        }
        State::Standby => (SnapshotKind::Standby, Power::Standby),
        State::Stopped => (SnapshotKind::Stopped, Power::Stopped),
        _ => {
            let legal = "Stopped, Standby, or Running with from_running";
            return Err(Refused::InvalidState { verb: "fork", state, legal });
        }
    };
    let purpose = SnapshotPurpose::Fork;
    let of_fork = snapshots::Wish { kind, name: None, tags: Tags::new(), purpose };
    let snapshot = snapshots::create(tx, source, of_fork)?;
    let tags = object.meta.tags.clone();
    let instance = begin(tx, &snapshot, wish.name, tags, wish.target.unwrap_or(target), tap_prefix)?;
    Ok(Forked { instance, snapshot: snapshot.meta.uid.clone() })
}

/// Forks a snapshot.
///
/// # Errors
/// `NotFound`, `Conflict` unless it is ready, `NameTaken`, `InvalidRequest`, `InsufficientResources`.
pub fn fork_snapshot(
    tx: &mut Tx<'_>,
    snapshot: &Uid,
    name: Name,
    target: Option<Power>,
    tap_prefix: &str,
) -> Result<Forked, Refused> {
    let snapshot = ready(tx, snapshot)?;
    let target = target.unwrap_or_else(|| default_target(snapshot.spec.kind));
    let instance = begin(tx, &snapshot, name, Tags::new(), target, tap_prefix)?;
    Ok(Forked { instance, snapshot: snapshot.meta.uid.clone() })
}

/// Restores an instance that is down to one of its snapshots: another disk takes the place of its
/// own, whose content is gone with it.
///
/// # Errors
/// `NotFound`, `InvalidState` unless it is down, `Conflict` unless the snapshot is ready,
/// `InvalidRequest`.
pub fn restore(
    tx: &mut Tx<'_>,
    uid: &Uid,
    snapshot: &Uid,
    target: Option<Power>,
) -> Result<Arc<Object<Instance>>, Refused> {
    let object = live(tx, uid)?;
    let snapshot = ready(tx, snapshot)?;
    if snapshot.spec.source != *uid {
        return Err(Refused::NotFound);
    }
    let (state, power) = (object.status.state, object.spec.power);
    let is_going = object.spec.run > object.status.ended_run;
    let is_down = match state {
        State::Stopped => power == Power::Stopped || !is_going,
        State::Standby => power == Power::Standby,
        _ => false,
    };
    if !is_down {
        return Err(Refused::InvalidState {
            verb: "restore a snapshot of",
            state,
            legal: "Stopped or Standby",
        });
    }
    let target = target.unwrap_or_else(|| default_target(snapshot.spec.kind));
    check_target(snapshot.spec.kind, target)?;
    let disk = new_disk(tx, owner(uid), disk_of(&snapshot))?;
    let earlier = object.spec.allocated.disk.clone();
    let now = tx.now();
    let changed = tx.update_spec::<Instance>(uid, None, |spec| {
        let kept = spec.clone();
        // The program and the board are the snapshot's; what is about the instance's life is its own.
        *spec = InstanceSpec {
            allocated: kept.allocated,
            restart: kept.restart,
            expires_at: kept.expires_at,
            power: target,
            power_since: now,
            run: kept.run + 1,
            standby: kept.standby + 1,
            is_forced: kept.is_forced,
            ..(*snapshot.spec.instance).clone()
        };
        spec.allocated.disk = disk;
        spec.origin = Some(origin(&snapshot, spec.standby, spec.run, target));
    })?;
    tx.request_deletion::<stead_schemas::disk::Disk>(&earlier)?;
    Ok(changed)
}

fn ready(tx: &Tx<'_>, uid: &Uid) -> Result<Arc<Object<Snapshot>>, Refused> {
    let snapshot = tx.get::<Snapshot>(uid).filter(|snapshot| !snapshot.meta.is_deleting());
    let snapshot = snapshot.ok_or(Refused::NotFound)?;
    match snapshot.status.phase {
        SnapshotPhase::Ready => Ok(snapshot),
        SnapshotPhase::Pending => Err(Refused::Conflict("the snapshot is still being taken".to_owned())),
        SnapshotPhase::Failed => {
            let why = snapshot.status.error.clone().unwrap_or_default();
            Err(Refused::Conflict(format!("the snapshot failed: {why}")))
        }
    }
}

fn default_target(kind: SnapshotKind) -> Power {
    match kind {
        SnapshotKind::Standby => Power::Running,
        SnapshotKind::Stopped => Power::Stopped,
    }
}

fn check_target(kind: SnapshotKind, target: Power) -> Result<(), Refused> {
    if kind == SnapshotKind::Stopped && target == Power::Standby {
        let message = "target_state cannot be Standby: there is no memory to keep";
        return Err(Refused::InvalidRequest(message.to_owned()));
    }
    Ok(())
}

fn disk_of(snapshot: &Object<Snapshot>) -> DiskSpec {
    let size = snapshot.spec.instance.overlay;
    DiskSpec { size, purpose: DiskPurpose::RootOverlay, source: Some(snapshot.meta.uid.clone()) }
}

fn origin(snapshot: &Object<Snapshot>, generation: u64, run: u64, target: Power) -> Origin {
    let has_memory = snapshot.spec.kind == SnapshotKind::Standby && target != Power::Stopped;
    let image_digest = snapshot.spec.image_digest.clone();
    Origin {
        snapshot: snapshot.meta.uid.clone(),
        image_digest,
        generation,
        memory_for_run: has_memory.then_some(run),
    }
}

/// A new instance that begins with a snapshot, which may still have to be taken.
fn begin(
    tx: &mut Tx<'_>,
    snapshot: &Object<Snapshot>,
    name: Name,
    tags: Tags,
    target: Power,
    tap_prefix: &str,
) -> Result<Arc<Object<Instance>>, Refused> {
    check_target(snapshot.spec.kind, target)?;
    let (uid, source) = (tx.next_uid(), &snapshot.spec.instance);
    let image = source.allocated.image.clone();
    let tap_prefix = source.has_network.then_some(tap_prefix);
    let allocated = allocate(tx, &uid, image, disk_of(snapshot), tap_prefix)?;
    let (run, standby) = (1, 1);
    let spec = InstanceSpec {
        power: target,
        power_since: tx.now(),
        run,
        standby,
        is_forced: false,
        // The source's end is its own.
        expires_at: None,
        origin: Some(origin(snapshot, standby, run, target)),
        allocated,
        ..(**source).clone()
    };
    Ok(tx.create::<Instance>(New { uid: Some(uid), name, tags, owner: None, spec })?)
}
