//! The typed store over a small trait `Kv`; it knows no kind.
//!
//! All objects are in memory, shared by `Arc`; reads look there. All writes are transactions,
//! closures run in order by one writer task, which makes whole groups of them durable with one
//! commit (`writer`). What readers see is exactly what is durable.
//!
//! Guarantees: an acknowledged write is on disk; rules of names, generations, finalizers, owners
//! and claims (`tx`) hold in every durable state; a watcher sees every change in order or is told
//! to list again (`watch`); an unreadable record is never treated as absent (`load`).
//! Never: a spec is written by a reconciler, a status by a client.
//! Cancel/crash: a dropped `transact` may still be stored; after a crash the store is at the end
//! of some acknowledged or in-flight group, never in the middle of one.

mod claims;
mod codec;
mod error;
mod export;
mod index;
mod key;
mod kv;
mod load;
#[cfg(any(test, feature = "sim"))]
mod memory;
mod object;
mod stage;
mod state;
mod tx;
mod watch;
mod writer;

#[cfg(test)]
mod index_tests;
#[cfg(test)]
pub(crate) mod tests;

use std::future::Future;
use std::ops::Bound;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};

use jiff::Timestamp;
use stead_schemas::limits::STORE_QUEUE_MAX;
use stead_schemas::meta::{Kind, Object};
use stead_schemas::names::{Name, Uid};
use stead_schemas::references::Ref;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};

pub use codec::{SealError, Sealer};
pub(crate) use error::absent;
pub use error::{Claimed, StoreError, TooOld, TransactError, TxError};
pub use export::Export;
pub use kv::{Batch, Kv, KvError};
#[cfg(any(test, feature = "sim"))]
pub use memory::{KvFault, MemoryKv, PlainSealer};
pub use object::Kinds;
pub use state::Unreadable;
pub use tx::{New, Tx};
pub use watch::{Change, Event, Watch};
pub use writer::Writer;

use crate::runtime::{Clock, Ids};
use object::typed;
use stage::Stage;
use state::State;
use watch::Ring;
use writer::{Job, Transaction};

/// A handle to the store; cheap to clone.
#[derive(Clone)]
pub struct Store {
    shared: Arc<Shared>,
    queue: mpsc::Sender<Box<dyn Job>>,
    clock: Arc<dyn Clock>,
    kv: Arc<dyn Kv>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("revision", &self.revision()).finish_non_exhaustive()
    }
}

/// What handles and the writer share. The lock is held for single looks, never over an await.
#[derive(Debug)]
struct Shared {
    state: RwLock<State>,
    ring: Arc<Ring>,
    visits: AtomicUsize,
}

impl Shared {
    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().expect("no code panics while it holds the state")
    }
    /// Counts objects that were read.
    fn visited(&self, objects: usize) {
        self.visits.fetch_add(objects, Ordering::Relaxed);
    }
    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().expect("no code panics while it holds the state")
    }
}

impl Store {
    /// Reads the database. The caller runs the writer; without it transactions wait.
    ///
    /// # Errors
    /// When the database cannot be read, holds foreign keys, or none of its records opens.
    pub fn open(
        kv: impl Kv,
        sealer: Arc<dyn Sealer>,
        clock: Arc<dyn Clock>,
        ids: Arc<dyn Ids>,
        kinds: Kinds,
    ) -> Result<(Self, Writer), StoreError> {
        let load::Loaded { state, claims, suspect } = load::load(&kv, &*sealer, &kinds)?;
        let revision = state.revision;
        let shared = Arc::new(Shared {
            state: RwLock::new(state),
            ring: Arc::new(Ring::new(revision)),
            visits: AtomicUsize::new(0),
        });
        let (sender, queue) = mpsc::channel(STORE_QUEUE_MAX);
        let stage = Stage::new(shared.clone(), claims, suspect, revision);
        let kv: Arc<dyn Kv> = Arc::new(kv);
        let writer = Writer { kv: kv.clone(), sealer, clock: clock.clone(), ids, queue, stage };
        Ok((Self { shared, queue: sender, clock, kv }, writer))
    }

    /// Reports whether writes can be tried.
    ///
    /// # Errors
    /// When the database does not answer, or the writer has ended.
    pub fn health(&self) -> Result<(), StoreError> {
        if self.queue.is_closed() {
            return Err(StoreError::Closed);
        }
        self.kv.health().map_err(StoreError::from)
    }

    /// By the clock of what is stored; what is told of times to come is held against it.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    #[must_use]
    pub fn get<K: Kind>(&self, uid: &Uid) -> Option<Arc<Object<K>>> {
        self.shared.visited(1);
        self.shared.read().table(K::NAME).objects.get(uid).map(typed)
    }

    /// The live object of this name: one whose deletion was not requested.
    #[must_use]
    pub fn find<K: Kind>(&self, name: &Name) -> Option<Arc<Object<K>>> {
        self.shared.visited(1);
        let state = self.shared.read();
        let table = state.table(K::NAME);
        table.objects.get(table.names.get(name)?).map(typed)
    }

    /// All objects of the kind, in uid order.
    #[must_use]
    pub fn list<K: Kind>(&self) -> Vec<Arc<Object<K>>> {
        let all: Vec<_> = self.shared.read().table(K::NAME).objects.values().map(typed).collect();
        self.shared.visited(all.len());
        all
    }

    /// Uids of all objects of the kind, in order.
    #[must_use]
    pub fn uids<K: Kind>(&self) -> Vec<Uid> {
        let all: Vec<_> = self.shared.read().table(K::NAME).objects.keys().cloned().collect();
        self.shared.visited(all.len());
        all
    }

    /// Objects of the kind whose uid begins with this text, in uid order; at most so many.
    #[must_use]
    pub fn starting_with<K: Kind>(&self, prefix: &str, max: usize) -> Vec<Arc<Object<K>>> {
        let state = self.shared.read();
        let from = state.table(K::NAME).objects.range::<str, _>((Bound::Included(prefix), Bound::Unbounded));
        let found = from.take_while(|(uid, _)| uid.as_str().starts_with(prefix)).take(max);
        found.map(|(_, object)| self.read(object)).collect()
    }

    /// Objects of the kind that `owner` owns, in uid order.
    #[must_use]
    pub fn owned_by<K: Kind>(&self, owner: &Uid) -> Vec<Arc<Object<K>>> {
        self.referring(&Ref::to_owner(owner))
    }

    /// Objects of the kind that point at this, in uid order.
    #[must_use]
    pub fn referring<K: Kind>(&self, reference: &Ref) -> Vec<Arc<Object<K>>> {
        let state = self.shared.read();
        let table = state.table(K::NAME);
        let found = table.index.referring(reference).filter_map(|uid| table.objects.get(uid));
        found.map(|object| self.read(object)).collect()
    }

    /// The first object of the kind that points at this and fits.
    #[must_use]
    pub fn find_referring<K: Kind>(
        &self,
        reference: &Ref,
        fits: impl Fn(&Object<K>) -> bool,
    ) -> Option<Arc<Object<K>>> {
        let state = self.shared.read();
        let table = state.table(K::NAME);
        let found = table.index.referring(reference).filter_map(|uid| table.objects.get(uid));
        found.map(|object| self.read::<K>(object)).find(|object| fits(object))
    }

    /// Uids of the objects of the kind that point at this, in order.
    #[must_use]
    pub fn uids_referring<K: Kind>(&self, reference: &Ref) -> Vec<Uid> {
        let state = self.shared.read();
        let uids: Vec<Uid> = state.table(K::NAME).index.referring(reference).cloned().collect();
        self.shared.visited(uids.len());
        uids
    }

    /// Reports whether an object of any kind points at this.
    #[must_use]
    pub fn is_referred_to(&self, reference: &Ref) -> bool {
        let state = self.shared.read();
        state.tables.values().any(|table| table.index.referring(reference).next().is_some())
    }

    fn read<K: Kind>(&self, object: &object::Erased) -> Arc<Object<K>> {
        self.shared.visited(1);
        typed(object)
    }

    /// Number of objects that were read since the store was opened, by whomever: a measure of work that does
    /// not depend on the machine.
    #[must_use]
    pub fn visits(&self) -> usize {
        self.shared.visits.load(Ordering::Relaxed)
    }

    /// References in which the index differs from a scan of all objects: none, unless there is a fault.
    #[must_use]
    pub fn stale_references(&self) -> Vec<Ref> {
        let state = self.shared.read();
        state.tables.values().flat_map(|table| table.index.difference(&table.scanned())).collect()
    }

    #[must_use]
    pub fn count<K: Kind>(&self) -> usize {
        self.shared.read().table(K::NAME).objects.len()
    }

    /// Records that cannot be read.
    #[must_use]
    pub fn unreadable(&self) -> Vec<Unreadable> {
        self.shared.read().unreadable.values().cloned().collect()
    }

    /// A record of this uid is there and cannot be read: it is not an orphan.
    #[must_use]
    pub fn is_unreadable(&self, uid: &Uid) -> bool {
        let state = self.shared.read();
        !state.unreadable.is_empty() && state.is_unreadable(uid)
    }

    /// The last durable revision: watch from here after a list.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.shared.read().revision
    }

    /// Runs the closure in the writer against everything staged before it and stores what it
    /// staged; returns when that is durable. The closure's own error refuses the whole
    /// transaction. Lazy: nothing happens before the first poll; once polled, dropping the future
    /// does not take the transaction back.
    ///
    /// # Errors
    /// See [`TransactError`].
    pub fn transact<T, E, F>(
        &self,
        closure: F,
    ) -> impl Future<Output = Result<T, TransactError<E>>> + Send + use<T, E, F>
    where
        F: FnOnce(&mut Tx<'_>) -> Result<T, E> + Send + 'static,
        T: Send + 'static,
        E: Send + 'static,
    {
        let queue = self.queue.clone();
        async move {
            let (reply, answer) = oneshot::channel();
            let job = Box::new(Transaction { closure: Some(closure), result: None, reply });
            queue.try_send(job).map_err(|error| match error {
                TrySendError::Full(_) => StoreError::Overloaded,
                TrySendError::Closed(_) => StoreError::Closed,
            })?;
            answer.await.unwrap_or(Err(TransactError::Store(StoreError::Closed)))
        }
    }

    /// For reconcilers: replaces the status and nothing else. An equal status costs no commit and
    /// makes no event; `false` then, and when the object is gone.
    ///
    /// # Errors
    /// When it could not be stored.
    pub async fn write_status<K: Kind>(&self, uid: &Uid, status: K::Status) -> Result<bool, StoreError> {
        if self.get::<K>(uid).is_none_or(|object| object.status == status) {
            return Ok(false);
        }
        let uid = uid.clone();
        self.infallible(move |tx| tx.write_status::<K>(&uid, status)).await
    }

    /// For reconcilers: nothing of the object is left on the host. When deletion was requested and
    /// this was the last finalizer the record goes (`true`), its claims are free, and what it owned
    /// is to be deleted.
    ///
    /// # Errors
    /// When it could not be stored.
    pub async fn remove_finalizer<K: Kind>(&self, uid: &Uid) -> Result<bool, StoreError> {
        let uid = uid.clone();
        self.infallible(move |tx| tx.remove_finalizer::<K>(&uid)).await
    }

    async fn infallible<T: Send + 'static>(
        &self,
        closure: impl FnOnce(&mut Tx<'_>) -> T + Send + 'static,
    ) -> Result<T, StoreError> {
        match self.transact(move |tx| Ok::<T, std::convert::Infallible>(closure(tx))).await {
            Ok(done) => Ok(done),
            Err(TransactError::Store(error)) => Err(error),
            Err(TransactError::Refused(never)) => match never {},
        }
    }

    /// Events after revision `from`, of one kind or of all.
    ///
    /// # Errors
    /// [`TooOld`] when the ring no longer reaches back that far, or `from` is not of this store.
    pub fn watch(&self, kind: Option<&'static str>, from: u64) -> Result<Watch, TooOld> {
        Watch::new(self.shared.ring.clone(), kind, from, self.revision())
    }
}
