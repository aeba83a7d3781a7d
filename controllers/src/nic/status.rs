//! Status of a port, derived from the observation.

use stead_schemas::meta::Object;
use stead_schemas::network::{Nic, NicStatus};

use crate::runtime::{PassEnd, conditions};

pub(super) fn status(object: &Object<Nic>, end: &PassEnd) -> NicStatus {
    let generation = object.meta.generation;
    NicStatus {
        conditions: conditions::standard(&object.status.conditions, generation, end),
        observed_generation: generation,
    }
}
