//! The need for a port: whether a VM is behind it, or should be. A bridge holds 1,024 ports, so a VM that is
//! down keeps its addresses and their rule, and releases its TAP.

use jiff::Timestamp;
use stead_schemas::condition::{self, ConditionType, Reason};
use stead_schemas::goal::Goal;
use stead_schemas::instance::{Instance, State};
use stead_schemas::meta::Object;
use stead_schemas::network::Port;

/// True if a VM exists or should exist, or if connections should wake a VM in standby.
pub(super) fn is_needed(instance: &Object<Instance>) -> bool {
    let is_up = !matches!(instance.status.state, State::Stopped | State::Standby);
    let is_waking = instance.spec.auto_standby.as_ref().is_some_and(|policy| policy.is_waking());
    let should_be_up = match instance.goal() {
        Goal::Running(_) | Goal::Pooled(_) => true,
        // A VM whose memory is to be saved has to run first.
        Goal::Standby(_) => is_waking || !instance.status.has_saved_memory,
        Goal::Stopped | Goal::Absent => false,
    };
    is_up || should_be_up
}

/// Returns when the port was recorded as not needed. No VM is started at it until it is ready again.
pub(super) fn released_at(port: &Object<Port>) -> Option<Timestamp> {
    let ready = condition::find(&port.status.conditions, ConditionType::Ready)?;
    (ready.reason == Reason::NotNeeded).then_some(ready.last_transition_time)
}
