//! Tables of the mediator's plan and status.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::Timestamp;
use stead_schemas::egress::MediatorPorts;
use stead_schemas::limits::{MEDIATOR_LIFE_MIN, MEDIATOR_RELAUNCH_DELAY_FIRST, MEDIATOR_RELAUNCH_DELAY_MAX};
use stead_schemas::mediation::MediatorSpec;
use stead_schemas::meta::{Kind, Meta, Tags};
use stead_schemas::names::Name;
use stead_schemas::numbers::Generation;

use super::plan::plan;
use super::status::status;
use super::*;
use crate::host::MediatorSeen;
use crate::runtime::Outcome;

fn uid() -> Uid {
    format!("m{:023}", 0).parse().expect("valid")
}

fn at(millis: i64) -> Moment {
    Moment::from(Timestamp::from_millisecond(millis).expect("in range"))
}

fn settings(last: u8) -> MediatorSettings {
    MediatorSettings {
        address: [10, 0, 0, last].into(),
        ports: MediatorPorts { captured: 1, explicit: 2, names: 3 },
        subnet: "10.0.0.1/16".parse().expect("valid"),
        dns: Vec::new(),
        open: BTreeSet::new(),
    }
}

fn object() -> Object<Mediator> {
    let meta = Meta {
        uid: uid(),
        name: Name::resource("local").expect("valid"),
        tags: Tags::new(),
        generation: Generation(1),
        resource_version: 1,
        created_at: at(0).at(),
        deletion_requested_at: None,
        finalizers: BTreeSet::from([Mediator::FINALIZER.to_owned()]),
        owner: None,
    };
    Object { meta, spec: MediatorSpec { settings: settings(1) }, status: MediatorStatus::default() }
}

fn process(pid: u32) -> MediatorSeen {
    MediatorSeen { pid, is_current: true, settings: Some(settings(1)) }
}

fn seen(process: Option<MediatorSeen>, is_needed: bool) -> Observed {
    Observed { owner: uid(), process, is_needed }
}

fn shown(plan: &Plan<Action>) -> String {
    match plan {
        Plan::Converged => "Converged".to_owned(),
        Plan::Wait(wait) => format!("Wait {:?}", wait.reason),
        Plan::Act(steps) => steps.iter().map(<&str>::from).collect::<Vec<_>>().join(", "),
        other => format!("{other:?}"),
    }
}

#[test]
fn a_process_runs_while_it_is_needed_with_this_program_and_these_settings() {
    let object = object();
    let outdated = MediatorSeen { is_current: false, ..process(7) };
    let other = MediatorSeen { settings: Some(settings(2)), ..process(7) };
    let silent = MediatorSeen { settings: None, ..process(7) };
    for (process, is_needed, expected) in [
        (None, false, "Wait NotNeeded"),
        (Some(process(7)), false, "Retire"),
        (None, true, "Launch"),
        (Some(process(7)), true, "Converged"),
        (Some(outdated), true, "Retire"),
        (Some(other), true, "Retire"),
        (Some(silent), true, "Retire"),
    ] {
        let seen = seen(process, is_needed);
        assert_eq!(shown(&plan(&Desired::Present(&object), &seen, at(0))), expected, "{seen:?}");
    }
    for absent in [Desired::Absent(Some(&object)), Desired::Absent(None)] {
        assert_eq!(shown(&plan(&absent, &seen(Some(process(7)), true), at(0))), "Retire");
        assert_eq!(shown(&plan(&absent, &seen(None, true), at(0))), "Converged");
    }
}

/// Writes the status of a pass that ended with this process.
fn after(object: &Object<Mediator>, pid: Option<u32>, now: Moment) -> Object<Mediator> {
    let end = PassEnd { now, outcome: Outcome::Converged };
    let status = status(object, Some(&seen(pid.map(process), true)), &end);
    Object { status, ..object.clone() }
}

#[test]
fn a_process_that_ends_again_and_again_is_started_with_growing_delays() {
    let (mut object, mut now, mut delays) = (object(), 0, Vec::new());
    for pid in 1..=8 {
        object = after(&object, Some(pid), at(now));
        object = after(&object, None, at(now));
        let Plan::Wait(wait) = plan(&Desired::Present(&object), &seen(None, true), at(now)) else {
            delays.push(Duration::ZERO);
            continue;
        };
        let until = wait.until.expect("a time").as_millisecond();
        delays.push(Duration::from_millis(u64::try_from(until - now).expect("later")));
        assert_eq!(shown(&plan(&Desired::Present(&object), &seen(None, true), at(until))), "Launch");
        now = until;
    }
    assert_eq!(delays[..2], [Duration::ZERO, MEDIATOR_RELAUNCH_DELAY_FIRST], "the first end costs no time");
    assert!(delays.is_sorted() && delays.last() == Some(&MEDIATOR_RELAUNCH_DELAY_MAX), "{delays:?}");
    assert_eq!(object.status.launches, 8);
    // A process that ran for a while begins the row anew.
    let later = at(now + i64::try_from(MEDIATOR_LIFE_MIN.as_millis()).expect("short"));
    object = after(&after(&object, Some(9), later), None, later);
    assert_eq!(object.status.short_lives, 0);
    assert_eq!(shown(&plan(&Desired::Present(&object), &seen(None, true), later)), "Launch");
}
