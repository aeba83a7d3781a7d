//! What was observed of an ingress, as its status.

use stead_schemas::condition::{self, Condition, ConditionStatus, ConditionType, Reason};
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
        // It is tried again and again, but a person has to see to it.
        let was = condition::find(previous, ConditionType::Degraded);
        let since = was.filter(|was| was.status == ConditionStatus::True);
        all.retain(|condition| condition.kind != ConditionType::Degraded);
        let new = Condition {
            kind: ConditionType::Degraded,
            status: ConditionStatus::True,
            reason: Reason::PortInUse,
            message,
            observed_generation: generation,
            last_transition_time: since.map_or(end.now, |was| was.last_transition_time),
        };
        condition::set(&mut all, new);
    }
    IngressStatus { conditions: all, observed_generation: generation }
}
