//! Tests of a schedule's steps as a table: the runs that are due, the snapshots that are kept, and the
//! status.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use stead_schemas::instance::State;
use stead_schemas::meta::{Meta, Object, Tags};
use stead_schemas::names::{Name, Uid};
use stead_schemas::numbers::Generation;
use stead_schemas::quantity::GoDuration;
use stead_schemas::schedule::{Retention, SnapshotScheduleSpec};
use stead_schemas::snapshot::SnapshotPhase::{self, Failed, Pending, Ready};

use super::plan::plan;
use super::status::status;
use super::*;
use crate::runtime::Outcome;

fn uid(text: &str) -> Uid {
    format!("{text:0<24}").parse().expect("valid")
}

fn at(minutes: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000 + 60 * minutes).expect("valid")
}

/// Returns a schedule of every ten minutes since 0; its runs come some seconds later.
fn schedule(retention: Retention) -> Object<SnapshotSchedule> {
    let meta = Meta {
        uid: uid("s"),
        name: Name::from(&uid("i")),
        tags: Tags::new(),
        generation: Generation(1),
        resource_version: 1,
        created_at: at(0),
        deletion_requested_at: None,
        finalizers: ["schedule".to_owned()].into(),
        owner: None,
    };
    let spec = SnapshotScheduleSpec {
        instance: uid("i"),
        interval: GoDuration(Duration::from_secs(600)),
        since: at(0),
        retention,
        name_prefix: Some("n".to_owned()),
        metadata: Tags::new(),
        updated_at: at(0),
    };
    Object { meta, spec, status: SnapshotScheduleStatus::default() }
}

fn newest(count: u32) -> Retention {
    Retention { max_count: Some(count), max_age: None }
}

/// Returns the due time of the run of that number.
fn due(number: i64) -> Timestamp {
    let first = schedule(newest(1)).spec.after(at(0));
    first + SignedDuration::from_mins(10 * (number - 1))
}

fn taken(number: i64, phase: SnapshotPhase) -> Taken {
    let error = (phase == Failed).then(|| "the disk is full".to_owned());
    let moment = due(number);
    Taken { uid: uid(&format!("t{number}")), due: moment, asked_at: moment, phase, moment, error }
}

fn seen(source: Source, taken: &[Taken]) -> Observed {
    Observed { source, taken: taken.to_vec() }
}

const UP: Source = Source::Ready(SnapshotKind::Standby);

fn shown_plan(plan: &Plan<Action>) -> String {
    match plan {
        Plan::Converged => "Converged".to_owned(),
        Plan::Record(_) => "Record".to_owned(),
        Plan::Wait(_) => "Wait".to_owned(),
        Plan::Refuse(_) => "Refuse".to_owned(),
        Plan::Act(actions) => {
            let each = actions.iter().map(|action| match action {
                Action::Take(plan) => {
                    let number = plan.run.due.duration_since(due(0)).as_secs() / 600;
                    format!("Take {:?} {number} {}", plan.kind, &plan.name[..2])
                }
                Action::Prune(uid) => format!("Prune {}", uid.as_str().trim_end_matches('0')),
            });
            each.collect::<Vec<_>>().join(", ")
        }
    }
}

#[test]
fn what_is_due_is_taken_once_and_what_is_too_much_goes() {
    let aged = |minutes: u64| Retention {
        max_count: None,
        max_age: Some(GoDuration(Duration::from_secs(60 * minutes))),
    };
    let down = Source::Ready(SnapshotKind::Stopped);
    let busy = Source::Busy(State::Initializing);
    let many = [taken(1, Ready), taken(2, Ready), taken(3, Ready)];
    // Each row: retention, last run done, source, existing snapshots, and minutes after the start.
    let table = [
        (newest(2), None, UP, &[][..], 5, "Converged"),
        (newest(2), None, UP, &[], 12, "Take Standby 1 n-"),
        (newest(2), Some(1), UP, &[], 12, "Converged"),
        (newest(2), None, down, &[], 12, "Take Stopped 1 n-"),
        (newest(2), None, busy, &[], 12, "Wait"),
        (newest(2), None, Source::Gone, &[], 12, "Converged"),
        // The snapshot was requested, and then the daemon died before it recorded the run.
        (newest(2), None, UP, &[taken(1, Pending)], 12, "Converged"),
        (newest(2), None, UP, &[taken(1, Pending)], 22, "Wait"),
        // The last of the missed runs is carried out.
        (newest(2), Some(1), UP, &[], 75, "Take Standby 7 n-"),
        (newest(2), Some(3), UP, &many, 32, "Prune t1"),
        (newest(1), Some(3), UP, &many, 32, "Prune t1, Prune t2"),
        (aged(5), Some(3), UP, &many, 32, "Prune t1, Prune t2"),
        (aged(1), Some(3), UP, &many, 35, "Prune t1, Prune t2, Prune t3"),
        (Retention { max_count: Some(0), ..aged(25) }, Some(3), UP, &many, 32, "Converged"),
        // The reason of the failure is recorded before the snapshot is removed.
        (newest(2), Some(1), UP, &[taken(1, Failed)], 12, "Record"),
    ];
    for (retention, last, source, taken, minutes, expected) in table {
        let mut object = schedule(retention);
        object.status.last_due = last.map(due);
        let planned = plan(&Desired::Present(&object), &seen(source, taken), at(minutes).into());
        assert_eq!(shown_plan(&planned), expected, "{retention:?} {last:?} {source:?} {minutes} {taken:?}");
    }
    let object = schedule(newest(1));
    assert_eq!(
        shown_plan(&plan(&Desired::Absent(Some(&object)), &seen(UP, &many), at(99).into())),
        "Converged"
    );
}

fn after_pass(
    object: &Object<SnapshotSchedule>,
    seen: &Observed,
    minutes: i64,
    outcome: Outcome,
) -> SnapshotScheduleStatus {
    status(object, Some(seen), &PassEnd { now: at(minutes).into(), outcome })
}

#[test]
fn the_status_shows_runs_errors_and_the_next_poll() {
    let mut object =
        schedule(Retention { max_count: None, max_age: Some(GoDuration(Duration::from_secs(900))) });
    let now = after_pass(&object, &seen(UP, &[]), 1, Outcome::Converged);
    assert_eq!((now.last_due, now.next_poll), (None, Some(due(1))));
    let now = after_pass(&object, &seen(UP, &[taken(1, Pending)]), 12, Outcome::Converged);
    assert_eq!((now.last_due, now.last_run_at, now.last_snapshot), (Some(due(1)), Some(due(1)), None));
    let now = after_pass(&object, &seen(UP, &[taken(1, Ready)]), 12, Outcome::Converged);
    assert_eq!((now.last_snapshot.clone(), now.last_error.clone()), (Some(uid("t1")), None));
    assert_eq!(now.next_poll, Some(due(2)));
    object.status = now;
    // The snapshot becomes too old before the next snapshot is due.
    let now = after_pass(&object, &seen(UP, &[taken(1, Ready), taken(2, Ready)]), 22, Outcome::Converged);
    assert_eq!(now.next_poll, Some(due(1) + SignedDuration::from_mins(15)));
    // A failure is reported, and stays reported after its snapshot is gone.
    let waiting = Outcome::Waiting(crate::runtime::Wait {
        reason: stead_schemas::condition::Reason::Converging,
        message: "recording".to_owned(),
        until: None,
    });
    object.status = after_pass(&object, &seen(UP, &[taken(2, Failed)]), 22, waiting.clone());
    assert_eq!(object.status.last_error.as_deref(), Some("the disk is full"));
    assert_eq!(
        shown_plan(&plan(&Desired::Present(&object), &seen(UP, &[taken(2, Failed)]), at(22).into())),
        "Prune t2"
    );
    object.status = after_pass(&object, &seen(UP, &[]), 23, Outcome::Converged);
    assert_eq!(object.status.last_error.as_deref(), Some("the disk is full"));
    // A run that is late reports the reason.
    let late = after_pass(&object, &seen(Source::Busy(State::Paused), &[]), 32, waiting);
    assert_eq!(late.last_error.as_deref(), Some("recording"));
    object.status = after_pass(&object, &seen(UP, &[taken(3, Ready)]), 33, Outcome::Converged);
    assert_eq!(object.status.last_error, None);
    // The clock is set back by a day: the runs continue from there.
    let back = after_pass(&object, &seen(UP, &[taken(3, Ready)]), 33 - 24 * 60, Outcome::Converged);
    assert_eq!((back.last_due, back.next_poll), (None, Some(due(1))));
}
