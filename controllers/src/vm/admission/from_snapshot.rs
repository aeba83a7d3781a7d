//! Instances that begin with a snapshot: forks, pooled instances, and restores in place.

use std::sync::Arc;

use stead_schemas::disk::{DiskPurpose, DiskSpec};
use stead_schemas::instance::{Hypervisor, Instance, InstanceSpec, Origin, Pending, Power, PowerCause};
use stead_schemas::meta::{Object, OwnerRef, Tags};
use stead_schemas::names::{Name, Uid};
use stead_schemas::node::Node;
use stead_schemas::numbers::{GrantNo, RunNo, StandbyNo};
use stead_schemas::snapshot::{Snapshot, SnapshotKind, SnapshotPhase};

use super::capabilities::Declared;
use super::create::allocate;
use super::volumes;
use crate::nic::admission::TapForm;
use crate::node::admission::{self as nodes, check_verb};
use crate::refused::{Refused, RefusedKind};
use crate::store::{New, Tx};

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
pub(super) struct Goal {
    pub(super) power: Power,
    pub(super) hypervisor: Hypervisor,
}

pub(super) fn ready(tx: &Tx<'_>, uid: &Uid) -> Result<Arc<Object<Snapshot>>, Refused> {
    let snapshot = tx.get::<Snapshot>(uid).filter(|snapshot| !snapshot.meta.is_deleting());
    let snapshot = snapshot.ok_or_else(|| Refused::absent::<Snapshot>(uid))?;
    match snapshot.status.phase {
        SnapshotPhase::Ready => Ok(snapshot),
        SnapshotPhase::Pending => Err(Refused::conflict("the snapshot is still being taken")),
        SnapshotPhase::Failed => {
            let why = snapshot.status.error.clone().unwrap_or_default();
            Err(Refused::conflict(format!("the snapshot failed: {why}")))
        }
    }
}

/// Resolves the goal: the values of the request, with the values of the snapshot as defaults.
///
/// # Errors
/// Returns the refusal of a field, and `UnsupportedVerb` if the memory cannot be taken over.
pub(super) fn goal(
    node: &Object<Node>,
    snapshot: &Object<Snapshot>,
    target: Target,
) -> Result<Goal, Refused> {
    let (kind, saved_of) = (snapshot.spec.kind, snapshot.spec.instance.hypervisor);
    let default = match kind {
        SnapshotKind::Standby => Power::Running,
        SnapshotKind::Stopped => Power::Stopped,
    };
    let goal =
        Goal { power: target.power.unwrap_or(default), hypervisor: target.hypervisor.unwrap_or(saved_of) };
    let declared = Declared { hypervisor: goal.hypervisor, has: nodes::declared(node, goal.hypervisor)? };
    declared.check_volumes(&snapshot.spec.instance.volumes)?;
    match kind {
        SnapshotKind::Stopped if goal.power == Power::Standby => {
            let message = "target_state cannot be Standby: there is no memory to keep";
            Err(Refused::at(RefusedKind::Invalid, "target_state", message))
        }
        // The guest's memory refers to the devices of the hypervisor that it was saved on.
        SnapshotKind::Standby if goal.hypervisor != saved_of => {
            let message = format!(
                "target_hypervisor must be {}: a snapshot of the kind Standby goes on only on the hypervisor \
                 that it was taken on; one of the kind Stopped boots on any",
                saved_of.as_str()
            );
            Err(Refused::at(RefusedKind::Invalid, "target_hypervisor", message))
        }
        SnapshotKind::Standby if goal.power != Power::Stopped => {
            check_verb(
                goal.hypervisor,
                declared.has.fork_memory,
                "to continue from the memory of a snapshot",
            )?;
            Ok(goal)
        }
        SnapshotKind::Stopped if goal.hypervisor != saved_of => {
            declared.check_move(&snapshot.spec.instance)?;
            Ok(goal)
        }
        SnapshotKind::Standby | SnapshotKind::Stopped => Ok(goal),
    }
}

pub(super) fn disk_of(snapshot: &Object<Snapshot>) -> DiskSpec {
    let size = snapshot.spec.instance.overlay;
    let source = Some(snapshot.meta.uid.clone());
    DiskSpec { source, ..DiskSpec::empty(size, DiskPurpose::RootOverlay) }
}

pub(super) fn origin(
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

/// The identity of a new instance: its uid, name, tags and owner.
pub(super) struct NewFork {
    pub(super) uid: Uid,
    pub(super) name: Name,
    pub(super) tags: Tags,
    pub(super) owner: Option<OwnerRef>,
}

pub(super) fn begin_at(
    tx: &mut Tx<'_>,
    snapshot: &Object<Snapshot>,
    new_fork: NewFork,
    goal: Goal,
    tap_prefix: &str,
) -> Result<Arc<Object<Instance>>, Refused> {
    let NewFork { uid, name, tags, owner } = new_fork;
    let source = &snapshot.spec.instance;
    let image = source.allocated.image.clone();
    let form =
        || TapForm::new(tx, tap_prefix, goal.hypervisor, source.vcpus, &source.rates, source.egress.as_ref());
    let tap = source.has_network.then(form);
    let allocated = allocate(tx, &uid, image, disk_of(snapshot), tap.transpose()?)?;
    let volumes = volumes::fork(tx, snapshot, &uid)?;
    let (run, standby) = (RunNo(1), StandbyNo(1));
    let spec = InstanceSpec {
        power: goal.power,
        hypervisor: goal.hypervisor,
        power_by: PowerCause::Client,
        hold_until: None,
        memory_hold: None,
        pending: Pending::default(),
        // The compression belongs to a standby of the source: for the fork it would only separate shared pages.
        compression: None,
        power_since: tx.now(),
        run,
        standby,
        // A fork that is stopped, or takes over a memory for its standby, has no VM.
        grant: match goal.power {
            Power::Running | Power::Warm => GrantNo(1),
            Power::Stopped | Power::Standby => GrantNo(0),
        },
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
