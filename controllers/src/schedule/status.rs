//! Status of a schedule, derived from the observation.

use stead_schemas::limits::MESSAGE_CHARS_MAX;
use stead_schemas::meta::Object;
use stead_schemas::schedule::{Run, SnapshotSchedule, SnapshotScheduleStatus};
use stead_schemas::snapshot::SnapshotPhase;
use stead_schemas::validate::printable;

use super::observe::Observed;
use super::plan::{last_due, next_expiry};
use crate::runtime::{Outcome, PassEnd, conditions};

pub(super) fn status(
    object: &Object<SnapshotSchedule>,
    seen: Option<&Observed>,
    end: &PassEnd,
) -> SnapshotScheduleStatus {
    let (spec, generation) = (&object.spec, object.meta.generation);
    let mut status = object.status.clone();
    if let Some(seen) = seen {
        let last = last_due(object, seen, end.now.at());
        // If the last run is from before the clock was set back, the latest run before now counts as done.
        let is_of_this_clock = last.is_none_or(|last| spec.is_of_this_clock(last, end.now.at()));
        status.last_due = if is_of_this_clock { last } else { spec.at_or_before(end.now.at()) };
        let run = seen.taken.iter().rfind(|taken| Some(taken.due) == status.last_due);
        if let Some(run) = run {
            status.last_run_at = Some(run.asked_at);
            match run.phase {
                SnapshotPhase::Pending => {}
                SnapshotPhase::Ready => {
                    (status.last_snapshot, status.last_error) = (Some(run.uid.clone()), None);
                }
                SnapshotPhase::Failed => {
                    status.last_failed = Some(run.uid.clone());
                    let why = run.error.clone().unwrap_or_default();
                    status.last_error = Some(printable(&why, MESSAGE_CHARS_MAX));
                }
            }
        }
        // The last failure may be of a snapshot that failed late, after the next run.
        if let Some(failed) = seen.taken.iter().rfind(|taken| taken.phase == SnapshotPhase::Failed) {
            status.last_failed = Some(failed.uid.clone());
        }
        let run = spec.run(status.last_due, end.now.at());
        let is_reported = status.last_failed != object.status.last_failed;
        if let (Run::Due(_), Outcome::Failed { message, .. }) = (run, &end.outcome)
            && !is_reported
        {
            status.last_error = Some(printable(message, MESSAGE_CHARS_MAX));
        }
        if let (Run::Due(_), Outcome::Waiting(wait)) = (run, &end.outcome)
            && !is_reported
        {
            status.last_error = Some(printable(&wait.message, MESSAGE_CHARS_MAX));
        }
        let next = match run {
            // The pass itself waits for a run that is due.
            Run::Due(_) => spec.after(end.now.at()),
            Run::Next(at) => at,
        };
        status.next_poll = next_expiry(spec, &seen.taken).into_iter().chain([next]).min();
    }
    status.observed_generation = generation;
    status.conditions = conditions::standard(&object.status.conditions, generation, end);
    status
}
