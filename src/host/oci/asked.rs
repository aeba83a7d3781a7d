//! Background queries to registries: one query per owner, which asks what a reference means.
//!
//! Guarantees: a registry that does not answer delays only the owners that query it, and a client with many queries
//! delays only itself. An answer is kept until its owner takes it. The content named by an answer is not collected
//! before the owner has recorded it.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stead_controllers::host::{HostError, HostErrorKind};
use stead_schemas::names::{ImageRef, Platform, Uid};
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;

use super::clients::Clients;
use super::holds::Hold;
use super::manifest::Manifest;
use super::shares::Shares;

/// Limit on one client's simultaneous queries to one registry. Further ones wait.
const PER_REGISTRY_MAX: usize = 4;
/// Limit on simultaneous queries to all registries together. Each uses a connection.
const QUESTIONS_MAX: usize = 256;

/// Limit on one client's simultaneous queries to all registries together.
const PER_CLIENT_MAX: usize = QUESTIONS_MAX / 4;

/// A query. A higher number repeats it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Question {
    pub(super) reference: ImageRef,
    pub(super) platform: Platform,
    pub(super) number: u64,
}

/// The result of a query: the manifest and the hold on its content.
pub(super) type Answer = Result<(Manifest, Hold), HostError>;

enum State {
    Asking(AbortHandle),
    Answered(Box<Answer>),
}

#[derive(Default)]
struct Table {
    asked: BTreeMap<Uid, (Question, State)>,
    /// Holds on the content of the last answer that each owner took.
    taken: BTreeMap<Uid, Hold>,
}

/// The queries of one daemon. Clones share them.
#[derive(Clone)]
pub(super) struct Questions {
    inner: Arc<Inner>,
}

struct Inner {
    table: Mutex<Table>,
    all: Arc<Semaphore>,
    clients: Clients,
    registries: Shares<(Arc<str>, String)>,
    askers: Shares<Arc<str>>,
}

impl Questions {
    pub(super) fn new(clients: Clients) -> Self {
        let all = Arc::new(Semaphore::new(QUESTIONS_MAX));
        let (registries, askers) = (Shares::of(PER_REGISTRY_MAX), Shares::of(PER_CLIENT_MAX));
        Self { inner: Arc::new(Inner { table: Mutex::default(), all, clients, registries, askers }) }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.inner.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the answer to a query, once. Returns `None` while the query runs, and starts it if necessary.
    /// `changed` is called when the answer has arrived.
    pub(super) fn ask<Work>(
        &self,
        owner: &Uid,
        question: &Question,
        work: impl FnOnce() -> Work,
        changed: impl FnOnce() + Send + 'static,
    ) -> Result<Option<Manifest>, HostError>
    where
        Work: Future<Output = Answer> + Send + 'static,
    {
        let mut table = self.lock();
        match table.asked.remove(owner) {
            Some((asked, State::Answered(answer))) if asked == *question => {
                let (manifest, hold) = (*answer)?;
                // The old hold is dropped outside of the table's lock.
                let old = table.taken.insert(owner.clone(), hold);
                drop(table);
                drop(old);
                return Ok(Some(manifest));
            }
            Some((asked, state @ State::Asking(_))) if asked == *question => {
                table.asked.insert(owner.clone(), (asked, state));
                return Ok(None);
            }
            Some((_, State::Asking(old))) => old.abort(),
            _ => {}
        }
        let client = self.inner.clients.of(owner);
        let own = self.inner.askers.share(client.clone());
        let share = self.inner.registries.share((client, question.reference.registry.clone()));
        let (all, work) = (self.inner.all.clone(), work());
        let task = tokio::spawn(async move {
            let share = share.acquire_owned().await.ok();
            let own = own.acquire_owned().await.ok();
            let permit = all.acquire_owned().await.ok();
            let answer = work.await;
            drop((share, own, permit));
            answer
        });
        let state = State::Asking(task.abort_handle());
        table.asked.insert(owner.clone(), (question.clone(), state));
        drop(table);
        let (questions, owner, question) = (self.clone(), owner.clone(), question.clone());
        tokio::spawn(async move {
            let answer = match task.await {
                Ok(answer) => answer,
                Err(error) if error.is_cancelled() => return,
                Err(_) => Err(panicked(&question)),
            };
            questions.answer(&owner, question, answer);
            changed();
        });
        Ok(None)
    }

    fn answer(&self, owner: &Uid, question: Question, answer: Answer) {
        let mut table = self.lock();
        // Another query may have replaced this one, or the owner may be gone.
        if table.asked.get(owner).is_some_and(|(asked, _)| *asked == question) {
            table.asked.insert(owner.clone(), (question, State::Answered(Box::new(answer))));
        }
    }

    /// Cancels an owner's query and releases its holds.
    pub(super) fn forget(&self, owner: &Uid) {
        let (asked, taken) = {
            let mut table = self.lock();
            (table.asked.remove(owner), table.taken.remove(owner))
        };
        if let Some((_, State::Asking(task))) = &asked {
            task.abort();
        }
        drop((asked, taken));
    }

    /// Releases the hold of an answer, because the owner has recorded it.
    pub(super) fn recorded(&self, owner: &Uid) {
        let taken = self.lock().taken.remove(owner);
        drop(taken);
    }

    pub(super) fn owners(&self) -> BTreeSet<Uid> {
        let table = self.lock();
        table.asked.keys().chain(table.taken.keys()).cloned().collect()
    }
}

fn panicked(question: &Question) -> HostError {
    HostError::new(HostErrorKind::Transient, "ask about", question.reference.to_string())
        .because("the work on it panicked")
}
