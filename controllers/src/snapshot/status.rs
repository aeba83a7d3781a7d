//! What was observed of a snapshot, as its status.

use stead_schemas::meta::Object;
use stead_schemas::snapshot::{PackingState, Snapshot, SnapshotPhase, SnapshotStatus};

use super::Observed;
use crate::host::{Captured, HostErrorKind};
use crate::runtime::{Outcome, PassEnd, conditions};

pub(super) const LOST: &str = "its files are missing or were cut off";

pub(super) fn status(object: &Object<Snapshot>, seen: Option<&Observed>, end: &PassEnd) -> SnapshotStatus {
    let generation = object.meta.generation;
    let mut status = object.status.clone();
    status.warm = seen.map_or(status.warm, |seen| seen.warm);
    if let Some(Observed { captured: Some(Captured::Whole { kind: _, size, captured_at, packing }), .. }) =
        seen
        && status.phase != SnapshotPhase::Failed
    {
        status.phase = SnapshotPhase::Ready;
        (status.size, status.captured_at, status.packing) = (*size, Some(*captured_at), *packing);
        status.packing_error = packing_error(&object.status, *packing, end);
    }
    if !object.meta.is_deleting() && status.phase != SnapshotPhase::Failed {
        match &end.outcome {
            // There is one try at a moment: what cannot be captured now never will be.
            Outcome::Refused(refusal) => fail(&mut status, &refusal.message),
            // A look that failed decides nothing.
            Outcome::Failed { kind, message, .. }
                if status.phase == SnapshotPhase::Pending && seen.is_some() && is_final(*kind) =>
            {
                fail(&mut status, message);
            }
            Outcome::Converged
            | Outcome::Acting
            | Outcome::Recording(_)
            | Outcome::Waiting(_)
            | Outcome::Failed { .. } => {}
        }
    }
    status.observed_generation = generation;
    status.conditions = conditions::standard(&object.status.conditions, generation, end);
    status
}

/// The only step of a snapshot that is ready is its compression.
fn packing_error(before: &SnapshotStatus, packing: PackingState, end: &PassEnd) -> Option<String> {
    match (&end.outcome, packing) {
        (_, PackingState::Packed { .. }) => None,
        (Outcome::Failed { message, .. }, PackingState::Plain) if before.phase == SnapshotPhase::Ready => {
            Some(message.clone())
        }
        _ => before.packing_error.clone(),
    }
}

fn fail(status: &mut SnapshotStatus, why: &str) {
    status.phase = SnapshotPhase::Failed;
    status.error = Some(why.to_owned());
}

/// Of a capture that failed; the others pass.
fn is_final(kind: HostErrorKind) -> bool {
    match kind {
        HostErrorKind::Exhausted
        | HostErrorKind::Denied
        | HostErrorKind::Unsupported
        | HostErrorKind::Permanent => true,
        HostErrorKind::Transient | HostErrorKind::Conflict | HostErrorKind::Missing => false,
    }
}
