//! Forks, and restores in place: instances whose disk, and possibly memory, begin as those of a snapshot.
//! Checks and allocations are all within the commit that stores the spec.
//!
//! Guarantees: a refused request stages nothing. The origin of a fork is chosen here, once, and the
//! reconcilers of disks and VMs carry it out whatever crashes in between.

use std::sync::Arc;

use stead_schemas::disk::{DiskPurpose, DiskSpec};
use stead_schemas::instance::{Hypervisor, Instance, InstanceSpec, Origin, Power, PowerCause, State};
use stead_schemas::meta::{Kind, Object, OwnerRef, Tags};
use stead_schemas::names::{Name, Uid};
use stead_schemas::numbers::{RunNo, StandbyNo};
use stead_schemas::snapshot::{Snapshot, SnapshotKind, SnapshotPhase, SnapshotPurpose};

use super::admission::{Refused, allocate, live, new_disk, owner, set_power};
use super::mounts;
use crate::snapshot::admission as snapshots;
use crate::store::{New, Tx, absent};

/// A request to fork an instance.
#[derive(Debug, Clone)]
pub struct ForkWish {
    pub name: Name,
    /// True if the source may be running.
    pub from_running: bool,
    /// The desired power state of the fork; `None` means the state of the source.
    pub target: Option<Power>,
}

/// The requested end state of an instance that begins with a snapshot. A request may leave fields open.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Target {
    /// The desired power state; `None` means Running for a snapshot with memory, and Stopped otherwise.
    pub power: Option<Power>,
    /// The hypervisor; `None` means that of the snapshot.
    pub hypervisor: Option<Hypervisor>,
}

/// The resolved end state of an instance that begins with a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Goal {
    power: Power,
    hypervisor: Hypervisor,
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
/// Returns `NotFound`, `InvalidState`, `NameTaken`, `InvalidRequest` or `InsufficientResources`.
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
    let fork_snapshot = snapshots::Wish {
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
    let target = Target { power: Some(wish.target.unwrap_or(target)), hypervisor: None };
    let goal = goal(&snapshot, target)?;
    let instance = begin(tx, &snapshot, wish.name, tags, goal, tap_prefix)?;
    Ok(Forked { instance, snapshot: Some(snapshot.meta.uid.clone()) })
}

/// Forks a snapshot.
///
/// # Errors
/// Returns `NotFound`, `Conflict` unless the snapshot is ready, `NameTaken`, `InvalidRequest` or
/// `InsufficientResources`.
pub fn fork_snapshot(
    tx: &mut Tx<'_>,
    snapshot: &Uid,
    name: Name,
    target: Target,
    tap_prefix: &str,
) -> Result<Forked, Refused> {
    let snapshot = ready(tx, snapshot)?;
    let goal = goal(&snapshot, target)?;
    let warm = match goal.power {
        Power::Running => members(tx, &snapshot.meta.uid).into_iter().find(|member| member.is_warm()),
        Power::Stopped | Power::Standby | Power::Warm => None,
    };
    if let Some(member) = warm {
        return Ok(Forked { instance: take(tx, &member, name)?, snapshot: None });
    }
    let instance = begin(tx, &snapshot, name, Tags::new(), goal, tap_prefix)?;
    Ok(Forked { instance, snapshot: Some(snapshot.meta.uid.clone()) })
}

/// Turns a pooled instance into a fork, which continues to run.
fn take(tx: &mut Tx<'_>, member: &Object<Instance>, name: Name) -> Result<Arc<Object<Instance>>, Refused> {
    let (uid, now) = (&member.meta.uid, tx.now());
    tx.release_as::<Instance>(uid, name, Tags::new())?;
    let run_on = |spec: &mut InstanceSpec| set_power(spec, Power::Running, PowerCause::Client, now);
    Ok(tx.update_spec::<Instance>(uid, None, run_on)?)
}

/// Returns the pooled instances of a snapshot.
fn members(tx: &Tx<'_>, snapshot: &Uid) -> Vec<Arc<Object<Instance>>> {
    let mut owned = tx.owned_by::<Instance>(snapshot);
    owned.retain(|member| member.is_pooled() && !member.meta.is_deleting());
    owned
}

/// Scales the pool by one instance towards the desired size. The desired size of a failed snapshot is zero,
/// because no fork could take its pooled instances.
///
/// # Errors
/// Returns the errors of a fork.
pub fn tend(tx: &mut Tx<'_>, snapshot: &Uid, tap_prefix: &str) -> Result<(), Refused> {
    let failed = tx.get::<Snapshot>(snapshot).filter(|found| found.status.phase == SnapshotPhase::Failed);
    let is_given_up = failed.is_some();
    let snapshot = failed.map_or_else(|| ready(tx, snapshot), Ok)?;
    let desired = if is_given_up { 0 } else { usize::try_from(snapshot.spec.pool).unwrap_or(usize::MAX) };
    let members = members(tx, &snapshot.meta.uid);
    if members.len() > desired {
        // An instance that is not ready is removed first.
        let spare = members.iter().find(|member| !member.is_warm()).or(members.first());
        if let Some(spare) = spare {
            tx.request_deletion::<Instance>(&spare.meta.uid)?;
        }
    } else if members.len() < desired {
        let uid = tx.next_uid();
        let name = Name::from(&uid);
        let pool_owner = OwnerRef { kind: Snapshot::NAME.to_owned(), uid: snapshot.meta.uid.clone() };
        let place = Place { uid, name, tags: Tags::new(), owner: Some(pool_owner) };
        let goal = Goal { power: Power::Warm, hypervisor: snapshot.spec.instance.hypervisor };
        begin_at(tx, &snapshot, place, goal, tap_prefix)?;
    }
    Ok(())
}

/// Restores an instance that is down to one of its snapshots. A new disk replaces its own disk, whose content
/// is lost. The hypervisor may change in the same commit: nothing of the instance runs, and the next launch
/// belongs to another run.
///
/// # Errors
/// Returns `NotFound`, `InvalidState` unless the instance is down, `Conflict` unless the snapshot is ready,
/// or `InvalidRequest`.
pub fn restore(
    tx: &mut Tx<'_>,
    uid: &Uid,
    snapshot: &Uid,
    target: Target,
) -> Result<Arc<Object<Instance>>, Refused> {
    let object = live(tx, uid)?;
    let snapshot = ready(tx, snapshot)?;
    if snapshot.spec.source != *uid {
        let (snapshot, instance) = (&snapshot.meta.uid, &object.meta.name);
        return Err(Refused::NotFound(format!("snapshot {snapshot} is of another instance than {instance}")));
    }
    let (state, power) = (object.status.state, object.spec.power);
    let is_down = match state {
        State::Stopped => object.goal().run().is_none(),
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
    let goal = goal(&snapshot, target)?;
    let disk = new_disk(tx, owner(uid), disk_of(&snapshot))?;
    let earlier = object.spec.allocated.disk.clone();
    let volumes = mounts::restore(tx, &snapshot, &object)?;
    let now = tx.now();
    let changed = tx.update_spec::<Instance>(uid, None, |spec| {
        let kept = spec.clone();
        // The program and the machine settings come from the snapshot; the settings of the instance's life
        // remain its own.
        *spec = InstanceSpec {
            allocated: kept.allocated,
            restart: kept.restart,
            health: kept.health,
            health_version: kept.health_version,
            expires_at: kept.expires_at,
            auto_standby: kept.auto_standby,
            hold_until: kept.hold_until,
            snapshot_policy: kept.snapshot_policy,
            compression: None,
            power: goal.power,
            hypervisor: goal.hypervisor,
            power_by: PowerCause::Client,
            power_since: now,
            run: kept.run.next(),
            volumes,
            standby: kept.standby.next(),
            is_forced: kept.is_forced,
            ..(*snapshot.spec.instance).clone()
        };
        spec.allocated.disk = disk;
        spec.origin = Some(origin(&snapshot, spec.standby, spec.run, goal.power, false));
    })?;
    tx.request_deletion::<stead_schemas::disk::Disk>(&earlier)?;
    Ok(changed)
}

fn ready(tx: &Tx<'_>, uid: &Uid) -> Result<Arc<Object<Snapshot>>, Refused> {
    let snapshot = tx.get::<Snapshot>(uid).filter(|snapshot| !snapshot.meta.is_deleting());
    let snapshot = snapshot.ok_or_else(|| Refused::NotFound(absent(Snapshot::NAME, uid)))?;
    match snapshot.status.phase {
        SnapshotPhase::Ready => Ok(snapshot),
        SnapshotPhase::Pending => Err(Refused::Conflict("the snapshot is still being taken".to_owned())),
        SnapshotPhase::Failed => {
            let why = snapshot.status.error.clone().unwrap_or_default();
            Err(Refused::Conflict(format!("the snapshot failed: {why}")))
        }
    }
}

/// Resolves the goal: the values of the request, with the values of the snapshot as defaults.
fn goal(snapshot: &Object<Snapshot>, target: Target) -> Result<Goal, Refused> {
    let (kind, saved_of) = (snapshot.spec.kind, snapshot.spec.instance.hypervisor);
    let default = match kind {
        SnapshotKind::Standby => Power::Running,
        SnapshotKind::Stopped => Power::Stopped,
    };
    let goal =
        Goal { power: target.power.unwrap_or(default), hypervisor: target.hypervisor.unwrap_or(saved_of) };
    mounts::check_fit(&snapshot.spec.instance.volumes, goal.hypervisor)?;
    match kind {
        SnapshotKind::Stopped if goal.power == Power::Standby => {
            let message = "target_state cannot be Standby: there is no memory to keep";
            Err(Refused::InvalidRequest(message.to_owned()))
        }
        // The guest's memory refers to the devices of the hypervisor that it was saved on.
        SnapshotKind::Standby if goal.hypervisor != saved_of => Err(Refused::InvalidRequest(format!(
            "target_hypervisor must be {}: a snapshot of the kind Standby goes on only on the hypervisor that \
             it was taken on; one of the kind Stopped boots on any",
            saved_of.as_str()
        ))),
        SnapshotKind::Standby | SnapshotKind::Stopped => Ok(goal),
    }
}

fn disk_of(snapshot: &Object<Snapshot>) -> DiskSpec {
    let size = snapshot.spec.instance.overlay;
    let source = Some(snapshot.meta.uid.clone());
    DiskSpec { size, purpose: DiskPurpose::RootOverlay, source, source_disk: None }
}

fn origin(
    snapshot: &Object<Snapshot>,
    standby: StandbyNo,
    run: RunNo,
    target: Power,
    is_fork: bool,
) -> Origin {
    let has_memory = snapshot.spec.kind == SnapshotKind::Standby && target != Power::Stopped;
    let image_digest = snapshot.spec.image_digest.clone();
    Origin {
        snapshot: snapshot.meta.uid.clone(),
        image_digest,
        standby,
        memory_for_run: has_memory.then_some(run),
        is_fork,
    }
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
    let place = Place { uid: tx.next_uid(), name, tags, owner: None };
    begin_at(tx, snapshot, place, goal, tap_prefix)
}

/// The identity of a new instance: its uid, name, tags and owner.
struct Place {
    uid: Uid,
    name: Name,
    tags: Tags,
    owner: Option<OwnerRef>,
}

fn begin_at(
    tx: &mut Tx<'_>,
    snapshot: &Object<Snapshot>,
    place: Place,
    goal: Goal,
    tap_prefix: &str,
) -> Result<Arc<Object<Instance>>, Refused> {
    let Place { uid, name, tags, owner } = place;
    let source = &snapshot.spec.instance;
    let image = source.allocated.image.clone();
    let tap_prefix = source.has_network.then_some(tap_prefix);
    let allocated = allocate(tx, &uid, image, disk_of(snapshot), tap_prefix)?;
    let volumes = mounts::fork(tx, snapshot, &uid)?;
    let (run, standby) = (RunNo(1), StandbyNo(1));
    let spec = InstanceSpec {
        power: goal.power,
        hypervisor: goal.hypervisor,
        power_by: PowerCause::Client,
        hold_until: None,
        // The compression belongs to a standby of the source: for the fork it would only separate shared pages.
        compression: None,
        power_since: tx.now(),
        run,
        standby,
        is_forced: false,
        // The source's expiry does not apply to the fork.
        expires_at: None,
        origin: Some(origin(snapshot, standby, run, goal.power, true)),
        volumes,
        allocated,
        ..(**source).clone()
    };
    Ok(tx.create::<Instance>(New { uid: Some(uid), name, tags, owner, spec })?)
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use stead_schemas::compression::{Algorithm, Compression, CompressionWish};
    use stead_schemas::disk::Disk;
    use stead_schemas::instance::InstanceStatus;
    use stead_schemas::snapshot::{SnapshotSpec, SnapshotStatus};

    use super::*;
    use crate::store::tests::opened;
    use crate::store::{Kinds, Store};

    /// Opens a store with one instance in standby, whose memory is to be compressed.
    async fn in_standby() -> (Store, Uid) {
        let kinds = Kinds::new().with::<Instance>().with::<Disk>().with::<Snapshot>();
        let store = opened(kinds);
        let mut object = crate::vm::example(Power::Standby, 1, 0);
        let how = Compression { algorithm: Algorithm::Zstd, level: 1 };
        object.spec.compression = Some(CompressionWish { how, not_before: Timestamp::UNIX_EPOCH });
        object.spec.expires_at = Some(Timestamp::MAX);
        let uid = object.meta.uid.clone();
        let (name, spec) = (object.meta.name, object.spec);
        let new = New { uid: Some(uid.clone()), name, tags: Tags::new(), owner: None, spec };
        store.transact(move |tx| tx.create::<Instance>(new)).await.expect("created");
        let status = InstanceStatus { state: State::Standby, ..InstanceStatus::default() };
        store.write_status::<Instance>(&uid, status).await.expect("written");
        (store, uid)
    }

    #[tokio::test]
    async fn a_fork_takes_neither_the_compression_nor_the_end_of_its_source_along() {
        let (store, source) = in_standby().await;
        let wish =
            ForkWish { name: Name::resource("fork").expect("valid"), from_running: false, target: None };
        let forked = store.transact(move |tx| fork(tx, &source, wish, "st")).await.expect("forked");
        let spec = &forked.instance.spec;
        assert_eq!((spec.power, spec.compression, spec.expires_at), (Power::Standby, None, None));
        assert_eq!(spec.origin.as_ref().and_then(|origin| origin.memory_for_run), Some(spec.run));
    }

    #[tokio::test(start_paused = true)]
    async fn a_member_of_a_pool_that_is_of_no_use_is_deleted_and_one_that_was_taken_meanwhile_is_not() {
        let (store, uid) = in_standby().await;
        for (power, is_deleted) in [(Power::Running, false), (Power::Warm, true)] {
            let moved = uid.clone();
            let expired = store.transact(move |tx| {
                let change = |spec: &mut InstanceSpec| (spec.power, spec.expires_at) = (power, None);
                tx.update_spec::<Instance>(&moved, None, change)?;
                Ok::<_, crate::store::TxError>(super::super::admission::expire(tx, &moved).is_ok())
            });
            assert!(expired.await.expect("stored"), "{power:?}");
            let object = store.get::<Instance>(&uid).expect("it goes when its host things are gone");
            assert_eq!(object.meta.is_deleting(), is_deleted, "{power:?}");
        }
    }

    /// Returns a ready snapshot of an instance that is stopped or in standby.
    fn snapshot(kind: SnapshotKind, hypervisor: Hypervisor) -> Object<Snapshot> {
        let mut source = crate::vm::example(Power::Stopped, 1, 1);
        source.spec.hypervisor = hypervisor;
        Object {
            spec: SnapshotSpec {
                source: source.meta.uid.clone(),
                source_name: source.meta.name.clone(),
                kind,
                name: None,
                purpose: SnapshotPurpose::Kept,
                schedule: None,
                instance: Box::new(source.spec),
                image_digest: None,
                compression: None,
                pool: 0,
                volume_disks: Vec::new(),
            },
            meta: source.meta,
            status: SnapshotStatus::default(),
        }
    }

    #[test]
    fn a_disk_goes_to_any_hypervisor_and_a_memory_to_its_own_alone() {
        use Hypervisor::{CloudHypervisor, Firecracker};
        use SnapshotKind::{Standby, Stopped};
        for (kind, taken_on, asked, is_refused) in [
            (Stopped, CloudHypervisor, None, false),
            (Stopped, CloudHypervisor, Some(CloudHypervisor), false),
            (Stopped, CloudHypervisor, Some(Firecracker), false),
            (Stopped, Firecracker, Some(CloudHypervisor), false),
            (Standby, CloudHypervisor, None, false),
            (Standby, Firecracker, None, false),
            (Standby, Firecracker, Some(Firecracker), false),
            (Standby, CloudHypervisor, Some(Firecracker), true),
            (Standby, Firecracker, Some(CloudHypervisor), true),
        ] {
            // The request is refused even where the memory would not be used.
            let power = asked.map(|_| Power::Stopped);
            let reached = goal(&snapshot(kind, taken_on), Target { power, hypervisor: asked });
            match reached {
                Ok(goal) => {
                    assert!(!is_refused, "{kind:?} {taken_on:?} {asked:?} {power:?}");
                    assert_eq!(goal.hypervisor, asked.unwrap_or(taken_on));
                }
                Err(refused) => {
                    assert!(is_refused, "{kind:?} {taken_on:?} {asked:?} {power:?}");
                    let message = refused.to_string();
                    assert!(matches!(refused, Refused::InvalidRequest(_)), "{refused:?}");
                    assert!(message.starts_with("target_hypervisor must be "), "{message}");
                }
            }
        }
    }

    /// Puts a ready snapshot of the instance into the store, and a disk for the instance to lose.
    fn stage_restore(
        tx: &mut Tx<'_>,
        uid: &Uid,
        kind: SnapshotKind,
    ) -> Result<Arc<Object<Snapshot>>, Refused> {
        let size = live(tx, uid)?.spec.overlay;
        let disk = DiskSpec { size, purpose: DiskPurpose::RootOverlay, source: None, source_disk: None };
        let disk = new_disk(tx, owner(uid), disk)?;
        let instance = tx.update_spec::<Instance>(uid, None, |spec| spec.allocated.disk = disk)?;
        let mut spec = snapshot(kind, instance.spec.hypervisor).spec;
        spec.instance = Box::new(instance.spec.clone());
        let name = Name::resource("s").expect("valid");
        Ok(tx.create::<Snapshot>(New { uid: None, name, tags: Tags::new(), owner: None, spec })?)
    }

    #[tokio::test]
    async fn a_restore_in_place_changes_disk_run_and_hypervisor_at_once_and_a_refused_one_nothing() {
        for (kind, is_refused) in [(SnapshotKind::Stopped, false), (SnapshotKind::Standby, true)] {
            let (store, uid) = in_standby().await;
            let moved = uid.clone();
            let staged = store.transact(move |tx| stage_restore(tx, &moved, kind)).await.expect("staged");
            let snapshot = staged.meta.uid.clone();
            let status = SnapshotStatus { phase: SnapshotPhase::Ready, ..SnapshotStatus::default() };
            store.write_status::<Snapshot>(&snapshot, status).await.expect("written");
            let before = store.get::<Instance>(&uid).expect("there");
            let target = Target { power: None, hypervisor: Some(Hypervisor::Firecracker) };
            let moved = uid.clone();
            let restored = store.transact(move |tx| restore(tx, &moved, &snapshot, target)).await;
            let after = store.get::<Instance>(&uid).expect("there");
            assert_eq!(restored.is_err(), is_refused, "{restored:?}");
            if is_refused {
                assert_eq!(after, before);
                continue;
            }
            let (was, is) = (&before.spec, &after.spec);
            assert_eq!((is.hypervisor, is.run), (Hypervisor::Firecracker, was.run.next()));
            assert_ne!(is.allocated.disk, was.allocated.disk);
        }
    }
}
