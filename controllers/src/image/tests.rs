//! Plans and statuses of images as tables.

use std::collections::BTreeMap;

use jiff::Timestamp;
use stead_schemas::condition::{self, ConditionType, Reason};
use stead_schemas::image::{Image, ImageConfig, ImagePhase, ImageSource, ImageSpec, ImageStatus};
use stead_schemas::meta::{Meta, Object};
use stead_schemas::names::{Digest, ImageRef, Name, Platform, Uid};
use stead_schemas::numbers::Generation;
use stead_schemas::quantity::Bytes;

use super::plan::plan;
use super::status::status;
use super::{Action, Observed};
use crate::host::{HostErrorKind, Job, Layer, Resolved, StoredImage};
use crate::runtime::{Desired, Outcome, PassEnd, Plan};

fn digest(fill: char) -> Digest {
    format!("sha256:{}", fill.to_string().repeat(64)).parse().expect("valid")
}

fn image(recorded: Option<char>) -> Object<Image> {
    let uid: Uid = "tz4a98xxat96iws9zmbrgj3a".parse().expect("valid");
    let reference: ImageRef = "alpine".parse().expect("valid");
    Object {
        meta: Meta {
            uid,
            name: Name::from(&reference),
            tags: BTreeMap::new(),
            generation: Generation(1),
            resource_version: 1,
            created_at: Timestamp::UNIX_EPOCH,
            deletion_requested_at: None,
            finalizers: ["image".to_owned()].into(),
            owner: None,
        },
        spec: ImageSpec { reference, platform: Platform::LinuxAmd64, source: ImageSource::Registry, pull: 1 },
        status: ImageStatus {
            digest: recorded.map(digest),
            resolved_pull: u64::from(recorded.is_some()),
            ..ImageStatus::default()
        },
    }
}

fn seen(present: u64) -> Observed {
    let layer = Layer { digest: digest('b'), size: Bytes(100), present: Bytes(present) };
    let manifest = Resolved { digest: digest('a'), layers: vec![layer] };
    Observed { digest: Some(digest('a')), manifest: Some(manifest), ..Observed::default() }
}

fn stored() -> Observed {
    let config = ImageConfig::default();
    let stored = StoredImage { digest: digest('a'), size: Bytes(1), config };
    Observed { stored: Some(stored), ..seen(100) }
}

fn planned(object: &Object<Image>, seen: &Observed) -> Plan<Action> {
    plan(&Desired::Present(object), seen)
}

fn end(outcome: Outcome) -> PassEnd {
    PassEnd { now: Timestamp::UNIX_EPOCH.into(), outcome }
}

#[test]
fn the_meaning_of_a_tag_is_recorded_before_anything_is_fetched() {
    let fresh = image(None);
    assert!(matches!(planned(&fresh, &seen(0)), Plan::Record(_)));
    let recorded = status(&fresh, Some(&seen(0)), &end(Outcome::Acting));
    assert_eq!((recorded.digest.clone(), recorded.resolved_pull), (Some(digest('a')), 1));
    let object = Object { status: recorded, ..fresh };
    let Plan::Act(actions) = planned(&object, &seen(0)) else { panic!("it fetches now") };
    assert!(matches!(&actions[..], [Action::Fetch { .. }]));
}

#[test]
fn layers_are_fetched_then_converted_then_nothing() {
    let object = image(Some('a'));
    let step = |seen: &Observed| match planned(&object, seen) {
        Plan::Act(actions) => format!("{:?}", actions[0]).split(' ').next().unwrap_or("").to_owned(),
        Plan::Converged => "Converged".to_owned(),
        other => format!("{other:?}").split([' ', '(']).next().unwrap_or("").to_owned(),
    };
    assert_eq!(step(&seen(99)), "Fetch");
    assert_eq!(step(&seen(100)), "Convert");
    assert_eq!(step(&Observed { job: Some(Job::Fetching), ..seen(99) }), "Wait");
    assert_eq!(step(&stored()), "Converged");
    assert_eq!(step(&Observed { unreferenced: vec![digest('c')], ..stored() }), "Remove");
}

#[test]
fn raising_the_pull_asks_the_registry_again_while_the_old_content_stays() {
    let mut object = image(Some('a'));
    object.spec.pull = 2;
    let newer = Observed { digest: Some(digest('d')), ..seen(0) };
    assert!(matches!(planned(&object, &newer), Plan::Record(_)));
    let moved = status(&object, Some(&newer), &end(Outcome::Acting));
    assert_eq!((moved.digest, moved.resolved_pull), (Some(digest('d')), 2));
    object.status.phase = ImagePhase::Ready;
    let failed = Outcome::Failed { kind: HostErrorKind::Transient, message: "down".to_owned(), attempt: 1 };
    assert_eq!(status(&object, None, &end(failed)).phase, ImagePhase::Ready);
}

#[test]
fn phases_progress_and_queue_are_reported_as_observed() {
    let object = image(Some('a'));
    let reported = |seen: &Observed| {
        let status = status(&object, Some(seen), &end(Outcome::Acting));
        (status.phase, status.queue_position, status.progress.map(|progress| progress.done.0))
    };
    let queued = Observed { job: Some(Job::Queued { position: 2 }), ..seen(0) };
    assert_eq!(reported(&queued), (ImagePhase::Pending, Some(2), Some(0)));
    let fetching = Observed { job: Some(Job::Fetching), ..seen(40) };
    assert_eq!(reported(&fetching), (ImagePhase::Pulling, None, Some(40)));
    let converting = Observed { job: Some(Job::Converting), ..seen(100) };
    assert_eq!(reported(&converting), (ImagePhase::Converting, None, Some(100)));
    assert_eq!(reported(&stored()), (ImagePhase::Ready, None, None));
}

#[test]
fn failures_carry_a_reason_of_images_and_a_sentence() {
    let object = image(None);
    for (kind, reason) in [
        (HostErrorKind::Missing, Reason::ImageNotFound),
        (HostErrorKind::Denied, Reason::ImageUnauthorized),
        (HostErrorKind::Permanent, Reason::ImageInvalid),
        (HostErrorKind::Unsupported, Reason::PlatformNotAvailable),
        (HostErrorKind::Transient, Reason::RegistryUnavailable),
    ] {
        let failed = Outcome::Failed { kind, message: "why".to_owned(), attempt: 3 };
        let status = status(&object, None, &end(failed));
        assert_eq!((status.phase, status.attempts), (ImagePhase::Failed, 3));
        assert_eq!(status.error.as_deref(), Some("why"));
        let ready = condition::find(&status.conditions, ConditionType::Ready).expect("always set");
        assert_eq!(ready.reason, reason);
    }
}

#[test]
fn a_deleted_image_takes_along_what_nothing_refers_to_and_no_more() {
    let object = image(Some('a'));
    let absent = |seen: &Observed| plan(&Desired::Absent(Some(&object)), seen);
    assert_eq!(absent(&Observed::default()), Plan::Converged);
    let garbage = Observed { unreferenced: vec![digest('a')], ..Observed::default() };
    assert_eq!(absent(&garbage), Plan::Act(vec![Action::Remove { digest: digest('a') }]));
    let owner = object.meta.uid.clone();
    let busy = Observed { left_over: Some(owner.clone()), ..garbage };
    assert_eq!(absent(&busy), Plan::Act(vec![Action::Forget { owner }]), "what goes on ends first");
}

#[test]
fn the_collectors_id_is_one() {
    assert!(super::COLLECTOR.parse::<Uid>().is_ok());
}

#[test]
fn an_image_stays_ready_while_the_registry_is_asked_again() {
    let mut object = image(Some('a'));
    object.status = status(&object, Some(&stored()), &end(Outcome::Converged));
    object.spec.pull = 2;
    let asking = Observed { digest: None, manifest: None, ..stored() };
    let Plan::Wait(wait) = planned(&object, &asking) else { panic!("it waits") };
    let reported = status(&object, Some(&asking), &end(Outcome::Waiting(wait)));
    assert_eq!(
        (reported.phase, reported.resolved_pull, reported.digest.clone()),
        (ImagePhase::Ready, 1, Some(digest('a')))
    );
    assert!(condition::is_ready(&reported.conditions) && reported.config.is_some());
}

#[test]
fn local_content_that_is_gone_is_reported_and_not_fetched() {
    let mut object = image(None);
    object.spec.source = ImageSource::Local { digest: digest('a') };
    assert_eq!(planned(&object, &stored()), Plan::Converged);
    assert!(matches!(planned(&object, &seen(0)), Plan::Refuse(_)));
}

#[test]
fn a_failed_image_stays_failed_while_it_is_asked_for_again_unless_it_was_posted_anew() {
    let mut object = image(None);
    let failed = Outcome::Failed { kind: HostErrorKind::Transient, message: "down".to_owned(), attempt: 3 };
    object.status = status(&object, None, &end(failed));
    let asking = Observed::default();
    let Plan::Wait(wait) = planned(&object, &asking) else { panic!("it waits") };
    let reported = status(&object, Some(&asking), &end(Outcome::Waiting(wait.clone())));
    assert_eq!(reported, object.status, "no write at every try");
    object.meta.generation = object.meta.generation.next();
    assert_eq!(status(&object, Some(&asking), &end(Outcome::Waiting(wait))).phase, ImagePhase::Pending);
}
