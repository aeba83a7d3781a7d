//! Probes of running programs: one small task for each program with a health check.
//!
//! Guarantees: a probe is bounded in time and memory, whatever the guest does. A probe that this host could not send
//! counts neither as success nor as failure. Results that may change a verdict are announced.
//! Cancel/crash: tasks end with the daemon, and the next daemon begins them again.

mod question;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use stead_controllers::host::{HostError, HostErrorKind, ProbePlan, ProbeSeen, Probes};
use stead_schemas::health::Tally;
use stead_schemas::names::Uid;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior};

pub use question::OpenStream;
use question::{Found, Questions};

/// Time over which the first probes of many programs are spread, so that a daemon that starts on a full host does not
/// send all of them in the same millisecond.
const SPREAD: Duration = Duration::from_millis(500);

/// The configuration of probes.
pub struct ProbeConfig {
    /// Function that opens a stream to the agent of a guest.
    pub open_stream: OpenStream,
    /// Callback that gets an owner with a new result.
    pub changed: Arc<dyn Fn(&Uid) + Send + Sync>,
}

impl std::fmt::Debug for ProbeConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProbeConfig").finish_non_exhaustive()
    }
}

/// The probes of this daemon. Clones share them.
#[derive(Debug, Clone)]
pub struct Prober(Arc<Shared>);

struct Shared {
    questions: Questions,
    changed: Arc<dyn Fn(&Uid) + Send + Sync>,
    /// Probes under way. The lock is held for moments only, never across an await.
    asking: Mutex<BTreeMap<Uid, Asking>>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("asking", &self.asking).finish_non_exhaustive()
    }
}

/// A probe under way. Dropping it cancels the current request.
#[derive(Debug)]
struct Asking {
    seen: Arc<Mutex<ProbeSeen>>,
    task: JoinHandle<()>,
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Prober {
    /// Creates the probes.
    ///
    /// # Errors
    /// Returns an error when the client of HTTP probes cannot be created.
    pub fn new(config: ProbeConfig) -> Result<Self, HostError> {
        let questions = Questions::new(config.open_stream)?;
        Ok(Self(Arc::new(Shared { questions, changed: config.changed, asking: Mutex::default() })))
    }

    /// Returns the results of an owner's probe so far.
    #[must_use]
    pub fn seen(&self, owner: &Uid) -> Option<ProbeSeen> {
        // A probe whose task has ended does not count. It is begun again.
        let asking = self.0.lock();
        let asking = asking.get(owner).filter(|asking| !asking.task.is_finished())?;
        Some(lock(&asking.seen).clone())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Uid, Asking>> {
        lock(&self.asking)
    }

    async fn ask_again_and_again(&self, plan: &ProbePlan, seen: &Mutex<ProbeSeen>) {
        let begun = Instant::now();
        tokio::time::sleep(spread_delay(&plan.owner)).await;
        // The start is arbitrary, because an earlier daemon's connections may still be in the kernel's table.
        let mut attempt = usize::try_from(Timestamp::now().subsec_nanosecond().unsigned_abs()).unwrap_or(0);
        let mut ticks = tokio::time::interval(plan.check.interval.0);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            attempt = attempt.wrapping_add(1);
            let found = match self.questions.ask(plan, attempt).await {
                Found::Well => Ok(()),
                Found::Ill(why) => Err(why),
                Found::NotAsked(why) => {
                    tracing::debug!(owner = %plan.owner, why, "a probe could not be put");
                    continue;
                }
            };
            let is_news = {
                let tally: &mut Tally = &mut lock(seen).tally;
                tally.count(found, Timestamp::now(), begun.elapsed() < plan.lenient_for);
                tally.is_news(&plan.check)
            };
            if is_news {
                (self.changed)(&plan.owner);
            }
        }
    }
}

impl Probes for Prober {
    async fn list(&self) -> Result<Vec<Uid>, HostError> {
        Ok(self.0.lock().keys().cloned().collect())
    }

    async fn inspect(&self, owner: &Uid) -> Result<Option<ProbeSeen>, HostError> {
        Ok(self.seen(owner))
    }

    async fn begin(&self, plan: &ProbePlan) -> Result<(), HostError> {
        if self.seen(&plan.owner).is_some() {
            return Err(HostError::new(HostErrorKind::Conflict, "begin the probe of", plan.owner.as_str()));
        }
        let seen = Arc::new(Mutex::new(ProbeSeen { of: plan.of, tally: plan.tally.clone() }));
        let (shared, for_task, plan) = (self.0.clone(), seen.clone(), plan.clone());
        let owner = plan.owner.clone();
        let task = tokio::spawn(async move { shared.ask_again_and_again(&plan, &for_task).await });
        self.0.lock().insert(owner, Asking { seen, task });
        Ok(())
    }

    async fn end(&self, owner: &Uid) -> Result<(), HostError> {
        self.0.lock().remove(owner);
        Ok(())
    }
}

/// Returns a delay that is always the same for the same owner.
fn spread_delay(owner: &Uid) -> Duration {
    let sum = owner.as_str().bytes().fold(0u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
    SPREAD * (sum % 100) / 100
}

/// Locks a mutex. Its data stays consistent even if a holder panics.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
