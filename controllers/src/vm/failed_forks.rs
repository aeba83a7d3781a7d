//! Forks that failed: the snapshot that they begin with failed, or is gone, before they had all of its
//! content.
//!
//! Guarantees: the fork's own reconciler removes it, whether or not a client waits for it. A fork that has
//! begun, and an instance that was restored in place, are never removed because of a snapshot.

use stead_schemas::condition::Reason;
use stead_schemas::disk::Disk;
use stead_schemas::instance::{Instance, Origin};
use stead_schemas::limits::{FAILURE_KEPT, VERB_WAIT_MAX};
use stead_schemas::meta::Object;
use stead_schemas::snapshot::{Snapshot, SnapshotPhase};

use super::steps::{act, wait};
use super::{Action, Observed, OriginSeen};
use crate::runtime::{Moment, Plan, after};
use crate::store::Tx;

fn origin_of_fork(object: &Object<Instance>) -> Option<&Origin> {
    object.spec.origin.as_ref().filter(|origin| origin.is_fork)
}

/// True if the instance is a fork that can never begin.
pub(super) fn has_failed(object: &Object<Instance>, seen: &Observed) -> bool {
    let is_lost = matches!(seen.parts.origin, Some(OriginSeen::Failed { .. } | OriginSeen::Gone));
    let lacks_something = !seen.parts.was_disk_made || object.awaits_memory().is_some();
    let has_nothing = seen.machine.is_none() && seen.saved(object).is_none();
    origin_of_fork(object).is_some() && is_lost && lacks_something && has_nothing
}

/// Removes a failed fork. A fork whose client still waits for its answer is removed at once: the client reads
/// the reason from the snapshot. A client that was answered before the failure asks for the instance, and
/// finds the reason there.
pub(super) fn plan_failed(object: &Object<Instance>, seen: &Observed, now: Moment) -> Plan<Action> {
    let expire = || act(Action::Expire(object.meta.uid.clone()));
    let Some(OriginSeen::Failed { why, at: Some(failed_at) }) = &seen.parts.origin else { return expire() };
    let was_answered = *failed_at >= after(object.meta.created_at, VERB_WAIT_MAX);
    let until = now.end(*failed_at, FAILURE_KEPT);
    if object.is_pooled() || !was_answered || now.at() >= until {
        return expire();
    }
    let message = format!("the snapshot that it begins with failed: {why}; the fork will be removed");
    wait(Reason::SnapshotFailed, message, Some(until))
}

/// Reports the same from the records, within the transaction that requests the deletion.
pub(super) fn has_failed_in(tx: &Tx<'_>, object: &Object<Instance>) -> bool {
    let Some(origin) = origin_of_fork(object) else { return false };
    let snapshot = tx.get::<Snapshot>(&origin.snapshot);
    let is_lost = snapshot.is_none_or(|snapshot| snapshot.status.phase == SnapshotPhase::Failed);
    let disk = tx.get::<Disk>(&object.spec.allocated.disk);
    let was_disk_made = disk.is_none_or(|disk| disk.status.was_created);
    is_lost && (!was_disk_made || object.awaits_memory().is_some())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use jiff::{SignedDuration, Timestamp};
    use stead_schemas::instance::Power;
    use stead_schemas::numbers::{RunNo, StandbyNo};

    use super::super::tests::{at, instance, machine, name, seen, uid};
    use super::*;
    use crate::host::{GuestPhase, VmmState};
    use crate::runtime::Desired;
    use crate::vm::plan::plan;

    fn fork(power: Power) -> Object<Instance> {
        let mut object = instance(power, 1, 0);
        let memory_for_run = (power != Power::Stopped).then_some(RunNo(1));
        object.spec.origin = Some(Origin {
            snapshot: uid(),
            standby: StandbyNo(1),
            memory_for_run,
            image_digest: None,
            is_fork: true,
        });
        object
    }

    fn failed(at: Option<Timestamp>) -> Option<OriginSeen> {
        Some(OriginSeen::Failed { why: "the disk is full".to_owned(), at })
    }

    /// Returns the name of the plan while there is no machine.
    fn planned(
        object: &Object<Instance>,
        origin: Option<OriginSeen>,
        was_disk_made: bool,
        now: Timestamp,
    ) -> String {
        let mut seen = seen(None);
        (seen.parts.origin, seen.parts.was_disk_made) = (origin, was_disk_made);
        name(&plan(&Desired::Present(object), &seen, now.into()))
    }

    #[test]
    fn a_fork_whose_snapshot_came_to_nothing_is_removed_and_one_that_has_begun_is_not() {
        use Power::{Running, Standby, Stopped, Warm};
        for power in [Running, Standby, Stopped, Warm] {
            for origin in [failed(Some(at(1))), failed(None), Some(OriginSeen::Gone)] {
                assert_eq!(planned(&fork(power), origin.clone(), false, at(2)), "Expire", "{power:?}");
                let mut restored = fork(power);
                restored.spec.origin.as_mut().expect("set").is_fork = false;
                assert_ne!(planned(&restored, origin.clone(), false, at(2)), "Expire", "{power:?}");
                let mut begun = fork(power);
                begun.status.adopted = StandbyNo(1);
                if power != Warm {
                    assert_ne!(planned(&begun, origin, true, at(2)), "Expire", "{power:?}");
                }
            }
            for origin in [OriginSeen::Pending, OriginSeen::Ready, OriginSeen::Unreadable] {
                assert_ne!(planned(&fork(power), Some(origin), false, at(2)), "Expire", "{power:?}");
            }
        }
        // The disk exists, and the memory will never exist.
        assert_eq!(planned(&fork(Running), failed(Some(at(1))), true, at(2)), "Expire");
        // A stopped fork needs its disk only, and no memory.
        assert_ne!(planned(&fork(Stopped), Some(OriginSeen::Gone), true, at(2)), "Expire");
        let mut up = seen(Some(machine(VmmState::Running, GuestPhase::Ready)));
        up.parts.origin = Some(OriginSeen::Gone);
        assert_ne!(name(&plan(&Desired::Present(&fork(Running)), &up, at(2).into())), "Expire");
    }

    #[test]
    fn a_client_that_was_answered_before_the_failure_finds_the_reason_for_a_bounded_time() {
        let object = fork(Power::Running);
        let since = |delay: Duration| {
            object
                .meta
                .created_at
                .saturating_add(SignedDuration::try_from(delay).expect("short"))
                .expect("near")
        };
        let late = since(VERB_WAIT_MAX);
        let until = since(VERB_WAIT_MAX + FAILURE_KEPT);
        let second = SignedDuration::from_secs(1);
        assert_eq!(planned(&object, failed(Some(late)), false, late), "Wait SnapshotFailed");
        assert_eq!(planned(&object, failed(Some(late)), false, until - second), "Wait SnapshotFailed");
        assert_eq!(planned(&object, failed(Some(late)), false, until), "Expire");
        assert_eq!(planned(&object, failed(Some(late - second)), false, late), "Expire", "its client waits");
    }
}
