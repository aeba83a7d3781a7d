//! The changes of a spec that wait until the instance has no VM and no memory.

use stead_schemas::condition::{self, Condition, ConditionStatus, ConditionType, Reason};
use stead_schemas::instance::{Instance, InstanceStatus};
use stead_schemas::limits::MESSAGE_CHARS_MAX;
use stead_schemas::meta::Object;
use stead_schemas::validate::printable;

use super::Observed;
use crate::runtime::Moment;

/// Reports the changes that wait. Without any there is no such condition.
pub(super) fn report(
    status: &mut InstanceStatus,
    object: &Object<Instance>,
    seen: Option<&Observed>,
    now: Moment,
) {
    let fields = object.spec.pending.fields();
    if fields.is_empty() {
        status.conditions.retain(|condition| condition.kind != ConditionType::PendingChanges);
        return;
    }
    let mut message = format!("the program sees these changes from its next start on: {}", fields.join(", "));
    let trouble = seen.and_then(|seen| seen.parts.next_image_trouble.as_ref());
    if let Some(why) = trouble.filter(|_| object.next_content().is_none()) {
        message.push_str(&format!("; {why}"));
    }
    if object.spec.pending.restarts && !object.is_restart_due() {
        message.push_str("; it is started again once the new image is on this host");
    }
    let new = Condition {
        kind: ConditionType::PendingChanges,
        status: ConditionStatus::True,
        reason: Reason::WaitingForStart,
        message: printable(&message, MESSAGE_CHARS_MAX),
        observed_generation: object.meta.generation,
        last_transition_time: now.at(),
    };
    condition::set(&mut status.conditions, new);
}
