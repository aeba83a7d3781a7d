//! Observations of a snapshot: its files, its users and, until it is captured, the state of its source.

use stead_schemas::condition::{self, ConditionStatus, ConditionType, Reason};
use stead_schemas::instance::Instance;
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;
use stead_schemas::references::{Ref, Role};
use stead_schemas::snapshot::{Snapshot, SnapshotKind, SnapshotPhase, SnapshotSpec};

use super::SnapshotReconciler;
use crate::host::{
    CapturePlan, Captured, Disks, GuestPhase, Host, HostError, Machine, Memories, Memory, Snapshots, Space,
    VmmState, Vmms,
};
use crate::store::Store;

/// An observation of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    pub uid: Uid,
    pub captured: Option<Captured>,
    /// True if a fork or a restore still has to copy from it.
    pub is_needed: bool,
    /// Number of its pooled instances, and in `warm` of those that a fork could take.
    pub pooled: u32,
    pub warm: u32,
    /// True if the pool has more or fewer instances than it should have.
    pub is_pool_due: bool,
    /// The reason why one of its pooled instances does not become ready.
    pub pool_trouble: Option<String>,
    /// The source, only for a snapshot that is still to be captured.
    pub source: Option<Source>,
    /// Number of bytes that a capture may write, and the space for them.
    pub room: Option<(Bytes, Space)>,
}

/// The state of an instance, for the capture of one of its runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The instance can be captured now.
    Capturable,
    /// The instance is on its way to a state in which it can be captured.
    Moving,
    /// The run, or the instance, no longer exists.
    Gone,
}

pub(super) async fn observe<H: Host>(
    reconciler: &SnapshotReconciler<H>,
    uid: &Uid,
    object: Option<&Object<Snapshot>>,
) -> Result<Observed, HostError> {
    let captured = reconciler.host.snapshots().inspect(uid).await?;
    let is_needed = is_needed(&reconciler.store, uid);
    let pool = pool(&reconciler.store, uid);
    let is_pool_due = object.is_some_and(|object| is_pool_due(object, pool.pooled));
    let Pool { pooled, warm, trouble } = pool;
    let mut seen = Observed {
        uid: uid.clone(),
        captured,
        is_needed,
        pooled,
        warm,
        is_pool_due,
        pool_trouble: trouble,
        source: None,
        room: None,
    };
    let Some(object) = object.filter(|object| is_to_be_captured(object)) else { return Ok(seen) };
    let source = source(reconciler, &object.spec).await?;
    seen.source = Some(source);
    if source == Source::Capturable {
        let needed = reconciler.host.snapshots().measure(&capture_plan(object)).await?;
        seen.room = Some((needed, reconciler.host.disks().space().await?));
    }
    Ok(seen)
}

fn is_to_be_captured(object: &Object<Snapshot>) -> bool {
    !object.meta.is_deleting() && object.status.phase == SnapshotPhase::Pending
}

pub(super) fn capture_plan(object: &Object<Snapshot>) -> CapturePlan {
    let spec = &object.spec;
    CapturePlan {
        snapshot: object.meta.uid.clone(),
        source: spec.source.clone(),
        kind: spec.kind,
        disk: spec.instance.allocated.disk.clone(),
        volumes: spec.volume_disks.iter().map(|captured| captured.disk.clone()).collect(),
        run: spec.instance.run,
    }
}

/// Reports whether a disk or an instance begins with the snapshot and has not begun yet.
fn is_needed(store: &Store, uid: &Uid) -> bool {
    let awaited = [Role::AwaitsCopy, Role::AwaitsMemory];
    awaited.into_iter().any(|role| store.is_referred_to(&Ref::to::<Snapshot>(role, uid)))
}

/// The forks that are held ready.
#[derive(Debug, Default)]
struct Pool {
    pooled: u32,
    warm: u32,
    trouble: Option<String>,
}

fn pool(store: &Store, uid: &Uid) -> Pool {
    let mut pool = Pool::default();
    for pooled_instance in store.owned_by::<Instance>(uid) {
        if pooled_instance.is_pooled() && !pooled_instance.meta.is_deleting() {
            pool.pooled += 1;
            pool.warm += u32::from(pooled_instance.is_warm());
            pool.trouble = pool.trouble.or_else(|| trouble(&pooled_instance));
        }
    }
    pool
}

/// Returns why a pooled instance does not become ready. Only the owner of its snapshot can see it.
fn trouble(pooled_instance: &Object<Instance>) -> Option<String> {
    let conditions = &pooled_instance.status.conditions;
    let ready = condition::find(conditions, ConditionType::Ready)?;
    let is_degraded = condition::find(conditions, ConditionType::Degraded)
        .is_some_and(|degraded| degraded.status == ConditionStatus::True);
    let is_replaced =
        matches!(ready.reason, Reason::ProgramExited | Reason::GuestBootFailed | Reason::DiskFull);
    let is_in_trouble = ready.status != ConditionStatus::True && (is_degraded || is_replaced);
    is_in_trouble.then(|| ready.message.clone())
}

/// Returns true if the pool must be scaled. Only a complete snapshot has a pool; a failed snapshot gives its
/// pooled instances up.
fn is_pool_due(object: &Object<Snapshot>, pooled: u32) -> bool {
    match object.status.phase {
        SnapshotPhase::Pending => false,
        SnapshotPhase::Ready => pooled != object.spec.pool,
        SnapshotPhase::Failed => pooled > 0,
    }
}

async fn source<H: Host>(
    reconciler: &SnapshotReconciler<H>,
    spec: &SnapshotSpec,
) -> Result<Source, HostError> {
    let Some(instance) = reconciler.store.get::<Instance>(&spec.source) else { return Ok(Source::Gone) };
    let is_same = (instance.spec.run, &instance.spec.allocated.disk)
        == (spec.instance.run, &spec.instance.allocated.disk);
    if instance.meta.is_deleting() || !is_same {
        return Ok(Source::Gone);
    }
    let machine = reconciler.host.vmms().inspect(&spec.source).await?;
    Ok(match spec.kind {
        SnapshotKind::Stopped => stopped_source(&instance, machine.as_ref()),
        SnapshotKind::Standby => {
            let memory = reconciler.host.memories().inspect(&spec.source).await?;
            standby_source(&instance, spec, machine.as_ref(), memory.as_ref())
        }
    })
}

fn stopped_source(instance: &Object<Instance>, machine: Option<&Machine>) -> Source {
    match machine {
        _ if instance.goal().run().is_some() => Source::Gone,
        Some(_) => Source::Moving,
        None => Source::Capturable,
    }
}

pub(super) fn standby_source(
    instance: &Object<Instance>,
    spec: &SnapshotSpec,
    machine: Option<&Machine>,
    memory: Option<&Memory>,
) -> Source {
    let is_over = instance.goal().run() != Some(spec.instance.run);
    // The memory must be of that run: the instance may have been put in standby since.
    let is_saved = matches!(memory, Some(Memory::Saved(saved)) if saved.run == spec.instance.run);
    match machine {
        _ if is_over => Source::Gone,
        // Only the store reports that a run is over. The record of a machine is read while the machine's own
        // reconciler starts and releases it, and shows no run or the previous run at those moments.
        Some(machine) if machine.run != spec.instance.run => Source::Moving,
        Some(machine) if is_in_full_run(machine) && memory.is_none() => Source::Capturable,
        // The machine is paused by a save or a restore in progress, or boots again.
        Some(_) => Source::Moving,
        None if is_saved => Source::Capturable,
        None => Source::Moving,
    }
}

fn is_in_full_run(machine: &Machine) -> bool {
    machine.vmm == VmmState::Running && machine.guest.phase == GuestPhase::Ready
}
