//! Status of a network, derived from the observation.

use stead_schemas::condition::Reason;
use stead_schemas::meta::Object;
use stead_schemas::network::{Network, NetworkStatus};

use super::Observed;
use super::plan::conflict;
use crate::runtime::{Outcome, PassEnd, conditions};

pub(super) fn status(object: &Object<Network>, seen: Option<&Observed>, end: &PassEnd) -> NetworkStatus {
    let previous = &object.status.conditions;
    let generation = object.meta.generation;
    let mut all = conditions::standard(previous, generation, end);
    let route = seen.and_then(|seen| seen.conflicts.first());
    if let (Outcome::Converged, Some(route)) = (&end.outcome, route) {
        // The network works, but the host's own traffic to that route may now go to guests.
        let reported = (Reason::SubnetConflict, conflict(object, route));
        conditions::degrade(&mut all, previous, (reported.0, &reported.1), generation, end.now.at());
    }
    let uplink_mtu = seen.map_or(object.status.uplink_mtu, |seen| seen.uplink_mtu);
    NetworkStatus { conditions: all, observed_generation: generation, uplink_mtu }
}
