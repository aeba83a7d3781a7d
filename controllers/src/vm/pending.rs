//! The changes of a spec that wait until the instance has no VM and no memory.

use stead_schemas::condition::{ConditionStatus, ConditionType, Reason};
use stead_schemas::instance::{Instance, InstanceStatus};
use stead_schemas::meta::Object;

use super::Observed;
use super::passing_condition::{self, Found};
use crate::runtime::Moment;

/// Reports the changes that wait. Without any there is no such condition.
pub(super) fn report(
    status: &mut InstanceStatus,
    object: &Object<Instance>,
    seen: Option<&Observed>,
    now: Moment,
) {
    let fields = object.spec.pending.fields();
    let found = (!fields.is_empty()).then(|| Found {
        status: ConditionStatus::True,
        reason: Reason::WaitingForStart,
        message: message(object, seen, &fields),
    });
    passing_condition::report(status, object, ConditionType::PendingChanges, found, now);
}

fn message(object: &Object<Instance>, seen: Option<&Observed>, fields: &[&str]) -> String {
    let mut message = format!("the program sees these changes from its next start on: {}", fields.join(", "));
    let trouble = seen.and_then(|seen| seen.parts.next_image_trouble.as_ref());
    if let Some(why) = trouble.filter(|_| object.next_content().is_none()) {
        message.push_str(&format!("; {why}"));
    }
    if object.spec.pending.restarts && !object.is_restart_due() {
        message.push_str("; it is started again once the new image is on this host");
    }
    message
}
