//! Status of a mediator, derived from the observation.

use stead_schemas::limits::MEDIATOR_LIFE_MIN;
use stead_schemas::mediation::{Mediator, MediatorStatus};
use stead_schemas::meta::Object;

use super::Observed;
use crate::runtime::{PassEnd, conditions};

pub(super) fn status(object: &Object<Mediator>, seen: Option<&Observed>, end: &PassEnd) -> MediatorStatus {
    let (before, generation) = (&object.status, object.meta.generation);
    let mut next = MediatorStatus {
        conditions: conditions::standard(&before.conditions, generation, end),
        observed_generation: generation,
        ..before.clone()
    };
    let Some(seen) = seen else { return next };
    next.pid = seen.process.as_ref().map(|process| process.pid);
    if next.pid.is_some() && next.pid != before.pid {
        next.launched_at = Some(end.now.at());
        next.launches = before.launches.saturating_add(1);
        let was_short =
            before.launched_at.is_some_and(|at| end.now.at() < end.now.end(at, MEDIATOR_LIFE_MIN));
        next.short_lives = if was_short { before.short_lives.saturating_add(1) } else { 0 };
    }
    next
}
