//! The record of a port that no VM needs.

use jiff::Timestamp;
use stead_schemas::condition::{self, ConditionType, Reason};
use stead_schemas::meta::Object;
use stead_schemas::network::Nic;

/// Returns when the port was recorded as not needed. No VM is started at it until it is ready again.
pub(super) fn released_at(nic: &Object<Nic>) -> Option<Timestamp> {
    let ready = condition::find(&nic.status.conditions, ConditionType::Ready)?;
    (ready.reason == Reason::NotNeeded).then_some(ready.last_transition_time)
}
