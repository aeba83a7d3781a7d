//! Tables of the plan of a policy.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use stead_schemas::condition::Reason;
use stead_schemas::egress::{CertificateAuthority, EgressMode};
use stead_schemas::instance::Secret;
use stead_schemas::mediation::MediationSpec;
use stead_schemas::meta::{Kind, Meta, Tags};
use stead_schemas::names::Name;
use stead_schemas::numbers::Generation;

use super::plan::plan;
use super::status::status;
use super::*;
use crate::host::PolicySeen;
use crate::runtime::{Outcome, Wait};

fn uid(first: char) -> Uid {
    format!("{first}{:023}", 0).parse().expect("valid")
}

fn object() -> Object<Mediation> {
    let meta = Meta {
        uid: uid('p'),
        name: Name::from(&uid('p')),
        tags: Tags::new(),
        generation: Generation(1),
        resource_version: 1,
        created_at: Timestamp::UNIX_EPOCH,
        deletion_requested_at: None,
        finalizers: BTreeSet::from([Mediation::FINALIZER.to_owned()]),
        owner: None,
    };
    let spec = MediationSpec {
        instance: uid('i'),
        nic: uid('n'),
        mediator: uid('m'),
        address: [10, 0, 0, 2].into(),
    };
    Object { meta, spec, status: MediationStatus::default() }
}

fn wanted(fingerprint: &str) -> Option<Box<Policy>> {
    Some(Box::new(Policy {
        owner: uid('p'),
        address: [10, 0, 0, 2].into(),
        mode: EgressMode::All,
        is_observing: false,
        allow_hosts: None,
        credentials: BTreeMap::new(),
        authority: CertificateAuthority { certificate: String::new(), key: Secret(String::new()) },
        fingerprint: fingerprint.to_owned(),
    }))
}

/// Returns the observation of a policy with the fingerprint `1` as the desired one.
fn seen(held: Option<&str>, is_needed: bool, is_mediator_ready: bool) -> Observed {
    Observed {
        owner: uid('p'),
        policy: PolicySeen { fingerprint: held.map(str::to_owned), has_log: false },
        wanted: wanted("1"),
        is_needed,
        is_mediator_ready,
        mediator_trouble: None,
    }
}

fn shown(plan: &Plan<Action>) -> String {
    match plan {
        Plan::Converged => "Converged".to_owned(),
        Plan::Wait(wait) => format!("Wait {:?}", wait.reason),
        Plan::Record(record) => format!("Record {:?}", record.reason),
        Plan::Act(steps) => steps.iter().map(<&str>::from).collect::<Vec<_>>().join(", "),
        Plan::Refuse(refusal) => format!("{refusal:?}"),
    }
}

#[test]
fn a_policy_is_put_when_it_is_needed_and_differs() {
    let object = object();
    for (held, is_needed, is_mediator_ready, expected) in [
        (None, true, false, "Wait WaitingForEgress"),
        (Some("1"), true, false, "Wait WaitingForEgress"),
        (None, true, true, "Put"),
        (Some("0"), true, true, "Put"),
        (Some("1"), true, true, "Converged"),
        (None, false, true, "Wait NotNeeded"),
        (Some("1"), false, true, "Record NotNeeded"),
    ] {
        let seen = seen(held, is_needed, is_mediator_ready);
        assert_eq!(shown(&plan(&Desired::Present(&object), &seen)), expected, "{seen:?}");
    }
    let gone = Observed { wanted: None, ..seen(None, true, true) };
    assert_eq!(shown(&plan(&Desired::Present(&object), &gone)), "Wait NotNeeded", "its instance is gone");
}

#[test]
fn a_policy_is_removed_after_its_release_was_recorded() {
    let mut object = object();
    let released = Wait { reason: Reason::NotNeeded, message: String::new(), until: None };
    let end = PassEnd { now: Moment::from(Timestamp::UNIX_EPOCH), outcome: Outcome::Waiting(released) };
    object.status = status(&object, &end);
    assert_eq!(shown(&plan(&Desired::Present(&object), &seen(Some("1"), false, false))), "Remove");
}

#[test]
fn a_deleted_policy_leaves_neither_itself_nor_its_log() {
    let object = object();
    let mut seen = seen(Some("1"), true, true);
    seen.policy.has_log = true;
    for absent in [Desired::Absent(Some(&object)), Desired::Absent(None)] {
        assert_eq!(shown(&plan(&absent, &seen)), "Remove, DiscardLog");
    }
    seen.policy.fingerprint = None;
    assert_eq!(shown(&plan(&Desired::Absent(None), &seen)), "DiscardLog");
    seen.policy.has_log = false;
    assert_eq!(shown(&plan(&Desired::Absent(None), &seen)), "Converged");
}
