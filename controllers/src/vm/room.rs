//! The room of the host for the VM of an instance: what a VM in standby waits for, and when its room is given back.
//!
//! Guarantees: an observation only ever gives room back; only admission grants it.

use jiff::Timestamp;
use stead_schemas::condition::{self, ConditionType, Reason};
use stead_schemas::goal::Goal;
use stead_schemas::instance::{Instance, InstanceStatus};
use stead_schemas::limits::ROOM_RETRY;
use stead_schemas::meta::Object;
use stead_schemas::names::Name;
use stead_schemas::node::{LOCAL, Node};

use super::Observed;
use crate::host::VmmState;
use crate::runtime::after;
use crate::store::Store;

/// Returns the resources that the host is short of for the VM of an instance that holds none, in words. The amounts
/// change all the time, and are not in the text.
pub(super) fn short_of(store: &Store, object: &Object<Instance>) -> Option<String> {
    if object.holds_resources() {
        return None;
    }
    let node = store.find::<Node>(&Name::resource(LOCAL).ok()?)?;
    let before = store.usage();
    let mut with_it = before;
    with_it += object.spec.demand();
    let short: Vec<&str> = node.lacks(&before, &with_it).iter().map(|lack| lack.resource.as_str()).collect();
    (!short.is_empty()).then(|| short.join(" and "))
}

/// Records that the instance gave its room back: no VM is there, and none is to come before the next grant.
pub(super) fn record_return(status: &mut InstanceStatus, object: &Object<Instance>, seen: &Observed) {
    let has_vmm = seen.machine.as_ref().is_some_and(|machine| machine.vmm != VmmState::Dead);
    let is_over = match Goal::under(object, status) {
        Goal::Absent | Goal::Stopped => true,
        // A VM whose memory is not saved has to run first.
        Goal::Standby(_) => seen.saved(object).is_some(),
        Goal::Running(_) | Goal::Pooled(_) => false,
    };
    if is_over && !has_vmm {
        status.returned = object.spec.grant;
    }
}

/// Returns the next attempt of an instance that waits for room. Room that is given back wakes it earlier, except in the
/// moment before its wait is recorded.
pub(super) fn next_poll(object: &Object<Instance>, now: Timestamp) -> Option<Timestamp> {
    let ready = condition::find(&object.status.conditions, ConditionType::Ready);
    let is_waiting = ready.is_some_and(|ready| ready.reason == Reason::InsufficientResources);
    is_waiting.then(|| after(now, ROOM_RETRY))
}
