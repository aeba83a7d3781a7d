//! What was observed of a network, as its status.

use stead_schemas::condition::{self, Condition, ConditionStatus, ConditionType, Reason};
use stead_schemas::limits::MESSAGE_CHARS_MAX;
use stead_schemas::meta::Object;
use stead_schemas::network::{Network, NetworkStatus};
use stead_schemas::validate::printable;

use super::Observed;
use super::plan::conflict;
use crate::runtime::{Outcome, PassEnd, conditions};

pub(super) fn status(object: &Object<Network>, seen: Option<&Observed>, end: &PassEnd) -> NetworkStatus {
    let previous = &object.status.conditions;
    let generation = object.meta.generation;
    let mut all = conditions::standard(previous, generation, end);
    let route = seen.and_then(|seen| seen.conflicts.first());
    if let (Outcome::Converged, Some(route)) = (&end.outcome, route) {
        // Works, but the host's own traffic to that route may now go to guests.
        let was = condition::find(previous, ConditionType::Degraded);
        let since = was.filter(|was| was.status == ConditionStatus::True);
        all.retain(|condition| condition.kind != ConditionType::Degraded);
        let new = Condition {
            kind: ConditionType::Degraded,
            status: ConditionStatus::True,
            reason: Reason::SubnetConflict,
            message: printable(&conflict(object, route), MESSAGE_CHARS_MAX),
            observed_generation: generation,
            last_transition_time: since.map_or(end.now, |was| was.last_transition_time),
        };
        condition::set(&mut all, new);
    }
    NetworkStatus { conditions: all, observed_generation: generation }
}
