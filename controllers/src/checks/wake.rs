//! The invariant of wake listeners, which wait for connections to VMs in standby.

use std::collections::BTreeSet;
use std::sync::Arc;

use stead_schemas::instance::{Instance, Power, State};
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;

use super::{Broken, HostSnapshot, Records};

/// Checks that a wake listener is at the card of every VM in standby that a connection should wake, and at no
/// other card.
pub(crate) fn listeners(broken: &mut Broken, records: &Records, host: &HostSnapshot) {
    let Some(watched) = &host.watched else { return };
    let is_expected = |instance: &&Arc<Object<Instance>>| {
        let spec = &instance.spec;
        let is_waking =
            spec.auto_standby.as_ref().is_some_and(|policy| policy.enabled && policy.wake_on_traffic);
        // A VM that was woken and waits for its image is in standby still, and needs no further connection.
        let is_asleep = spec.power == Power::Standby && instance.status.state == State::Standby;
        is_waking && spec.has_network && is_asleep
    };
    let expected = records.instances.iter().filter(is_expected).map(|instance| instance.meta.uid.clone());
    let expected: BTreeSet<Uid> = expected.collect();
    if expected != *watched {
        broken.push(format!("wake listeners should be at {expected:?} and are at {watched:?}"));
    }
}
