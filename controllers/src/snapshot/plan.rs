//! The plan of a snapshot: from the spec and the observation to the next step.

use jiff::Timestamp;
use stead_schemas::condition::Reason;
use stead_schemas::limits::FAILURE_KEPT;
use stead_schemas::meta::Object;
use stead_schemas::quantity::Bytes;
use stead_schemas::snapshot::{CompressionState, Snapshot, SnapshotKind, SnapshotPhase, SnapshotPurpose};

use super::observe::{Observed, Source, capture_plan};
use super::{Action, status};
use crate::host::{Captured, Space};
use crate::runtime::{Desired, Moment, Plan, Record, Refusal, Wait, after};

pub(super) fn plan(desired: &Desired<'_, Snapshot>, seen: &Observed, now: Moment) -> Plan<Action> {
    match desired {
        // The name is free already; the files stay until the last copy is made. A snapshot that was not taken
        // is no longer taken, and a client that waits for it is notified of that.
        Desired::Absent(Some(object)) if seen.is_needed && object.status.phase == SnapshotPhase::Ready => {
            wait(Reason::Deleting, "a fork still copies from it", None)
        }
        Desired::Absent(_) => match seen.captured {
            Some(_) => act(Action::Remove(seen.uid.clone())),
            None => Plan::Converged,
        },
        Desired::Present(object) if is_spent(object, seen, now) => act(Action::Expire(seen.uid.clone())),
        Desired::Present(object) => match (object.status.phase, &seen.captured) {
            (SnapshotPhase::Ready, Some(Captured::Whole { .. })) | (SnapshotPhase::Failed, _)
                if seen.is_pool_due =>
            {
                act(Action::ScalePool(seen.uid.clone()))
            }
            // The memory is not compressed while a pool uses it: the pages that pooled instances map are not
            // freed anyway.
            (
                SnapshotPhase::Ready,
                Some(Captured::Whole { compression_state: CompressionState::Plain, kind, .. }),
            ) if *kind == SnapshotKind::Standby && object.spec.pool == 0 && !seen.is_needed => {
                plan_compression(object, seen)
            }
            (SnapshotPhase::Ready, Some(Captured::Whole { .. })) => Plan::Converged,
            (SnapshotPhase::Ready, _) => refuse(Reason::SnapshotFailed, status::LOST),
            (SnapshotPhase::Failed, Some(_)) => act(Action::Remove(seen.uid.clone())),
            (SnapshotPhase::Failed, None) => {
                let why = object.status.error.clone().unwrap_or_default();
                refuse(Reason::SnapshotFailed, why)
            }
            // The status of this pass records it; the next step is planned from there.
            (SnapshotPhase::Pending, Some(Captured::Whole { .. })) => {
                Plan::Record(Record { reason: Reason::Converging, what: "recording that it was taken" })
            }
            (SnapshotPhase::Pending, _) => plan_capture(object, seen, now.at()),
        },
    }
}

fn plan_compression(object: &Object<Snapshot>, seen: &Observed) -> Plan<Action> {
    match object.spec.compression {
        Some(how) => act(Action::Compress(seen.uid.clone(), how)),
        None => Plan::Converged,
    }
}

/// True if the snapshot has served its purpose. A snapshot that was never taken is kept for a limited time,
/// for clients that wait for it or ask for it. A snapshot that only serves a fork is spent when the fork has
/// all of it.
fn is_spent(object: &Object<Snapshot>, seen: &Observed, now: Moment) -> bool {
    match object.was_never_taken() {
        true => now.at() >= now.end(failed_at(object), FAILURE_KEPT),
        false => object.spec.purpose == SnapshotPurpose::Fork && !seen.is_needed,
    }
}

/// Returns the time of the failure. Records of earlier versions do not contain it; their creation time is
/// used.
fn failed_at(object: &Object<Snapshot>) -> Timestamp {
    object.status.failed_at.unwrap_or(object.meta.created_at)
}

/// Returns the time at which the record of a failure is removed, unless the clock is set.
pub(super) fn next_poll(object: &Object<Snapshot>, now: Timestamp) -> Option<Timestamp> {
    let until = object.was_never_taken().then(|| after(failed_at(object).min(now), FAILURE_KEPT));
    until.filter(|&at| at > now && !object.meta.is_deleting())
}

fn plan_capture(object: &Object<Snapshot>, seen: &Observed, now: Timestamp) -> Plan<Action> {
    match (seen.source, seen.room) {
        (Some(Source::Capturable), Some((needed, space))) if !has_room(needed, space) => {
            let message = format!(
                "up to {needed} are needed; {} are free, of which {} are kept in reserve",
                space.available, space.reserve
            );
            refuse(Reason::DiskFull, message)
        }
        (Some(Source::Capturable), _) => act(Action::Capture(Box::new(capture_plan(object)))),
        (Some(Source::Moving), _) => {
            wait(Reason::Converging, "the source is changing its state", Some(later(now)))
        }
        (Some(Source::Gone) | None, _) => {
            refuse(Reason::SnapshotFailed, "the source left the state that was to be captured")
        }
    }
}

fn has_room(Bytes(needed): Bytes, space: Space) -> bool {
    space.available.0 >= space.reserve.0.saturating_add(needed)
}

/// Returns the time of the next poll. Changes of the source are notified; the poll covers lost notifications.
fn later(now: Timestamp) -> Timestamp {
    now.saturating_add(stead_schemas::limits::SNAPSHOT_POLL_INTERVAL).unwrap_or(Timestamp::MAX)
}

fn act(action: Action) -> Plan<Action> {
    Plan::Act(vec![action])
}

fn wait(reason: Reason, message: &str, until: Option<Timestamp>) -> Plan<Action> {
    Plan::Wait(Wait { reason, message: message.to_owned(), until })
}

fn refuse(reason: Reason, message: impl Into<String>) -> Plan<Action> {
    Plan::Refuse(Refusal { reason, message: message.into() })
}
