//! Invariants of automatic actions on instances: health, restarts of unhealthy programs, and schedules.
//!
//! They are part of `checks` and so independent of every plan.

use stead_schemas::health::Verdict;
use stead_schemas::instance::State;
use stead_schemas::policy::{RestartBlocked, RestartWhen};
use stead_schemas::snapshot::SnapshotPhase;

use super::{Broken, HostSnapshot, Records};

/// Checks that each running program with a health check is probed and no other is, that the verdict agrees
/// with the counts, and that an unhealthy verdict has led to the action of the policy.
pub(crate) fn health(broken: &mut Broken, records: &Records, host: &HostSnapshot) {
    let Some(probes) = &host.probes else { return };
    for uid in probes.keys() {
        if !records.instances.iter().any(|instance| instance.meta.uid == *uid) {
            broken.push(format!("the probe of {uid} is left over"));
        }
    }
    for instance in &records.instances {
        let (uid, spec, status) = (&instance.meta.uid, &instance.spec, &instance.status);
        let machine = host.machines.get(uid).filter(|_| status.state == State::Running);
        let probe = probes.get(uid);
        let (Some(check), Some(machine)) = (&spec.health, machine) else {
            if probe.is_some() {
                broken.push(format!("{uid} is {:?} and probed: {:?}", status.state, spec.health));
            }
            continue;
        };
        let Some(probe) = probe else {
            broken.push(format!("{uid} runs and is not probed"));
            continue;
        };
        if (probe.of.launch, probe.of.version) != (machine.launch, spec.health_version) {
            broken.push(format!("{uid}: another launch or check is probed: {:?}", probe.of));
        }
        let counted = match &probe.tally {
            tally if tally.failures >= check.failure_threshold => Some(Verdict::Unhealthy),
            tally if tally.successes >= check.success_threshold => Some(Verdict::Healthy),
            _ => None,
        };
        let verdict = status.health.verdict;
        if counted.is_some_and(|counted| counted != verdict) {
            broken.push(format!("{uid} is {counted:?}, but its status says {verdict:?}"));
        }
        let is_restarted = spec.restart.when != RestartWhen::Never;
        let is_over = status.restart.blocked == Some(RestartBlocked::MaxAttemptsExceeded);
        if counted == Some(Verdict::Unhealthy) && is_restarted && !is_over {
            broken.push(format!("{uid} is unhealthy and should be restarted: {:?}", status.restart));
        }
    }
}

/// Checks that each schedule has its instance, and no more snapshots than it should keep, and that failed
/// snapshots are gone.
pub(crate) fn schedules(broken: &mut Broken, records: &Records) {
    for schedule in &records.schedules {
        let (uid, spec) = (&schedule.meta.uid, &schedule.spec);
        if !records.instances.iter().any(|instance| instance.meta.uid == spec.instance) {
            broken.push(format!("schedule {uid} has lost its instance"));
        }
        let is_own = |run: &stead_schemas::snapshot::ScheduledRun| run.schedule == *uid;
        let own = records.snapshots.iter().filter(|one| one.spec.schedule.as_ref().is_some_and(is_own));
        let failed = own.clone().filter(|one| one.status.phase == SnapshotPhase::Failed).count();
        let ready = own.filter(|one| one.status.phase == SnapshotPhase::Ready).count();
        if failed > 0 {
            broken.push(format!("schedule {uid} keeps {failed} snapshots that failed"));
        }
        let most = spec.retention.max_count.filter(|&count| count > 0);
        if most.is_some_and(|most| ready > usize::try_from(most).unwrap_or(usize::MAX)) {
            broken.push(format!("schedule {uid} keeps {ready} snapshots: {:?}", spec.retention));
        }
        if schedule.status.next_poll.is_none() {
            broken.push(format!("schedule {uid} waits for nothing"));
        }
    }
}
