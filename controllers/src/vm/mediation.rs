//! The condition of a running guest whose egress is mediated.

use stead_schemas::condition::{ConditionStatus, ConditionType, Reason};
use stead_schemas::instance::{Instance, InstanceStatus};
use stead_schemas::meta::Object;

use super::Observed;
use super::passing_condition::{self, Found};
use crate::runtime::Moment;

/// Reports that a guest which runs has no policy in force: it reaches nothing then.
pub(super) fn report(
    status: &mut InstanceStatus,
    object: &Object<Instance>,
    seen: Option<&Observed>,
    now: Moment,
) {
    let Some(seen) = seen else { return };
    let runs = seen.machine.as_ref().is_some_and(|machine| machine.pid.is_some());
    let is_mediated = object.spec.egress.is_some() && object.spec.allocated.nic.is_some();
    let has_policy = seen.parts.mediation.as_ref().is_some_and(|mediation| mediation.is_ready);
    let found = (runs && is_mediated && !has_policy).then(|| {
        let trouble = seen.parts.mediation.as_ref().and_then(|mediation| mediation.trouble.clone());
        let message = trouble.unwrap_or_else(|| "the policy is not in force yet".to_owned());
        Found { status: ConditionStatus::False, reason: Reason::WaitingForEgress, message }
    });
    passing_condition::report(status, object, ConditionType::EgressMediated, found, now);
}
