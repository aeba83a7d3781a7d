//! The plan of a schedule: from the timetable and the existing snapshots to the next step.

use jiff::Timestamp;
use stead_schemas::condition::Reason;
use stead_schemas::meta::Object;
use stead_schemas::schedule::{Run, SnapshotSchedule, SnapshotScheduleSpec};
use stead_schemas::snapshot::{ScheduledRun, SnapshotPhase};

use super::observe::{Observed, Source, Taken};
use super::{Action, TakePlan};
use crate::runtime::{Desired, Moment, Plan, Record, Wait, after};

/// Greatest number of deletions in one pass; the next pass continues.
const PRUNED_AT_ONCE: usize = 16;
const DEFAULT_PREFIX: &str = "scheduled";

pub(super) fn plan(desired: &Desired<'_, SnapshotSchedule>, seen: &Observed, now: Moment) -> Plan<Action> {
    let Desired::Present(object) = desired else { return Plan::Converged };
    let is_recorded = |taken: &Taken| object.status.last_failed.as_ref() == Some(&taken.uid);
    let failed = seen.taken.iter().rfind(|taken| taken.phase == SnapshotPhase::Failed);
    if failed.is_some_and(|failed| !is_recorded(failed)) {
        return Plan::Record(Record { reason: Reason::Converging, what: "recording why a snapshot failed" });
    }
    let surplus: Vec<Action> = surplus(&object.spec, &seen.taken, now)
        .map(|taken| Action::Prune(taken.uid.clone()))
        .take(PRUNED_AT_ONCE)
        .collect();
    if !surplus.is_empty() {
        return Plan::Act(surplus);
    }
    match object.spec.run(last_due(object, seen, now.at()), now.at()) {
        Run::Next(_) => Plan::Converged,
        Run::Due(due) => plan_run(object, seen, due, now.at()),
    }
}

fn plan_run(
    object: &Object<SnapshotSchedule>,
    seen: &Observed,
    due: Timestamp,
    now: Timestamp,
) -> Plan<Action> {
    let spec = &object.spec;
    if seen.taken.iter().any(|taken| taken.phase == SnapshotPhase::Pending) {
        return wait("the snapshot before is still being taken", spec.after(now));
    }
    match seen.source {
        Source::Gone => Plan::Converged,
        // A change of the instance is notified.
        Source::Busy(state) => {
            wait(&format!("no snapshot can be taken while the instance is {state:?}"), spec.after(now))
        }
        Source::Ready(kind) => Plan::Act(vec![Action::Take(Box::new(TakePlan {
            instance: spec.instance.clone(),
            kind,
            run: ScheduledRun { schedule: object.meta.uid.clone(), due },
            name: name(spec, due),
            tags: spec.metadata.clone(),
        }))]),
    }
}

/// Returns the due time of the last run that was carried out, by the record or by its snapshot.
pub(super) fn last_due(
    object: &Object<SnapshotSchedule>,
    seen: &Observed,
    now: Timestamp,
) -> Option<Timestamp> {
    let recorded = object.status.last_due;
    let all = seen.taken.iter().map(|taken| taken.due).chain(recorded);
    let credible = all.filter(|&due| object.spec.is_of_this_clock(due, now)).max();
    credible.or(recorded)
}

/// Returns the snapshots that should not be kept, oldest first: all that failed, the oldest beyond the
/// maximum count, and those that are too old.
fn surplus<'a>(
    spec: &SnapshotScheduleSpec,
    taken: &'a [Taken],
    now: Moment,
) -> impl Iterator<Item = &'a Taken> + use<'a> {
    let ready = taken.iter().filter(|taken| taken.phase == SnapshotPhase::Ready).count();
    // A maximum of zero means that the count has no limit.
    let kept = spec.retention.max_count.filter(|&count| count > 0);
    let kept = kept.map_or(ready, |count| usize::try_from(count).unwrap_or(usize::MAX));
    let mut beyond = ready.saturating_sub(kept);
    let max_age = spec.retention.max_age;
    taken.iter().filter(move |taken| match taken.phase {
        SnapshotPhase::Pending => false,
        SnapshotPhase::Failed => true,
        SnapshotPhase::Ready => {
            let is_beyond = beyond > 0;
            beyond = beyond.saturating_sub(1);
            is_beyond || max_age.is_some_and(|age| now.end(taken.moment, age.0) <= now.at())
        }
    })
}

/// Returns the time at which the first snapshot becomes too old.
pub(super) fn next_expiry(spec: &SnapshotScheduleSpec, taken: &[Taken]) -> Option<Timestamp> {
    let age = spec.retention.max_age?;
    let ready = taken.iter().filter(|taken| taken.phase == SnapshotPhase::Ready);
    ready.map(|taken| after(taken.moment, age.0)).min()
}

/// Returns the name of a run's snapshot, such as `nightly-20261125t031500`.
fn name(spec: &SnapshotScheduleSpec, due: Timestamp) -> String {
    let prefix = spec.name_prefix.as_deref().unwrap_or(DEFAULT_PREFIX);
    format!("{prefix}-{}", due.strftime("%Y%m%dt%H%M%S"))
}

fn wait(message: &str, until: Timestamp) -> Plan<Action> {
    Plan::Wait(Wait { reason: Reason::Converging, message: message.to_owned(), until: Some(until) })
}
