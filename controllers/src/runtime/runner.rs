//! The runner of a kind: it takes due keys, runs their passes, and decides when they are due again.
//!
//! Guarantees: there is one pass per key at a time, and at most `concurrency` passes at once. A panic in a
//! pass is caught here and nowhere else, counts as a failure and is retried. The outcome alone decides the
//! requeue. At shutdown no pass starts, and running passes get `grace` to end.
//! Never: spawns tasks. This one task polls the passes, and a pass that has nothing to wait for ends within
//! the poll that starts it. Adapters run blocking work on threads of their own.
//! Cancel/crash: dropping the runner abandons its passes, which is safe (see `pass`).

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt, poll_immediate};
use futures::stream::{FuturesUnordered, StreamExt};
use jiff::Timestamp;
use stead_schemas::limits::{
    DRIFT_WHILE_FAILING, PASS_GRACE, PASSES_AT_ONCE, PASSES_INLINE_MAX, RESYNC_INTERVAL,
};
use stead_schemas::meta::Kind;
use stead_schemas::names::Uid;
use tokio::time::Instant;
use tracing::{error, info, warn};

use super::clock::Clock;
use super::journal::{Journal, NoJournal};
use super::moment::WatchedClock;
use super::pass::{Boundary, Pass};
use super::queue::Queue;
use super::reconciler::{Outcome, Reconciler};
use super::retry::Retries;
use super::trigger::{Cause, Drift, Signal, Triggers};
use crate::host::HostErrorKind;
use crate::store::{Event, Store};

/// The settings of a runner.
#[derive(Debug, Clone, Copy)]
pub struct RunnerConfig {
    /// Number of passes that may run at once.
    pub concurrency: usize,
    /// Time between two observations of all objects.
    pub resync: Duration,
    /// Time for which running passes may continue after shutdown.
    pub grace: Duration,
    /// Seed of the jitter of retries.
    pub seed: u64,
}

impl RunnerConfig {
    /// Returns the ordinary limits.
    #[must_use]
    pub fn seeded(seed: u64) -> Self {
        Self { concurrency: PASSES_AT_ONCE, resync: RESYNC_INTERVAL, grace: PASS_GRACE, seed }
    }
}

/// A reconciler with everything that it needs to run.
pub struct Runner<Controller: Reconciler> {
    reconciler: Controller,
    store: Store,
    clock: Arc<dyn Clock>,
    boundary: Arc<dyn Boundary>,
    journal: Arc<dyn Journal>,
    config: RunnerConfig,
    triggers: Triggers,
}

impl<Controller: Reconciler> std::fmt::Debug for Runner<Controller> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runner").field("kind", &Controller::Kind::NAME).field("config", &self.config).finish()
    }
}

/// A pass that ended: its outcome, and the time at which its object must be observed again.
struct Ended {
    uid: Uid,
    outcome: std::thread::Result<Outcome>,
    poll_at: Option<Timestamp>,
    /// True if the pass found nothing of the object, neither on the host nor in the store.
    is_gone: bool,
}

impl<Controller: Reconciler> Runner<Controller> {
    /// # Panics
    /// Panics if the configuration allows no pass at all.
    pub fn new(
        reconciler: Controller,
        store: Store,
        clock: Arc<dyn Clock>,
        boundary: Arc<dyn Boundary>,
        config: RunnerConfig,
    ) -> Self {
        assert!(config.concurrency > 0, "a runner without concurrency would wait for ever");
        let triggers = Triggers::new::<Controller::Kind>(store.clone());
        Self { reconciler, store, clock, boundary, journal: Arc::new(NoJournal), config, triggers }
    }

    /// Sets the journal that passes write to.
    #[must_use]
    pub fn with_journal(mut self, journal: Arc<dyn Journal>) -> Self {
        self.journal = journal;
        self
    }

    /// Wakes further objects of this kind on an event of any kind, in addition to those that the kind declares
    /// (`Kind::WOKEN_BY`).
    #[must_use]
    pub fn map(mut self, mapping: impl Fn(&Event) -> Vec<Uid> + Send + Sync + 'static) -> Self {
        self.triggers.map(Box::new(mapping));
        self
    }

    /// Returns the handle by which monitors of the host report possible changes.
    #[must_use]
    pub fn drift(&self) -> Drift {
        self.triggers.drift()
    }

    /// Runs until `shutdown` is ready.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send) {
        let Self { reconciler, store, clock, boundary, journal, config, mut triggers } = self;
        triggers.start(config.resync);
        let clock = WatchedClock::new(clock);
        let pass = Pass {
            reconciler: &reconciler,
            store: &store,
            clock: &clock,
            boundary: &*boundary,
            journal: &*journal,
        };
        let mut schedule =
            Schedule { queue: Queue::default(), retries: Retries::new(config.seed), clock: &clock };
        let mut running = FuturesUnordered::<BoxFuture<'_, Ended>>::new();
        let mut listing = Listing::Idle;
        let mut shutdown = std::pin::pin!(shutdown);
        loop {
            let is_free = running.len() < config.concurrency;
            let due = schedule.queue.next_due().filter(|_| is_free);
            tokio::select! {
                biased;
                () = &mut shutdown => break,
                // The poll that reports an ended pass also takes it out.
                Some(ended) = running.next(), if !running.is_empty() => end::<Controller>(&store, &mut schedule, ended),
                // The call is cancel safe, see `Triggers::next`.
                signal = triggers.next() => {
                    if let Signal::Everything(cause) = signal {
                        schedule.everything(&store.uids::<Controller::Kind>(), cause);
                        listing.begin(&reconciler);
                    }
                    schedule.signal(signal);
                }
                // The listing is kept in `listing` when another arm wins.
                owned = listing.next(&reconciler), if listing.is_running() => {
                    schedule.everything(&owned, Cause::Resync);
                }
                () = until(due), if due.is_some() => {}
            }
            start_due(&pass, &mut schedule, &mut running, config.concurrency).await;
        }
        end_all(running, config.grace, Controller::Kind::NAME).await;
    }
}

/// Waits for a due time. If it has passed, the function yields instead: the timer's resolution is a
/// millisecond, and other tasks can run between batches.
async fn until(due: Option<Instant>) {
    match due {
        Some(due) if due > Instant::now() => tokio::time::sleep_until(due).await,
        _ => tokio::task::yield_now().await,
    }
}

/// Starts due passes up to the limits. Most passes find nothing to do and wait for nothing: they end in their
/// first poll and never enter `running`.
async fn start_due<'a, Controller: Reconciler>(
    pass: &'a Pass<'a, Controller>,
    schedule: &mut Schedule<'_>,
    running: &mut FuturesUnordered<BoxFuture<'a, Ended>>,
    concurrency: usize,
) {
    let now = Instant::now();
    for _ in 0..PASSES_INLINE_MAX {
        if running.len() >= concurrency {
            return;
        }
        let Some(uid) = schedule.queue.pop(now) else { return };
        let failures = schedule.retries.failures(&uid);
        let mut started = contained(pass, uid, failures);
        match poll_immediate(&mut started).await {
            Some(ended) => end::<Controller>(pass.store, schedule, ended),
            None => running.push(started),
        }
    }
}

/// Runs a pass and catches its panic. No other code catches panics of a pass.
fn contained<'a, Controller: Reconciler>(
    pass: &'a Pass<'a, Controller>,
    uid: Uid,
    failures: u32,
) -> BoxFuture<'a, Ended> {
    Box::pin(async move {
        let begun = pass.clock.read().at();
        // The pass is unwind safe: it keeps nothing between runs, and the next pass observes again.
        let outcome = AssertUnwindSafe(pass.run(&uid, failures)).catch_unwind().await;
        let object = pass.store.get::<Controller::Kind>(&uid);
        let is_gone = object.is_none() && matches!(outcome, Ok(Outcome::Converged));
        let poll_at = object.and_then(|object| Controller::next_poll(&object, begun));
        Ended { uid, outcome, poll_at, is_gone }
    })
}

/// Takes an ended pass into the schedule. The store is checked for a record that was created meanwhile: its
/// event may be among the requests that are dropped for an object that is gone.
fn end<Controller: Reconciler>(store: &Store, schedule: &mut Schedule<'_>, mut ended: Ended) {
    ended.is_gone &= store.get::<Controller::Kind>(&ended.uid).is_none();
    schedule.end::<Controller>(ended);
}

async fn end_all(mut running: FuturesUnordered<BoxFuture<'_, Ended>>, grace: Duration, kind: &str) {
    let all_ended = async { while running.next().await.is_some() {} };
    if tokio::time::timeout(grace, all_ended).await.is_err() {
        info!(kind, left = running.len(), "passes were abandoned at shutdown");
    }
}

/// The due times of keys, derived from signals and outcomes.
struct Schedule<'a> {
    queue: Queue,
    retries: Retries,
    clock: &'a WatchedClock,
}

impl Schedule<'_> {
    fn changed(&mut self, uids: &[Uid]) {
        let now = Instant::now();
        for uid in uids {
            self.queue.schedule(uid, now);
        }
    }

    /// Schedules all of these keys. A failing key is not retried before its time, unless the cause is
    /// evidence of a change of it.
    fn everything(&mut self, uids: &[Uid], cause: Cause) {
        for uid in uids {
            match cause {
                Cause::Missed => self.changed(std::slice::from_ref(uid)),
                Cause::Drift => self.drifted(uid),
                Cause::Resync if self.retries.failures(uid) > 0 && self.queue.has(uid) => {}
                Cause::Resync => self.changed(std::slice::from_ref(uid)),
            }
        }
    }

    fn drifted(&mut self, uid: &Uid) {
        // A failing step may cause the drift that is reported: it must not spin.
        let is_failing = self.retries.failures(uid) > 0;
        let delay = if is_failing { DRIFT_WHILE_FAILING } else { Duration::ZERO };
        self.queue.schedule(uid, Instant::now() + delay);
    }

    fn signal(&mut self, signal: Signal) {
        match signal {
            Signal::Changed(uids) => self.changed(&uids),
            Signal::Drifted(uid) => self.drifted(&uid),
            Signal::Everything(_) => {}
        }
    }

    fn end<Controller: Reconciler>(&mut self, Ended { uid, outcome, poll_at, is_gone }: Ended) {
        if is_gone {
            // Changes that the object's own last steps caused would be observed in vain.
            self.queue.gone(&uid);
            return self.retries.reset(&uid);
        }
        self.queue.done(&uid);
        let is_progress = !matches!(outcome, Ok(Outcome::Waiting(_))) || Controller::WAITS_ARE_PROGRESS;
        let delay = match outcome {
            Ok(Outcome::Converged | Outcome::Refused(_)) => None,
            // A negative value means that the time has passed.
            Ok(Outcome::Waiting(wait)) => {
                wait.until.map(|until| self.time_until(until).unwrap_or(Duration::ZERO))
            }
            Ok(Outcome::Acting | Outcome::Recording(_)) => {
                let delay = self.retries.acting(&uid);
                return self.queue.schedule(&uid, Instant::now() + delay);
            }
            Ok(Outcome::Failed { kind, .. }) => return self.retry::<Controller>(&uid, kind),
            Err(panic) => {
                error!(%uid, message = panic_message(&*panic), "a pass panicked");
                return self.retry::<Controller>(&uid, HostErrorKind::Transient);
            }
        };
        if is_progress {
            self.retries.reset(&uid);
        }
        // A time that came during the pass may not have been seen by it.
        let poll_at = poll_at.map(|at| self.time_until(at).unwrap_or(Duration::ZERO));
        let delay = [delay, poll_at].into_iter().flatten().min();
        if let Some(delay) = delay {
            self.queue.schedule(&uid, Instant::now() + delay);
        }
    }

    /// Returns `None` if the time has passed.
    fn time_until(&self, at: Timestamp) -> Option<Duration> {
        Duration::try_from(at.duration_since(self.clock.read().at())).ok()
    }

    fn retry<Controller: Reconciler>(&mut self, uid: &Uid, kind: HostErrorKind) {
        let usual = self.retries.failed(uid, kind);
        let delay = Controller::retry_after(kind).unwrap_or(usual);
        self.queue.schedule(uid, Instant::now() + delay);
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a value that is not text")
}

/// The search for orphans: one listing at a time, and one more if it was requested meanwhile.
enum Listing<'a> {
    Idle,
    Running { list: BoxFuture<'a, Vec<Uid>>, is_asked_again: bool },
}

impl<'a> Listing<'a> {
    fn begin<Controller: Reconciler>(&mut self, reconciler: &'a Controller) {
        match self {
            Self::Idle => {
                *self = Self::Running { list: Box::pin(list_owned(reconciler)), is_asked_again: false };
            }
            Self::Running { is_asked_again, .. } => *is_asked_again = true,
        }
    }

    fn is_running(&self) -> bool {
        matches!(self, Self::Running { .. })
    }

    async fn next<Controller: Reconciler>(&mut self, reconciler: &'a Controller) -> Vec<Uid> {
        let Self::Running { list, is_asked_again } = self else { return Vec::new() };
        let owned = list.await;
        let is_asked_again = *is_asked_again;
        *self = Self::Idle;
        if is_asked_again {
            self.begin(reconciler);
        }
        owned
    }
}

/// Lists until it succeeds, because everything of this kind on the host must become known.
async fn list_owned<Controller: Reconciler>(reconciler: &Controller) -> Vec<Uid> {
    let (mut delay, cap) = (Duration::from_millis(100), Duration::from_secs(30));
    loop {
        match AssertUnwindSafe(reconciler.owned()).catch_unwind().await {
            Ok(Ok(owned)) => return owned,
            Ok(Err(error)) => {
                warn!(kind = Controller::Kind::NAME, error = error.chain(), "cannot list what is owned")
            }
            Err(panic) => {
                error!(kind = Controller::Kind::NAME, message = panic_message(&*panic), "a listing panicked")
            }
        }
        tokio::time::sleep(delay).await;
        delay = (delay * 2).min(cap);
    }
}
