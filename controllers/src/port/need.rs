//! Whether anybody is behind a port, or shall be. A bridge holds 1024 ports, so a VM that is down keeps
//! its addresses and their rule, and gives its TAP back.

use jiff::Timestamp;
use stead_schemas::condition::{self, ConditionType, Reason};
use stead_schemas::instance::{Instance, Power, State};
use stead_schemas::meta::Object;
use stead_schemas::network::Port;

/// A VM, one that is to come, or a door to one in standby.
pub(super) fn is_needed(instance: &Object<Instance>) -> bool {
    let is_up = !matches!(instance.status.state, State::Stopped | State::Standby);
    let is_waking = instance.spec.auto_standby.as_ref().is_some_and(|policy| policy.is_waking());
    let has_ended = instance.spec.run <= instance.status.ended_run;
    let shall_be_up = match instance.spec.power {
        Power::Running | Power::Warm => !has_ended,
        // What is to be saved has to run first.
        Power::Standby => is_waking || (!has_ended && !instance.status.has_saved_memory),
        Power::Stopped => false,
    };
    is_up || shall_be_up
}

/// When it was recorded that it is not needed: nobody starts a VM at it until it is ready again.
pub(super) fn released_at(port: &Object<Port>) -> Option<Timestamp> {
    let ready = condition::find(&port.status.conditions, ConditionType::Ready)?;
    (ready.reason == Reason::NotNeeded).then_some(ready.last_transition_time)
}
