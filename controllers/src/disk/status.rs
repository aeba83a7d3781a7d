//! Status of a disk, derived from the observation.

use stead_schemas::condition::Reason;
use stead_schemas::disk::{Disk, DiskStatus};
use stead_schemas::meta::Object;

use super::Observed;
use crate::runtime::{Outcome, PassEnd, conditions};

const CONTENT_LOST: &str = "the file went missing with its content; a fresh one takes its place (a VM that \
                            was running keeps the old one until it stops)";

pub(super) fn status(object: &Object<Disk>, seen: Option<&Observed>, end: &PassEnd) -> DiskStatus {
    let generation = object.meta.generation;
    let mut status = object.status.clone();
    if let Some(Observed { file, space: _, source: _ }) = seen {
        status.size = file.as_ref().map(|file| file.size);
        if file.is_none() && status.was_created && !object.meta.is_deleting() {
            status.content_lost_at = Some(end.now.at());
        }
        status.was_created = file.is_some();
    }
    status.conditions = conditions::standard(&object.status.conditions, generation, end);
    status.observed_generation = generation;
    let degraded = match &end.outcome {
        Outcome::Failed { .. } | Outcome::Refused(_) => None,
        Outcome::Waiting(wait) if wait.reason == Reason::DiskFull => {
            Some((wait.reason, wait.message.clone()))
        }
        Outcome::Converged | Outcome::Acting | Outcome::Recording(_) | Outcome::Waiting(_) => {
            status.content_lost_at.map(|_| (Reason::HostFault, CONTENT_LOST.to_owned()))
        }
    };
    if let Some((reason, message)) = degraded {
        let previous = &object.status.conditions;
        conditions::degrade(&mut status.conditions, previous, (reason, &message), generation, end.now.at());
    }
    status
}
