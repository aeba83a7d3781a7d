//! Status of a policy, derived from the end of the pass.

use stead_schemas::mediation::{Mediation, MediationStatus};
use stead_schemas::meta::Object;

use crate::runtime::{PassEnd, conditions};

pub(super) fn status(object: &Object<Mediation>, end: &PassEnd) -> MediationStatus {
    let generation = object.meta.generation;
    MediationStatus {
        conditions: conditions::standard(&object.status.conditions, generation, end),
        observed_generation: generation,
    }
}
