//! Status of a port, derived from the observation.

use stead_schemas::meta::Object;
use stead_schemas::network::{Port, PortStatus};

use crate::runtime::{PassEnd, conditions};

pub(super) fn status(object: &Object<Port>, end: &PassEnd) -> PortStatus {
    let generation = object.meta.generation;
    PortStatus {
        conditions: conditions::standard(&object.status.conditions, generation, end),
        observed_generation: generation,
    }
}
