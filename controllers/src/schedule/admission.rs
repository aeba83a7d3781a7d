//! Admission of requests on a schedule, and the requests that a schedule itself makes.

use std::sync::Arc;

use stead_schemas::api::ScheduleRequest;
use stead_schemas::instance::Instance;
use stead_schemas::meta::{Kind, Object, OwnerRef, Tags};
use stead_schemas::names::{Name, Uid};
use stead_schemas::references::{Ref, Role};
use stead_schemas::schedule::{SnapshotSchedule, SnapshotScheduleSpec};
use stead_schemas::snapshot::{Snapshot, SnapshotKind, SnapshotPurpose};

use super::TakePlan;
use crate::host::HostErrorKind;
use crate::refused::{Refused, RefusedKind};
use crate::snapshot::admission as snapshots;
use crate::store::{New, Tx, TxError};

/// The message that refuses to read or delete a schedule that does not exist.
pub const NO_SCHEDULE: &str = "the instance has no snapshot schedule";

/// Sets the schedule of an instance: creates it, or changes the existing one. The runs are counted anew if
/// the interval changes.
///
/// # Errors
/// Returns an error if there is no such instance, or no room for another object.
pub fn put(
    tx: &mut Tx<'_>,
    instance: &Uid,
    request: ScheduleRequest,
) -> Result<Arc<Object<SnapshotSchedule>>, Refused> {
    let owner = tx.get::<Instance>(instance).filter(|instance| !instance.meta.is_deleting());
    owner.ok_or_else(|| Refused::absent::<Instance>(instance))?;
    let now = tx.now();
    let ScheduleRequest { interval, retention, name_prefix, metadata } = request;
    let spec = SnapshotScheduleSpec {
        instance: instance.clone(),
        interval,
        since: now,
        retention,
        name_prefix,
        metadata,
        updated_at: now,
    };
    let Some(old) = find(tx, instance) else {
        return Ok(tx.create::<SnapshotSchedule>(New {
            uid: None,
            // The names of schedules are unique, so an instance has one schedule.
            name: Name::from(instance),
            tags: Tags::new(),
            owner: Some(OwnerRef { kind: Instance::NAME.to_owned(), uid: instance.clone() }),
            spec,
        })?);
    };
    let since = if old.spec.interval == spec.interval { old.spec.since } else { now };
    Ok(tx.update_spec::<SnapshotSchedule>(&old.meta.uid, None, |kept| {
        *kept = SnapshotScheduleSpec { since, ..spec };
    })?)
}

/// Requests the deletion of the schedule; the snapshots that it took stay.
///
/// # Errors
/// Returns an error if the instance has no schedule.
pub fn delete(tx: &mut Tx<'_>, instance: &Uid) -> Result<(), Refused> {
    let schedule = find(tx, instance).ok_or_else(|| Refused::not_found(NO_SCHEDULE))?;
    tx.request_deletion::<SnapshotSchedule>(&schedule.meta.uid)?;
    Ok(())
}

fn find(tx: &Tx<'_>, instance: &Uid) -> Option<Arc<Object<SnapshotSchedule>>> {
    tx.find::<SnapshotSchedule>(&Name::from(instance)).filter(|schedule| !schedule.meta.is_deleting())
}

/// Returns the kind of snapshot that can be taken of an instance now, or `None` while the instance is between
/// states.
pub(super) fn kind_now(instance: &Object<Instance>) -> Option<SnapshotKind> {
    let kinds = [SnapshotKind::Standby, SnapshotKind::Stopped];
    kinds.into_iter().find(|&kind| snapshots::check_state(instance, kind).is_ok())
}

/// The reason why a run took no snapshot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(super) struct NotTaken {
    pub(super) kind: HostErrorKind,
    pub(super) message: String,
}

impl From<Refused> for NotTaken {
    fn from(refused: Refused) -> Self {
        let kind = match &refused.kind {
            RefusedKind::NotFound => HostErrorKind::Missing,
            RefusedKind::NoRoom | RefusedKind::Quota => HostErrorKind::Exhausted,
            RefusedKind::UnsupportedField | RefusedKind::UnsupportedVerb => HostErrorKind::Unsupported,
            _ => HostErrorKind::Transient,
        };
        Self { kind, message: refused.to_string() }
    }
}

/// Requests the snapshot of a run, unless that was done before.
pub(super) fn take(tx: &mut Tx<'_>, plan: &TakePlan) -> Result<(), NotTaken> {
    // The schedule was deleted meanwhile: none of its runs begins any more.
    let is_desired =
        tx.get::<SnapshotSchedule>(&plan.run.schedule).is_some_and(|one| !one.meta.is_deleting());
    let is_taken = tx.find_referring::<Snapshot>(
        &Ref::to::<SnapshotSchedule>(Role::Schedule, &plan.run.schedule),
        |one| one.spec.schedule.as_ref() == Some(&plan.run),
    );
    let is_taken = is_taken.is_some();
    if !is_desired || is_taken {
        return Ok(());
    }
    let policy = tx.get::<Instance>(&plan.instance).and_then(|instance| instance.spec.snapshot_policy);
    let compression = policy.and_then(|policy| policy.compression);
    // A disk without memory is not compressed: its copies share blocks where the file system can.
    let compression = compression.filter(|_| plan.kind == SnapshotKind::Standby);
    let request = |name| snapshots::CreateRequest {
        kind: plan.kind,
        name,
        tags: plan.tags.clone(),
        purpose: SnapshotPurpose::Kept,
        compression,
        pool: 0,
        schedule: Some(plan.run.clone()),
    };
    let created = match snapshots::create(tx, &plan.instance, request(Name::resource(&plan.name).ok())) {
        // Another snapshot, which a client requested, has that name and keeps it.
        Err(refused) if refused.kind == RefusedKind::NameTaken => {
            snapshots::create(tx, &plan.instance, request(None))
        }
        created => created,
    };
    created.map(drop).map_err(NotTaken::from)
}

/// Requests the deletion of one of the schedule's own snapshots.
pub(super) fn prune(tx: &mut Tx<'_>, snapshot: &Uid) -> Result<(), TxError> {
    match snapshots::delete(tx, snapshot) {
        Err(TxError::NotFound { .. }) => Ok(()),
        deleted => deleted,
    }
}
