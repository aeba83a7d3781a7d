//! Status of a snapshot, derived from the observation.

use jiff::Timestamp;
use stead_schemas::meta::Object;
use stead_schemas::snapshot::{CompressionState, Snapshot, SnapshotPhase, SnapshotStatus};

use super::Observed;
use crate::host::{Captured, HostErrorKind};
use crate::runtime::{Outcome, PassEnd, conditions};

pub(super) const LOST: &str = "its files are missing or were cut off";

pub(super) fn status(object: &Object<Snapshot>, seen: Option<&Observed>, end: &PassEnd) -> SnapshotStatus {
    let generation = object.meta.generation;
    let mut status = object.status.clone();
    status.warm = seen.map_or(status.warm, |seen| seen.warm);
    if let Some(Observed {
        captured: Some(Captured::Whole { kind: _, size, captured_at, compression_state }),
        ..
    }) = seen
        && status.phase != SnapshotPhase::Failed
    {
        status.phase = SnapshotPhase::Ready;
        (status.size, status.captured_at, status.compression_state) =
            (*size, Some(*captured_at), *compression_state);
        status.compression_error =
            compression_error(object, seen.is_some_and(|seen| seen.is_pool_due), *compression_state, end);
    }
    if !object.meta.is_deleting() && status.phase != SnapshotPhase::Failed {
        match &end.outcome {
            // There is only one attempt at a moment: what cannot be captured now never can be.
            Outcome::Refused(refusal) => fail(&mut status, &refusal.message, end.now.at()),
            // A failed observation decides nothing.
            Outcome::Failed { kind, message, .. }
                if status.phase == SnapshotPhase::Pending && seen.is_some() && is_final(*kind) =>
            {
                fail(&mut status, message, end.now.at());
            }
            Outcome::Converged
            | Outcome::Acting
            | Outcome::Recording(_)
            | Outcome::Waiting(_)
            | Outcome::Failed { .. } => {}
        }
    }
    if let Some(seen) = seen {
        status.pool_error = pool_error(seen, end);
    }
    // After the clock was set back the time counts from now, also across restarts of the daemon.
    status.failed_at = status.failed_at.map(|at| at.min(end.now.at()));
    status.observed_generation = generation;
    status.conditions = conditions::standard(&object.status.conditions, generation, end);
    status
}

/// Returns the error of the compression. The only steps of a ready snapshot are its compression and those of
/// its pool.
fn compression_error(
    object: &Object<Snapshot>,
    is_pool_due: bool,
    compression_state: CompressionState,
    end: &PassEnd,
) -> Option<String> {
    let is_compression = object.status.phase == SnapshotPhase::Ready && !is_pool_due;
    match (&end.outcome, compression_state) {
        (_, CompressionState::Compressed { .. }) => None,
        (Outcome::Failed { message, .. }, CompressionState::Plain) if is_compression => Some(message.clone()),
        _ => object.status.compression_error.clone(),
    }
}

fn fail(status: &mut SnapshotStatus, why: &str, now: Timestamp) {
    status.phase = SnapshotPhase::Failed;
    status.error = Some(why.to_owned());
    status.failed_at = Some(now);
}

/// Returns why the pool does not have its desired size, if there is an error.
fn pool_error(seen: &Observed, end: &PassEnd) -> Option<String> {
    match &end.outcome {
        Outcome::Failed { message, .. } if seen.is_pool_due => Some(message.clone()),
        _ => seen.pool_trouble.clone(),
    }
}

/// True if a failed capture cannot be retried. Failures of the other kinds pass.
fn is_final(kind: HostErrorKind) -> bool {
    match kind {
        HostErrorKind::Exhausted
        | HostErrorKind::Denied
        | HostErrorKind::Unsupported
        | HostErrorKind::Permanent => true,
        HostErrorKind::Transient | HostErrorKind::Conflict | HostErrorKind::Missing => false,
    }
}
