//! Tests of the life of a snapshot as a table: it is captured once, or fails with a reason.

use jiff::Timestamp;
use stead_schemas::instance::Power;
use stead_schemas::meta::{Meta, Object};
use stead_schemas::names::{Name, Uid};
use stead_schemas::numbers::RunNo;
use stead_schemas::quantity::Bytes;
use stead_schemas::snapshot::{
    CompressionState, SnapshotKind, SnapshotPhase, SnapshotPurpose, SnapshotSpec, SnapshotStatus,
};

use super::observe::standby_source;
use super::plan::{next_poll, plan as planned};
use super::status::status;
use super::*;
use crate::host::{Captured, GuestPhase, HostErrorKind, Machine, Space, VmmState};
use crate::runtime::Outcome;
use crate::vm::{example, example_machine};

fn uid() -> Uid {
    "s00000000000000000000000".parse().expect("valid")
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).expect("in range")
}

fn plan(desired: &Desired<'_, Snapshot>, seen: &Observed, now: Timestamp) -> Plan<Action> {
    planned(desired, seen, now.into())
}

fn snapshot(purpose: SnapshotPurpose, phase: SnapshotPhase) -> Object<Snapshot> {
    let instance = example(Power::Running, 1, 0);
    let meta = Meta { uid: uid(), name: Name::from(&uid()), ..instance.meta.clone() };
    let spec = SnapshotSpec {
        source: instance.meta.uid,
        source_name: instance.meta.name,
        kind: SnapshotKind::Standby,
        name: None,
        purpose,
        schedule: None,
        instance: Box::new(instance.spec),
        image_digest: None,
        compression: None,
        pool: 0,
        volume_disks: Vec::new(),
    };
    Object { meta, spec, status: SnapshotStatus { phase, ..SnapshotStatus::default() } }
}

fn whole() -> Option<Captured> {
    Some(Captured::Whole {
        kind: SnapshotKind::Standby,
        size: Bytes(5),
        captured_at: at(1),
        compression_state: CompressionState::Plain,
    })
}

fn seen(captured: Option<Captured>, source: Option<Source>, available: u64) -> Observed {
    let space = Space { total: Bytes(1000), available: Bytes(available), reserve: Bytes(10) };
    let room = source.filter(|source| *source == Source::Capturable).map(|_| (Bytes(100), space));
    Observed {
        uid: uid(),
        captured,
        is_needed: true,
        pooled: 0,
        warm: 0,
        is_pool_due: false,
        pool_trouble: None,
        source,
        room,
    }
}

fn name(plan: &Plan<Action>) -> &'static str {
    match plan {
        Plan::Converged => "Converged",
        Plan::Act(actions) => match &actions[0] {
            Action::Capture(_) => "Capture",
            Action::Compress(..) => "Compress",
            Action::Remove(_) => "Remove",
            Action::ScalePool(_) => "ScalePool",
            Action::Expire(_) => "Expire",
        },
        Plan::Record(_) => "Record",
        Plan::Wait(_) => "Wait",
        Plan::Refuse(_) => "Refuse",
    }
}

#[test]
fn every_state_has_its_next_step() {
    use SnapshotPhase::{Failed, Pending, Ready};
    use SnapshotPurpose::{Fork, Kept};
    use Source::{Capturable, Gone, Moving};
    let needless = |captured| Observed { is_needed: false, ..seen(captured, None, 0) };
    let table = [
        (Kept, Pending, seen(None, Some(Capturable), 110), "Capture"),
        (Kept, Pending, seen(Some(Captured::Incomplete), Some(Capturable), 110), "Capture"),
        // The space is one byte less than the possible writes and the reserve.
        (Kept, Pending, seen(None, Some(Capturable), 109), "Refuse"),
        (Kept, Pending, seen(None, Some(Moving), 0), "Wait"),
        (Kept, Pending, seen(None, Some(Gone), 0), "Refuse"),
        // The record comes first: compression and pool are planned from it.
        (Kept, Pending, seen(whole(), Some(Capturable), 110), "Record"),
        (Kept, Ready, seen(whole(), None, 0), "Converged"),
        (Kept, Ready, seen(None, None, 0), "Refuse"),
        (Kept, Ready, seen(Some(Captured::Incomplete), None, 0), "Refuse"),
        (Kept, Failed, seen(Some(Captured::Incomplete), None, 0), "Remove"),
        (Kept, Failed, seen(None, None, 0), "Refuse"),
        // A kept snapshot stays although nothing copies from it.
        (Kept, Ready, needless(whole()), "Converged"),
        (Fork, Ready, seen(whole(), None, 0), "Converged"),
        (Fork, Ready, needless(whole()), "Expire"),
        (Fork, Pending, needless(None), "Expire"),
    ];
    for (purpose, phase, seen, expected) in table {
        let object = snapshot(purpose, phase);
        let planned = plan(&Desired::Present(&object), &seen, at(2));
        assert_eq!(name(&planned), expected, "{purpose:?} {phase:?} {seen:?}");
    }
    let untaken = snapshot(Fork, Pending);
    assert_eq!(
        name(&plan(&Desired::Absent(Some(&untaken)), &seen(None, Some(Capturable), 110), at(2))),
        "Converged"
    );
    let object = snapshot(Kept, Ready);
    for record in [Some(&object), None] {
        assert_eq!(name(&plan(&Desired::Absent(record), &needless(whole()), at(2))), "Remove");
        assert_eq!(name(&plan(&Desired::Absent(record), &needless(None), at(2))), "Converged");
    }
    let waits = plan(&Desired::Absent(Some(&object)), &seen(whole(), None, 0), at(2));
    assert_eq!(name(&waits), "Wait", "what copies from it is let finish");
}

/// Checks that a machine does not end a snapshot. The machine is observed while its own reconciler starts it,
/// before the record of its run is written, and releases it. Only the store's record of the run ends a
/// snapshot.
#[test]
fn a_machine_of_another_run_is_one_that_its_own_reconciler_is_changing() {
    let kept = snapshot(SnapshotPurpose::Kept, SnapshotPhase::Pending);
    let run_machine = |run, vmm| Machine { run, ..example_machine(vmm, GuestPhase::Ready) };
    let table = [
        (1, 0, None, Source::Moving),
        (1, 0, Some(run_machine(RunNo(0), VmmState::Dead)), Source::Moving),
        (1, 0, Some(run_machine(RunNo(1), VmmState::Dead)), Source::Moving),
        (1, 0, Some(run_machine(RunNo(1), VmmState::Running)), Source::Capturable),
        (1, 0, Some(run_machine(RunNo(2), VmmState::Running)), Source::Moving),
        (1, 1, Some(run_machine(RunNo(1), VmmState::Running)), Source::Gone),
    ];
    for (run, ended_run, machine, expected) in table {
        let instance = example(Power::Running, run, ended_run);
        let source = standby_source(&instance, &kept.spec, machine.as_ref(), None);
        assert_eq!(source, expected, "{ended_run} {machine:?}");
    }
}

#[test]
fn a_pool_is_scaled_to_its_size_and_reported() {
    let mut object = snapshot(SnapshotPurpose::Kept, SnapshotPhase::Ready);
    object.spec.pool = 2;
    for (pooled, expected) in [(0, "ScalePool"), (1, "ScalePool"), (2, "Converged"), (3, "ScalePool")] {
        let is_pool_due = pooled != object.spec.pool;
        let seen = Observed { pooled, warm: pooled.min(1), is_pool_due, ..seen(whole(), None, 0) };
        assert_eq!(name(&plan(&Desired::Present(&object), &seen, at(2))), expected, "{pooled}");
        let end = PassEnd { now: at(3).into(), outcome: Outcome::Converged };
        assert_eq!(status(&object, Some(&seen), &end).warm, pooled.min(1));
    }
}

#[test]
fn a_failure_is_final_when_the_moment_is_gone_and_not_when_an_observation_failed() {
    use crate::host::HostErrorKind::{Conflict, Exhausted, Permanent, Transient};
    let after = |kind, is_seen: bool| {
        let object = snapshot(SnapshotPurpose::Kept, SnapshotPhase::Pending);
        let outcome = Outcome::Failed { kind, message: "why".to_owned(), attempt: 1 };
        let seen = seen(None, Some(Source::Capturable), 110);
        status(&object, is_seen.then_some(&seen), &PassEnd { now: at(3).into(), outcome })
    };
    for (kind, is_seen, phase) in [
        (Transient, true, SnapshotPhase::Pending),
        (Conflict, true, SnapshotPhase::Pending),
        (Exhausted, true, SnapshotPhase::Failed),
        (Permanent, true, SnapshotPhase::Failed),
        (Exhausted, false, SnapshotPhase::Pending),
    ] {
        assert_eq!(after(kind, is_seen).phase, phase, "{kind:?} {is_seen}");
    }
    assert_eq!(after(Permanent, true).error.as_deref(), Some("why"));
}

#[test]
fn missing_files_are_reported_and_never_captured_again() {
    let mut object = snapshot(SnapshotPurpose::Kept, SnapshotPhase::Pending);
    let mut end = PassEnd { now: at(3).into(), outcome: Outcome::Converged };
    object.status = status(&object, Some(&seen(whole(), None, 0)), &end);
    assert_eq!((object.status.phase, object.status.size), (SnapshotPhase::Ready, Bytes(5)));
    let gone = seen(None, None, 0);
    let Plan::Refuse(refusal) = plan(&Desired::Present(&object), &gone, at(4)) else { panic!("refused") };
    end.outcome = Outcome::Refused(refusal);
    object.status = status(&object, Some(&gone), &end);
    assert_eq!(object.status.phase, SnapshotPhase::Failed);
    assert_eq!(
        name(&plan(&Desired::Present(&object), &seen(None, Some(Source::Capturable), 999), at(5))),
        "Refuse"
    );
}

/// Returns a snapshot that failed at this second, before it was taken or after.
fn failed(purpose: SnapshotPurpose, at_second: i64, was_taken: bool) -> Object<Snapshot> {
    let mut object = snapshot(purpose, SnapshotPhase::Failed);
    object.status.failed_at = Some(at(at_second));
    object.status.error = Some("the disk is full".to_owned());
    object.status.captured_at = was_taken.then(|| at(1));
    object
}

#[test]
fn a_snapshot_that_was_never_taken_is_removed_after_a_while_and_one_that_lost_its_files_stays() {
    use SnapshotPurpose::{Fork, Kept};
    let kept = i64::try_from(stead_schemas::limits::FAILURE_KEPT.as_secs()).expect("short");
    let planned = |object: &Object<Snapshot>, seen: &Observed, now| {
        name(&plan(&Desired::Present(object), seen, at(now)))
    };
    for is_needed in [false, true] {
        let seen = |captured| Observed { is_needed, ..seen(captured, None, 0) };
        for purpose in [Kept, Fork] {
            let object = failed(purpose, 10, false);
            assert_eq!(planned(&object, &seen(Some(Captured::Incomplete)), 11), "Remove", "{purpose:?}");
            assert_eq!(planned(&object, &seen(None), 10 + kept - 1), "Refuse", "{purpose:?}");
            assert_eq!(planned(&object, &seen(None), 10 + kept), "Expire", "{purpose:?}");
            assert_eq!(
                planned(&object, &seen(Some(Captured::Incomplete)), 10 + kept),
                "Expire",
                "{purpose:?}"
            );
            let absent = Desired::Absent(Some(&object));
            assert_eq!(name(&plan(&absent, &seen(None), at(11))), "Converged", "a client deleted it");
            assert_eq!(next_poll(&object, at(11)), Some(at(10 + kept)));
            assert_eq!(next_poll(&object, at(10 + kept)), None, "not for ever");
        }
        assert_eq!(planned(&failed(Kept, 10, true), &seen(None), 10 + kept), "Refuse");
    }
    // A record of an earlier version does not contain the time of the failure.
    let mut object = failed(Kept, 10, false);
    (object.status.failed_at, object.meta.created_at) = (None, at(5));
    assert_eq!(planned(&object, &seen(None, None, 0), 5 + kept), "Expire");
}

#[test]
fn a_clock_that_is_set_back_keeps_no_failure_longer() {
    let object = failed(SnapshotPurpose::Kept, 10_000, false);
    let seen = seen(None, None, 0);
    let planned = plan(&Desired::Present(&object), &seen, at(10));
    let Plan::Refuse(refusal) = planned else { panic!("{planned:?}") };
    let end = PassEnd { now: at(10).into(), outcome: Outcome::Refused(refusal) };
    let next = status(&object, Some(&seen), &end);
    assert_eq!((next.failed_at, next.phase), (Some(at(10)), SnapshotPhase::Failed));
    assert_eq!(next.error.as_deref(), Some("the disk is full"));
}

#[test]
fn a_snapshot_that_failed_gives_its_pool_up() {
    let object = failed(SnapshotPurpose::Kept, 10, true);
    let seen = Observed { pooled: 2, is_pool_due: true, ..seen(None, None, 0) };
    assert_eq!(name(&plan(&Desired::Present(&object), &seen, at(11))), "ScalePool");
}

#[test]
fn trouble_of_a_pool_is_reported_as_that_and_not_as_one_of_the_compression() {
    let mut object = snapshot(SnapshotPurpose::Kept, SnapshotPhase::Ready);
    object.spec.pool = 1;
    let outcome =
        Outcome::Failed { kind: HostErrorKind::Transient, message: "no address".to_owned(), attempt: 1 };
    let end = PassEnd { now: at(3).into(), outcome };
    let seen = Observed { is_pool_due: true, ..seen(whole(), None, 0) };
    let next = status(&object, Some(&seen), &end);
    assert_eq!((next.pool_error.as_deref(), next.compression_error), (Some("no address"), None));
    let seen = Observed { pooled: 1, is_pool_due: false, pool_trouble: Some("it ended".to_owned()), ..seen };
    let end = PassEnd { now: at(4).into(), outcome: Outcome::Converged };
    assert_eq!(status(&object, Some(&seen), &end).pool_error.as_deref(), Some("it ended"));
    let end = PassEnd {
        now: at(4).into(),
        outcome: Outcome::Failed { kind: HostErrorKind::Transient, message: "zstd".to_owned(), attempt: 1 },
    };
    assert_eq!(status(&object, Some(&seen), &end).compression_error.as_deref(), Some("zstd"));
}
