//! `MemoryKv`: a database in memory that can fail and crash as a real database does.
//!
//! The database simulates the faults that the store must survive: a commit that fails and stored nothing, a commit that
//! fails although its data appears later, a full disk for as long as it is full, a damaged value, and the
//! loss of the process at any commit (`reopen`, `as_of`).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use futures::future::BoxFuture;

use super::codec::{SealError, Sealer};
use super::kv::{Batch, Kv, KvError};

/// The ways in which a commit fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvFault {
    /// The disk is full and nothing was stored.
    Full,
    /// The write failed and nothing was stored.
    Io,
    /// All data was stored, although an error is returned.
    IoAfterStoring,
}

/// A database in memory. Clones share one disk.
#[derive(Debug, Clone, Default)]
pub struct MemoryKv(Arc<Mutex<Disk>>);

type Pairs = BTreeMap<String, Vec<u8>>;

#[derive(Debug, Default)]
struct Disk {
    pairs: Pairs,
    /// All durable commits in order, so that a test can return to each of them.
    history: Vec<Batch>,
    is_full: bool,
    next_fault: Option<KvFault>,
}

impl MemoryKv {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().expect("no code panics while it holds the disk")
    }

    /// Returns the database that a new process finds: a copy of all durable pairs. A writer that still lives
    /// (the crashed process) cannot reach the copy.
    #[must_use]
    pub fn reopen(&self) -> Self {
        let disk = self.disk();
        let copy = Disk { pairs: disk.pairs.clone(), history: disk.history.clone(), ..Disk::default() };
        Self(Arc::new(Mutex::new(copy)))
    }

    /// Returns the disk as it was after the first `commits` durable commits.
    #[must_use]
    pub fn as_of(&self, commits: usize) -> Self {
        let mut copy = Disk::default();
        for batch in self.disk().history.iter().take(commits) {
            copy.store(batch.clone());
        }
        Self(Arc::new(Mutex::new(copy)))
    }

    /// Returns the number of durable commits so far.
    #[must_use]
    pub fn commits(&self) -> usize {
        self.disk().history.len()
    }

    /// Sets whether every commit fails for lack of space from now on.
    pub fn set_full(&self, is_full: bool) {
        self.disk().is_full = is_full;
    }

    /// Makes the next commit fail in this way.
    pub fn fail_next(&self, fault: KvFault) {
        self.disk().next_fault = Some(fault);
    }

    /// Cancels a fault that has not occurred yet.
    pub fn mend(&self) {
        self.disk().next_fault = None;
    }

    /// Damages the value of a key. Returns `false` if the key does not exist.
    pub fn corrupt(&self, key: &str) -> bool {
        match self.disk().pairs.get_mut(key).and_then(|value| value.last_mut()) {
            Some(byte) => {
                *byte ^= 0x40;
                true
            }
            None => false,
        }
    }

    /// Removes a key without the store's knowledge. Returns `false` if the key does not exist.
    pub fn lose(&self, key: &str) -> bool {
        self.disk().pairs.remove(key).is_some()
    }

    #[must_use]
    pub fn keys(&self) -> Vec<String> {
        self.disk().pairs.keys().cloned().collect()
    }
}

impl Disk {
    fn store(&mut self, batch: Batch) {
        for (key, value) in &batch.writes {
            match value {
                Some(value) => self.pairs.insert(key.clone(), value.clone()),
                None => self.pairs.remove(key),
            };
        }
        self.history.push(batch);
    }

    fn commit(&mut self, batch: Batch) -> Result<(), KvError> {
        if self.is_full {
            return Err(KvError::Full("simulated".to_owned()));
        }
        match self.next_fault.take() {
            None => {
                self.store(batch);
                Ok(())
            }
            Some(KvFault::Full) => Err(KvError::Full("simulated".to_owned())),
            Some(KvFault::Io) => Err(KvError::Io("simulated".to_owned())),
            Some(KvFault::IoAfterStoring) => {
                self.store(batch);
                Err(KvError::Io("simulated, after storing".to_owned()))
            }
        }
    }
}

impl Kv for MemoryKv {
    fn load(&self, visit: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), KvError> {
        for (key, value) in &self.disk().pairs {
            visit(key.as_bytes(), value);
        }
        Ok(())
    }

    fn commit(&self, batch: Batch) -> BoxFuture<'_, Result<(), KvError>> {
        Box::pin(async move {
            // The scheduler runs once, so that others run between a write and its durability.
            tokio::task::yield_now().await;
            self.disk().commit(batch)
        })
    }
}

/// A sealer without secrets: a checksum replaces the authentication tag.
#[derive(Debug, Clone, Copy, Default)]
pub struct PlainSealer;

impl PlainSealer {
    fn tag(plain: &[u8], aad: &[u8]) -> [u8; 4] {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(aad);
        hasher.update(plain);
        hasher.finalize().to_be_bytes()
    }
}

impl Sealer for PlainSealer {
    fn seal(&self, plain: &[u8], aad: &[u8]) -> Result<Vec<u8>, SealError> {
        Ok([plain, &Self::tag(plain, aad)].concat())
    }

    fn open(&self, sealed: &[u8], aad: &[u8]) -> Result<Vec<u8>, SealError> {
        match sealed.split_last_chunk::<4>() {
            Some((plain, tag)) if *tag == Self::tag(plain, aad) => Ok(plain.to_vec()),
            _ => Err(SealError("the tag does not match".to_owned())),
        }
    }
}
