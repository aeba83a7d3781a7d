//! Status of an image as clients read it, derived from the observation.

use stead_schemas::condition::{self, ConditionType, Reason};
use stead_schemas::image::{Image, ImagePhase, ImageStatus, Progress};
use stead_schemas::meta::Object;
use stead_schemas::quantity::Bytes;

use super::Observed;
use crate::host::{HostErrorKind, Job};
use crate::runtime::{Outcome, PassEnd, conditions};

pub(super) fn status(object: &Object<Image>, seen: Option<&Observed>, end: &PassEnd) -> ImageStatus {
    let mut status = object.status.clone();
    if is_asked_again(object, seen, end) {
        return status;
    }
    if let Some(seen) = seen {
        if seen.digest.is_some() {
            status.digest.clone_from(&seen.digest);
            status.resolved_pull = object.spec.pull;
        }
        status.config = seen.stored.as_ref().map(|stored| stored.config.clone());
        status.size = seen.stored.as_ref().map(|stored| stored.size);
        status.progress = progress(seen);
        status.queue_position = match seen.job {
            Some(Job::Queued { position }) => Some(position),
            _ => None,
        };
    }
    status.phase = phase(object, seen, end);
    (status.error, status.attempts) = match (&end.outcome, status.phase) {
        (Outcome::Failed { message, attempt, .. }, ImagePhase::Failed) => (Some(message.clone()), *attempt),
        (Outcome::Refused(refusal), _) => (Some(refusal.message.clone()), 1),
        _ => (None, 0),
    };
    status.observed_generation = object.meta.generation;
    status.conditions = conditions::standard(&object.status.conditions, object.meta.generation, end);
    name_failure(&mut status, end);
    if status.phase == ImagePhase::Ready && matches!(end.outcome, Outcome::Waiting(_) | Outcome::Recording(_))
    {
        // The content before stays ready while the registry is asked for the present content.
        let before = condition::find(&object.status.conditions, ConditionType::Ready).cloned();
        before.into_iter().for_each(|ready| condition::set(&mut status.conditions, ready));
    }
    status
}

/// True if the registry is asked once more for an image that failed, although the spec did not change. The
/// recorded failure stays until the answer arrives.
fn is_asked_again(object: &Object<Image>, seen: Option<&Observed>, end: &PassEnd) -> bool {
    let is_asking = seen.is_some_and(|seen| seen.digest.is_none());
    is_asking
        && matches!(end.outcome, Outcome::Waiting(_) | Outcome::Recording(_))
        && object.status.phase == ImagePhase::Failed
        && object.status.observed_generation == object.meta.generation
}

fn phase(object: &Object<Image>, seen: Option<&Observed>, end: &PassEnd) -> ImagePhase {
    if matches!(end.outcome, Outcome::Failed { .. } | Outcome::Refused(_)) {
        // Content on disk stays usable while the registry cannot be asked for newer content.
        let is_still_here = seen.is_none() && object.status.phase == ImagePhase::Ready;
        return if is_still_here { ImagePhase::Ready } else { ImagePhase::Failed };
    }
    let Some(seen) = seen else { return ImagePhase::Pending };
    if seen.stored.is_some() {
        return ImagePhase::Ready;
    }
    match (&seen.job, &seen.manifest) {
        (Some(Job::Queued { .. }), _) | (None, None) => ImagePhase::Pending,
        (Some(Job::Fetching), _) => ImagePhase::Pulling,
        (Some(Job::Converting), _) => ImagePhase::Converting,
        (None, Some(manifest)) if manifest.layers.iter().all(|layer| layer.present >= layer.size) => {
            ImagePhase::Converting
        }
        (None, Some(_)) => ImagePhase::Pulling,
    }
}

fn progress(seen: &Observed) -> Option<Progress> {
    let manifest = seen.manifest.as_ref().filter(|_| seen.stored.is_none())?;
    let sum = |part: fn(&crate::host::Layer) -> u64| {
        Bytes(manifest.layers.iter().map(part).fold(0, u64::saturating_add))
    };
    Some(Progress { done: sum(|layer| layer.present.0), total: sum(|layer| layer.size.0) })
}

/// Replaces the reason of the error's kind by the reason that images use.
fn name_failure(status: &mut ImageStatus, end: &PassEnd) {
    let Outcome::Failed { kind, .. } = &end.outcome else { return };
    let reason = match kind {
        HostErrorKind::Missing => Reason::ImageNotFound,
        HostErrorKind::Denied => Reason::ImageUnauthorized,
        HostErrorKind::Permanent => Reason::ImageInvalid,
        HostErrorKind::Unsupported => Reason::PlatformNotAvailable,
        HostErrorKind::Transient => Reason::RegistryUnavailable,
        HostErrorKind::Exhausted => Reason::CapacityExhausted,
        HostErrorKind::Conflict => Reason::HostFault,
    };
    for kind in [ConditionType::Ready, ConditionType::Degraded] {
        if let Some(condition) = condition::find(&status.conditions, kind).cloned() {
            condition::set(&mut status.conditions, condition::Condition { reason, ..condition });
        }
    }
}
