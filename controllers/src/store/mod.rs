//! The typed store over a small trait `Kv`. It depends on no kind.
//!
//! All objects are in memory, shared by `Arc`, and reads use that copy. All writes are transactions: closures
//! that one writer task runs in order. The writer makes whole groups of them durable with one commit
//! (`writer`). Readers see exactly the durable state.
//!
//! Guarantees: an acknowledged write is on disk. The rules of names, generations, finalizers, owners and
//! claims (`tx`) hold in every durable state. A watcher sees every change in order, or gets an error that
//! asks it to list again (`watch`). An unreadable record is never treated as absent (`load`).
//! Never: a reconciler writes a spec, or a client writes a status.
//! Cancel/crash: a dropped `transact` may still be stored. After a crash the store is at the end of some
//! acknowledged or in-flight group, never in the middle of a group.

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

use std::convert::Infallible;
use std::future::Future;
use std::ops::Bound;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};

use jiff::Timestamp;
use stead_schemas::limits::STORE_QUEUE_MAX;
use stead_schemas::meta::{Kind, Object};
use stead_schemas::names::{Name, Uid};
use stead_schemas::references::Ref;
use stead_schemas::resource::Usage;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};

pub use codec::{SealError, Sealer};
pub(crate) use error::absent;
pub use error::{Claimed, StoreError, TooOld, TransactError, TxError};
pub use export::Export;
pub use kv::{Batch, Kv, KvError};
#[cfg(any(test, feature = "sim"))]
pub use memory::{KvFault, MemoryKv, PlainSealer};
pub use object::{Kinds, Unsettled};
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

/// A handle to the store. It is cheap to clone.
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

/// The state that handles and the writer share. The lock is held for single reads, never over an await.
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
    /// Reads the database. The caller has to run the writer; without it transactions wait.
    ///
    /// # Errors
    /// Returns an error if the database cannot be read, holds foreign keys, or has no record that can be
    /// opened.
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

    /// Reports whether writes can be attempted.
    ///
    /// # Errors
    /// Returns an error if the database does not answer, or if the writer has ended.
    pub fn health(&self) -> Result<(), StoreError> {
        if self.queue.is_closed() {
            return Err(StoreError::Closed);
        }
        self.kv.health().map_err(StoreError::from)
    }

    /// Returns the current time of the store's clock. Timestamps in specs and statuses should be compared
    /// with it.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    #[must_use]
    pub fn get<K: Kind>(&self, uid: &Uid) -> Option<Arc<Object<K>>> {
        self.shared.visited(1);
        self.shared.read().table(K::NAME).objects.get(uid).map(typed)
    }

    /// Returns the live object of this name. An object whose deletion was requested is not live.
    #[must_use]
    pub fn find<K: Kind>(&self, name: &Name) -> Option<Arc<Object<K>>> {
        self.shared.visited(1);
        let state = self.shared.read();
        let table = state.table(K::NAME);
        table.objects.get(table.names.get(name)?).map(typed)
    }

    /// Returns all objects of the kind, in uid order.
    #[must_use]
    pub fn list<K: Kind>(&self) -> Vec<Arc<Object<K>>> {
        let all: Vec<_> = self.shared.read().table(K::NAME).objects.values().map(typed).collect();
        self.shared.visited(all.len());
        all
    }

    /// Returns what all objects take of their host.
    #[must_use]
    pub fn usage(&self) -> Usage {
        self.shared.read().usage
    }

    /// Returns all objects of the kind, in uid order, and what all objects take of their host by the same commit.
    #[must_use]
    pub fn list_with_usage<K: Kind>(&self) -> (Vec<Arc<Object<K>>>, Usage) {
        let state = self.shared.read();
        let all: Vec<_> = state.table(K::NAME).objects.values().map(typed).collect();
        self.shared.visited(all.len());
        (all, state.usage)
    }

    /// Returns what a scan of all objects finds that they take. It equals [`Store::usage`] unless there is a fault.
    #[must_use]
    pub fn scanned_usage(&self) -> Usage {
        self.shared.read().scanned_usage()
    }

    /// Returns the uids of all objects of the kind, in order.
    #[must_use]
    pub fn uids<K: Kind>(&self) -> Vec<Uid> {
        let all: Vec<_> = self.shared.read().table(K::NAME).objects.keys().cloned().collect();
        self.shared.visited(all.len());
        all
    }

    /// Returns the objects of the kind whose uid begins with this text, in uid order, at most `max`.
    #[must_use]
    pub fn starting_with<K: Kind>(&self, prefix: &str, max: usize) -> Vec<Arc<Object<K>>> {
        let state = self.shared.read();
        let from = state.table(K::NAME).objects.range::<str, _>((Bound::Included(prefix), Bound::Unbounded));
        let found = from.take_while(|(uid, _)| uid.as_str().starts_with(prefix)).take(max);
        found.map(|(_, object)| self.read(object)).collect()
    }

    /// Returns the objects of the kind that `owner` owns, in uid order.
    #[must_use]
    pub fn owned_by<K: Kind>(&self, owner: &Uid) -> Vec<Arc<Object<K>>> {
        self.referring(&Ref::to_owner(owner))
    }

    /// Returns the objects of the kind that refer to this target, in uid order.
    #[must_use]
    pub fn referring<K: Kind>(&self, reference: &Ref) -> Vec<Arc<Object<K>>> {
        let state = self.shared.read();
        let table = state.table(K::NAME);
        let found = table.index.referring(reference).filter_map(|uid| table.objects.get(uid));
        found.map(|object| self.read(object)).collect()
    }

    /// Returns the first object of the kind that refers to this target and satisfies `fits`.
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

    /// Returns the uids of the objects of the kind that refer to this target, in order.
    #[must_use]
    pub fn uids_referring<K: Kind>(&self, reference: &Ref) -> Vec<Uid> {
        let state = self.shared.read();
        let uids: Vec<Uid> = state.table(K::NAME).index.referring(reference).cloned().collect();
        self.shared.visited(uids.len());
        uids
    }

    /// Returns the references of an object of this kind, the reference to its owner included.
    #[must_use]
    pub fn references(&self, kind: &str, uid: &Uid) -> Vec<Ref> {
        self.shared.visited(1);
        let state = self.shared.read();
        index::references(state.table(kind).objects.get(uid)).into_iter().collect()
    }

    /// Reports whether an object of any kind refers to this target.
    #[must_use]
    pub fn is_referred_to(&self, reference: &Ref) -> bool {
        let state = self.shared.read();
        state.tables.values().any(|table| table.index.referring(reference).next().is_some())
    }

    fn read<K: Kind>(&self, object: &object::Erased) -> Arc<Object<K>> {
        self.shared.visited(1);
        typed(object)
    }

    /// Returns the number of objects that all readers have read since the store was opened. It measures work
    /// independently of the machine.
    #[must_use]
    pub fn visits(&self) -> usize {
        self.shared.visits.load(Ordering::Relaxed)
    }

    /// Returns the references in which the index differs from a scan of all objects. The result is empty
    /// unless there is a fault.
    #[must_use]
    pub fn stale_references(&self) -> Vec<Ref> {
        let state = self.shared.read();
        state.tables.values().flat_map(|table| table.index.difference(&table.scanned())).collect()
    }

    /// Returns the objects of all kinds that wait for their deletion, or whose status is outdated.
    #[must_use]
    pub fn unsettled(&self) -> Vec<Unsettled> {
        let state = self.shared.read();
        state.tables.values().flat_map(|table| table.objects.values().filter_map(Unsettled::of)).collect()
    }

    #[must_use]
    pub fn count<K: Kind>(&self) -> usize {
        self.shared.read().table(K::NAME).objects.len()
    }

    /// Returns the records that cannot be read.
    #[must_use]
    pub fn unreadable(&self) -> Vec<Unreadable> {
        self.shared.read().unreadable.values().cloned().collect()
    }

    /// Returns true if a record of this uid exists and cannot be read. Such a uid is not an orphan.
    #[must_use]
    pub fn is_unreadable(&self, uid: &Uid) -> bool {
        let state = self.shared.read();
        !state.unreadable.is_empty() && state.is_unreadable(uid)
    }

    /// Returns the last durable revision. A watch should start from it after a list.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.shared.read().revision
    }

    /// Runs the closure in the writer against everything staged before it, and stores the steps that it
    /// staged. Returns when they are durable. An error of the closure refuses the whole transaction. The
    /// future is lazy: nothing happens before the first poll. After the first poll, dropping the future does
    /// not cancel the transaction.
    ///
    /// # Errors
    /// Returns a [`TransactError`].
    pub fn transact<T, E, Closure>(
        &self,
        closure: Closure,
    ) -> impl Future<Output = Result<T, TransactError<E>>> + Send + use<T, E, Closure>
    where
        Closure: FnOnce(&mut Tx<'_>) -> Result<T, E> + Send + 'static,
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

    /// Runs the closure in the writer as a transaction would, and stores nothing of it.
    ///
    /// # Errors
    /// Returns the error that the transaction would end with, apart from one of its storage.
    pub async fn rehearse<T, E, Closure>(&self, closure: Closure) -> Result<T, TransactError<E>>
    where
        Closure: FnOnce(&mut Tx<'_>) -> Result<T, E> + Send + 'static,
        T: Send + 'static,
        E: Send + 'static,
    {
        // A transaction that ends with an error leaves nothing.
        let undone = self.transact(move |tx| Err::<Infallible, _>(closure(tx))).await;
        match undone {
            Ok(never) => match never {},
            Err(TransactError::Refused(result)) => result.map_err(TransactError::Refused),
            Err(TransactError::Store(error)) => Err(TransactError::Store(error)),
        }
    }

    /// Replaces the status and nothing else; only reconcilers call it. An equal status costs no commit and
    /// makes no event. Returns `false` then, and if the object is gone.
    ///
    /// # Errors
    /// Returns an error if the status could not be stored.
    pub async fn write_status<K: Kind>(&self, uid: &Uid, status: K::Status) -> Result<bool, StoreError> {
        if self.get::<K>(uid).is_none_or(|object| object.status == status) {
            return Ok(false);
        }
        let uid = uid.clone();
        self.infallible(move |tx| tx.write_status::<K>(&uid, status)).await
    }

    /// Removes the kind's finalizer; a reconciler calls it when nothing of the object is left on the host. If
    /// deletion was requested and this was the last finalizer, the record is removed (`true`), its claims are
    /// free, and the deletion of the objects it owned is requested.
    ///
    /// # Errors
    /// Returns an error if the removal could not be stored.
    pub async fn remove_finalizer<K: Kind>(&self, uid: &Uid) -> Result<bool, StoreError> {
        let uid = uid.clone();
        self.infallible(move |tx| tx.remove_finalizer::<K>(&uid)).await
    }

    async fn infallible<T: Send + 'static>(
        &self,
        closure: impl FnOnce(&mut Tx<'_>) -> T + Send + 'static,
    ) -> Result<T, StoreError> {
        match self.transact(move |tx| Ok::<T, Infallible>(closure(tx))).await {
            Ok(done) => Ok(done),
            Err(TransactError::Store(error)) => Err(error),
            Err(TransactError::Refused(never)) => match never {},
        }
    }

    /// Watches the events after revision `from`, of one kind or of all kinds.
    ///
    /// # Errors
    /// Returns [`TooOld`] if the ring no longer reaches back that far, or if `from` is not a revision of this
    /// store.
    pub fn watch(&self, kind: Option<&'static str>, from: u64) -> Result<Watch, TooOld> {
        Watch::new(self.shared.ring.clone(), kind, from, self.revision())
    }
}
