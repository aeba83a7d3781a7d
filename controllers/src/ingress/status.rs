//! Status of an ingress, derived from the observation.

use stead_schemas::condition::Reason;
use stead_schemas::ingress::{Ingress, IngressStatus};
use stead_schemas::meta::Object;

use super::Observed;
use super::plan::taken;
use crate::runtime::{PassEnd, conditions};

pub(super) fn status(object: &Object<Ingress>, seen: Option<&Observed>, end: &PassEnd) -> IngressStatus {
    let previous = &object.status.conditions;
    let generation = object.meta.generation;
    let mut all = conditions::standard(previous, generation, end);
    if let Some(message) = seen.and_then(|seen| taken(&seen.taken)) {
        // The open is retried again and again, but an operator has to act.
        conditions::degrade(&mut all, previous, (Reason::PortInUse, &message), generation, end.now.at());
    }
    IngressStatus { conditions: all, observed_generation: generation }
}
