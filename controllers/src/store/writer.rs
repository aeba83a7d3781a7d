//! The single writer: it runs transactions in order and makes whole groups of them durable at once.
//!
//! ```text
//! queue -> run closures in order on the stage -> render one batch -> commit (durable)
//!       -> publish to readers -> events -> answer everybody
//! ```
//! Guarantees: nothing is visible or answered before it is durable. A failed commit answers the whole group
//! with its error and shows nothing. A closure that refuses or panics leaves nothing. The answers of a group
//! wait for its commit even if a closure refused, because it may have refused because of another
//! transaction's write in the group.
//! Cancel/crash: if the writer is dropped in a commit, the group's outcome is unknown, as after a crash.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use stead_schemas::limits::STORE_GROUP_MAX;
use tokio::sync::{mpsc, oneshot};
use tracing::{error, warn};

use super::codec::Sealer;
use super::error::{StoreError, TransactError};
use super::kv::{Kv, KvError};
use super::stage::Stage;
use super::tx::Tx;
use super::watch::Event;
use crate::runtime::{Clock, Ids};

/// A transaction with its types erased.
pub(super) trait Job: Send {
    /// Runs the closure. Returns `Ok(false)` if it refused, and `Err` if the rules forbid its result.
    fn run(&mut self, tx: &mut Tx<'_>) -> Result<bool, StoreError>;
    /// Sends the result to the caller.
    fn answer(self: Box<Self>, stored: Result<(), StoreError>);
}

pub(super) struct Transaction<Closure, T, E> {
    pub(super) closure: Option<Closure>,
    pub(super) result: Option<Result<T, E>>,
    pub(super) reply: oneshot::Sender<Result<T, TransactError<E>>>,
}

impl<Closure, T, E> Job for Transaction<Closure, T, E>
where
    Closure: FnOnce(&mut Tx<'_>) -> Result<T, E> + Send,
    T: Send,
    E: Send,
{
    fn run(&mut self, tx: &mut Tx<'_>) -> Result<bool, StoreError> {
        let closure = self.closure.take().expect("a transaction runs once");
        let result = closure(tx);
        let is_kept = result.is_ok();
        self.result = Some(result);
        if is_kept {
            tx.check()?;
        }
        Ok(is_kept)
    }

    fn answer(self: Box<Self>, stored: Result<(), StoreError>) {
        let answer = match (stored, self.result) {
            (Err(error), _) => Err(TransactError::Store(error)),
            (Ok(()), Some(result)) => result.map_err(TransactError::Refused),
            (Ok(()), None) => Err(TransactError::Store(StoreError::Panicked)),
        };
        // A caller that is gone does not need the answer.
        let _ = self.reply.send(answer);
    }
}

/// The writer's half of the store. The caller that opened the store has to run it.
pub struct Writer {
    pub(super) kv: Arc<dyn Kv>,
    pub(super) sealer: Arc<dyn Sealer>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) ids: Arc<dyn Ids>,
    pub(super) queue: mpsc::Receiver<Box<dyn Job>>,
    pub(super) stage: Stage,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer").field("queued", &self.queue.len()).finish_non_exhaustive()
    }
}

impl Writer {
    /// Serves transactions until `shutdown` is ready or every `Store` is gone. Transactions in the queue at
    /// shutdown are still stored and answered; later calls get [`StoreError::Closed`].
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) {
        let mut shutdown = std::pin::pin!(shutdown);
        let mut is_open = true;
        loop {
            let job = tokio::select! {
                biased;
                // Dropping `recv` loses nothing (documented by tokio).
                () = &mut shutdown, if is_open => {
                    is_open = false;
                    self.queue.close();
                    continue;
                }
                job = self.queue.recv() => job,
            };
            let Some(first) = job else { return };
            let mut group = vec![first];
            while group.len() < STORE_GROUP_MAX
                && let Ok(job) = self.queue.try_recv()
            {
                group.push(job);
            }
            self.serve(group).await;
        }
    }

    async fn serve(&mut self, group: Vec<Box<dyn Job>>) {
        // Nothing is staged while nothing can be stored: staged changes that fail must be written again.
        if let Err(error) = self.kv.health() {
            for job in group {
                job.answer(Err(StoreError::from(error.clone())));
            }
            return;
        }
        let now = self.clock.now();
        let growth = self.growth();
        let (mut answers, mut events) = (Vec::with_capacity(group.len()), Vec::new());
        for mut job in group {
            let outcome = self.run_one(&mut *job, now, growth.clone(), &mut events);
            answers.push((job, outcome));
        }
        let stored = if self.stage.is_changed() { self.commit(events).await } else { Ok(()) };
        for (job, outcome) in answers {
            job.answer(stored.clone().and(outcome));
        }
    }

    /// Reports whether new objects can be stored now.
    fn growth(&self) -> Result<(), StoreError> {
        if self.stage.has_too_many_suspects() {
            let reason = "too many writes failed; new objects are taken when one succeeds";
            return Err(StoreError::Database(KvError::Io(reason.to_owned())));
        }
        if self.kv.allows_growth() { Ok(()) } else { Err(StoreError::Full) }
    }

    /// Runs one closure on the stage. Reverses its steps unless it succeeds.
    fn run_one(
        &mut self,
        job: &mut dyn Job,
        now: jiff::Timestamp,
        growth: Result<(), StoreError>,
        events: &mut Vec<Event>,
    ) -> Result<(), StoreError> {
        let mark = self.stage.mark();
        let mut tx = Tx::new(&mut self.stage, &*self.ids, now);
        // The call is unwind safe: steps that the closure left half done on the stage are rolled back below.
        let run = catch_unwind(AssertUnwindSafe(|| job.run(&mut tx)));
        let run = match run {
            Ok(Ok(true)) if tx.has_created() => Ok(growth.map(|()| true)),
            run => run,
        };
        match run {
            Ok(Ok(true)) => {
                events.append(&mut self.stage.take_events());
                Ok(())
            }
            Ok(Ok(false)) => {
                self.stage.roll_back(mark);
                Ok(())
            }
            Ok(Err(refused)) => {
                self.stage.roll_back(mark);
                Err(refused)
            }
            Err(_) => {
                error!("a transaction panicked; nothing of it is kept");
                self.stage.roll_back(mark);
                Err(StoreError::Panicked)
            }
        }
    }

    async fn commit(&mut self, events: Vec<Event>) -> Result<(), StoreError> {
        let stored = match self.stage.render(&*self.sealer) {
            Ok(batch) => self.kv.commit(batch).await.map_err(StoreError::from),
            Err(error) => Err(error),
        };
        match stored {
            Ok(()) => {
                self.stage.publish();
                self.stage.shared.ring.push(events);
            }
            Err(ref error) => {
                warn!(%error, "a group of transactions was not stored");
                self.stage.roll_back(0);
            }
        }
        stored
    }
}
