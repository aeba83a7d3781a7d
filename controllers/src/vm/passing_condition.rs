//! A condition of an instance that exists only while it has something to report.

use stead_schemas::condition::{self, Condition, ConditionStatus, ConditionType, Reason};
use stead_schemas::instance::{Instance, InstanceStatus};
use stead_schemas::limits::MESSAGE_CHARS_MAX;
use stead_schemas::meta::Object;
use stead_schemas::validate::printable;

use crate::runtime::Moment;

/// The content of such a condition. A part of the message may be from a guest.
pub(super) struct Found {
    pub(super) status: ConditionStatus,
    pub(super) reason: Reason,
    pub(super) message: String,
}

/// Sets the condition of a type, or removes it when there is nothing to report.
pub(super) fn report(
    status: &mut InstanceStatus,
    object: &Object<Instance>,
    kind: ConditionType,
    found: Option<Found>,
    now: Moment,
) {
    let Some(found) = found else {
        status.conditions.retain(|condition| condition.kind != kind);
        return;
    };
    let new = Condition {
        kind,
        status: found.status,
        reason: found.reason,
        message: printable(&found.message, MESSAGE_CHARS_MAX),
        observed_generation: object.meta.generation,
        last_transition_time: now.at(),
    };
    condition::set(&mut status.conditions, new);
}
