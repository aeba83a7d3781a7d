//! The condition that says whether a VMM is behind its walls, as observed of its process.

use std::collections::BTreeSet;

use stead_schemas::condition::{ConditionStatus, ConditionType, Reason};
use stead_schemas::confinement::Wall;
use stead_schemas::instance::{Instance, InstanceStatus};
use stead_schemas::meta::Object;

use super::Observed;
use super::passing_condition::{self, Found};
use crate::runtime::Moment;

/// Reports the walls of a VMM that lives. Without a VMM there is no such condition.
pub(super) fn report(
    status: &mut InstanceStatus,
    object: &Object<Instance>,
    seen: Option<&Observed>,
    now: Moment,
) {
    let Some(seen) = seen else { return };
    let machine = seen.machine.as_ref().filter(|machine| machine.pid.is_some());
    let found = machine.map(|machine| walls(&machine.missing_walls));
    passing_condition::report(status, object, ConditionType::Confined, found, now);
}

fn walls(missing: &BTreeSet<Wall>) -> Found {
    if missing.is_empty() {
        return Found {
            status: ConditionStatus::True,
            reason: Reason::WallsComplete,
            message: String::new(),
        };
    }
    let missing: Vec<&str> = missing.iter().copied().map(Wall::as_str).collect();
    let message = format!(
        "the VMM is not behind these walls: {}; at its next start it gets those that this daemon makes",
        missing.join(", ")
    );
    Found { status: ConditionStatus::False, reason: Reason::WallsMissing, message }
}

#[cfg(test)]
mod tests {
    use stead_schemas::condition;
    use stead_schemas::instance::Power;

    use super::*;
    use crate::host::{GuestPhase, VmmState};
    use crate::vm::tests::{at, instance, machine, seen};

    #[test]
    fn the_condition_follows_the_process_and_goes_with_it() {
        let object = instance(Power::Running, 1, 0);
        let mut status = object.status.clone();
        let mut machine = machine(VmmState::Running, GuestPhase::Ready);
        let mut report = |machine: &crate::host::Machine| {
            report(&mut status, &object, Some(&seen(Some(machine.clone()))), at(1).into());
            condition::find(&status.conditions, ConditionType::Confined).cloned()
        };
        let complete = report(&machine).expect("reported");
        assert_eq!((complete.status, complete.reason), (ConditionStatus::True, Reason::WallsComplete));
        machine.missing_walls.extend([Wall::User, Wall::Network]);
        let lacking = report(&machine).expect("reported");
        assert_eq!((lacking.status, lacking.reason), (ConditionStatus::False, Reason::WallsMissing));
        assert!(lacking.message.contains("user, network"), "{}", lacking.message);
        machine.pid = None;
        assert_eq!(report(&machine), None);
    }
}
