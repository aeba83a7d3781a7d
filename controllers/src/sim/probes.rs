//! Simulated probes: they ask simulated programs in virtual time, and end with the daemon.

use std::time::Duration;

use stead_schemas::health::Tally;
use stead_schemas::names::Uid;
use tokio::time::{Instant, sleep};

use super::World;
use crate::host::{HostError, HostErrorKind, ProbePlan, ProbeSeen, Probes};
use crate::runtime::Clock;

/// A probe in progress.
#[derive(Debug)]
pub(super) struct Asking {
    plan: ProbePlan,
    tally: Tally,
    begun: Instant,
    /// Number of the `begin` that it belongs to: the timer of an earlier one finds nothing to do.
    serial: u64,
}

impl Asking {
    pub(super) fn seen(&self) -> ProbeSeen {
        ProbeSeen { of: self.plan.of, tally: self.tally.clone() }
    }
}

impl World {
    /// Asks once; returns `None` when this probe was ended.
    fn ask(&self, owner: &Uid, serial: u64) -> Option<Duration> {
        let (time, now) = (self.time(), self.now());
        let mut state = self.lock();
        let is_well = state.machines.get(owner).is_some_and(|vmm| vmm.is_well(time));
        let asking = state.probes.get_mut(owner).filter(|asking| asking.serial == serial)?;
        let found = if is_well { Ok(()) } else { Err("the program does not answer".to_owned()) };
        asking.tally.count(found, now, asking.begun.elapsed() < asking.plan.lenient_for);
        let (is_news, interval) = (asking.tally.is_news(&asking.plan.check), asking.plan.check.interval.0);
        drop(state);
        if is_news {
            self.announce(owner);
        }
        Some(interval)
    }
}

impl Probes for World {
    async fn list(&self) -> Result<Vec<Uid>, HostError> {
        self.verb("list", "probes", |state| Ok(state.probes.keys().cloned().collect())).await
    }

    async fn inspect(&self, owner: &Uid) -> Result<Option<ProbeSeen>, HostError> {
        self.verb("inspect probe", owner.as_str(), |state| Ok(state.probes.get(owner).map(Asking::seen)))
            .await
    }

    async fn begin(&self, plan: &ProbePlan) -> Result<(), HostError> {
        self.verb("begin probe", plan.owner.as_str(), |state| {
            if state.probes.contains_key(&plan.owner) {
                return Err(HostError::new(HostErrorKind::Conflict, "begin probe", plan.owner.as_str()));
            }
            state.probe_serial += 1;
            let serial = state.probe_serial;
            let asking =
                Asking { plan: plan.clone(), tally: plan.tally.clone(), begun: Instant::now(), serial };
            state.probes.insert(plan.owner.clone(), asking);
            // The task belongs to the host: it does not matter to it whether the answer to `begin` is lost.
            let (world, owner) = (self.clone(), plan.owner.clone());
            tokio::spawn(async move {
                tokio::task::yield_now().await;
                while let Some(interval) = world.ask(&owner, serial) {
                    sleep(interval).await;
                }
            });
            Ok(())
        })
        .await
    }

    async fn end(&self, owner: &Uid) -> Result<(), HostError> {
        self.verb("end probe", owner.as_str(), |state| {
            state.probes.remove(owner);
            Ok(())
        })
        .await
    }
}
