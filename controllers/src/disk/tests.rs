//! Tables and properties of the disk plan and status.

use jiff::Timestamp;
use proptest::prelude::*;
use stead_schemas::condition::{self, ConditionStatus, ConditionType, Reason};
use stead_schemas::disk::{DiskPurpose, DiskSpec};
use stead_schemas::limits::DISK_ROOM_MIN;
use stead_schemas::meta::Meta;
use stead_schemas::names::Name;
use stead_schemas::numbers::Generation;

use super::*;
use crate::host::{DiskFile, HostErrorKind, Space};
use crate::runtime::Outcome;

const RESERVE: Bytes = Bytes(1 << 30);
const SIZE: Bytes = Bytes(10 << 30);

fn uid() -> Uid {
    "a00000000000000000000000".parse().expect("valid")
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).expect("in range")
}

fn object(was_created: bool) -> Object<Disk> {
    let meta = Meta {
        uid: uid(),
        name: Name::from(&uid()),
        tags: Default::default(),
        generation: Generation(1),
        resource_version: 1,
        created_at: at(0),
        deletion_requested_at: None,
        finalizers: Default::default(),
        owner: None,
    };
    let spec = DiskSpec::empty(SIZE, DiskPurpose::RootOverlay);
    Object { meta, spec, status: DiskStatus { was_created, ..DiskStatus::default() } }
}

fn file() -> DiskFile {
    DiskFile { owner: uid(), size: SIZE }
}

fn missing(available: u64) -> Observed {
    Observed {
        file: None,
        space: Some(Space { total: SIZE, available: Bytes(available), reserve: RESERVE }),
        source: None,
    }
}

fn present() -> Observed {
    Observed { file: Some(file()), space: None, source: None }
}

const ENOUGH: u64 = RESERVE.0 + DISK_ROOM_MIN.0;

#[test]
fn plans_are_those_of_the_table() {
    let (fresh, lost) = (object(false), object(true));
    let create = || Plan::Act(vec![Action::Create { owner: uid(), size: SIZE }]);
    let remove = || Plan::Act(vec![Action::Remove { owner: uid() }]);
    let plan = |desired: Desired<'_, Disk>, seen: &Observed| plan::plan(&desired, seen, at(5));
    assert_eq!(plan(Desired::Present(&fresh), &missing(ENOUGH)), create());
    assert_eq!(plan(Desired::Present(&fresh), &present()), Plan::Converged);
    assert_eq!(plan(Desired::Present(&lost), &present()), Plan::Converged);
    for record in [Some(&fresh), Some(&lost), None] {
        assert_eq!(plan(Desired::Absent(record), &present()), remove());
        assert_eq!(plan(Desired::Absent(record), &missing(0)), Plan::Converged);
    }
    let Plan::Wait(wait) = plan(Desired::Present(&fresh), &missing(ENOUGH - 1)) else {
        panic!("the reserve is kept")
    };
    assert_eq!(wait.reason, Reason::DiskFull);
    assert!(wait.until.is_some_and(|until| until > at(5)), "free space is announced by nobody");
    let planned = plan(Desired::Present(&lost), &missing(ENOUGH));
    assert!(matches!(planned, Plan::Record(_)), "the loss is recorded before its trace is covered");
}

/// Runs a pass as the runtime does: rounds of plan and act, then the status.
fn pass(object: &mut Object<Disk>, seen: &mut Observed, second: i64) -> Outcome {
    let outcome = loop {
        match plan::plan(&Desired::Present(object), seen, at(second)) {
            Plan::Converged => break Outcome::Converged,
            Plan::Record(record) => break Outcome::Recording(record),
            Plan::Wait(wait) => break Outcome::Waiting(wait),
            Plan::Refuse(refusal) => break Outcome::Refused(refusal),
            Plan::Act(_) => *seen = present(),
        }
    };
    let end = PassEnd { now: at(second).into(), outcome: outcome.clone() };
    object.status = status::status(object, Some(seen), &end);
    outcome
}

#[test]
fn a_lost_file_is_reported_and_replaced_and_stays_reported() {
    let (mut object, mut seen) = (object(false), missing(ENOUGH));
    assert_eq!(pass(&mut object, &mut seen, 1), Outcome::Converged);
    assert!(object.status.was_created && object.status.size == Some(SIZE));
    let degraded = |object: &Object<Disk>| {
        condition::find(&object.status.conditions, ConditionType::Degraded).cloned().expect("set")
    };
    assert_eq!(degraded(&object).status, ConditionStatus::False);

    seen = missing(ENOUGH);
    assert!(matches!(pass(&mut object, &mut seen, 2), Outcome::Recording(_)));
    assert_eq!((object.status.was_created, object.status.content_lost_at), (false, Some(at(2))));
    for second in 3..5 {
        assert_eq!(pass(&mut object, &mut seen, second), Outcome::Converged);
        let degraded = degraded(&object);
        assert_eq!((degraded.status, degraded.reason), (ConditionStatus::True, Reason::HostFault));
        assert_eq!(degraded.last_transition_time, at(2), "it is one continuous trouble");
        assert!(condition::is_ready(&object.status.conditions), "the fresh disk can be used");
    }
}

#[test]
fn a_full_host_is_a_degradation_that_ends_with_it() {
    let (mut object, mut seen) = (object(false), missing(0));
    assert!(matches!(pass(&mut object, &mut seen, 1), Outcome::Waiting(_)));
    let degraded = condition::find(&object.status.conditions, ConditionType::Degraded).expect("set");
    assert_eq!((degraded.status, degraded.reason), (ConditionStatus::True, Reason::DiskFull));
    seen = missing(ENOUGH);
    assert_eq!(pass(&mut object, &mut seen, 2), Outcome::Converged);
    let degraded = condition::find(&object.status.conditions, ConditionType::Degraded).expect("set");
    assert_eq!(degraded.status, ConditionStatus::False);
}

#[test]
fn a_failed_observation_forgets_nothing() {
    let mut object = object(true);
    object.status.size = Some(SIZE);
    let outcome =
        Outcome::Failed { kind: HostErrorKind::Transient, message: "cannot look".to_owned(), attempt: 1 };
    let status = status::status(&object, None, &PassEnd { now: at(9).into(), outcome });
    assert!(status.was_created && status.size == Some(SIZE) && status.content_lost_at.is_none());
}

proptest! {
    /// Checks that passes end with the file present, from any record and any host, unless there is no space.
    #[test]
    fn passes_converge_or_wait_for_room(was_created: bool, is_there: bool, room in 0..2 * ENOUGH) {
        let mut object = object(was_created);
        let mut seen = if is_there { present() } else { missing(room) };
        let mut outcome = pass(&mut object, &mut seen, 1);
        for second in 2..4 {
            outcome = pass(&mut object, &mut seen, second);
        }
        if is_there || room >= ENOUGH {
            prop_assert_eq!(outcome, Outcome::Converged);
            prop_assert_eq!(&seen, &present());
        } else {
            let is_full = matches!(&outcome, Outcome::Waiting(wait) if wait.reason == Reason::DiskFull);
            prop_assert!(is_full, "{outcome:?}");
        }
        prop_assert_eq!(object.status.content_lost_at.is_some(), was_created && !is_there);
        let before = object.status.clone();
        pass(&mut object, &mut seen, 9);
        prop_assert_eq!(before, object.status, "a pass that changes nothing writes nothing");
    }
}
