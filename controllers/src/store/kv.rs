//! `Kv`: the few verbs that the store needs from a database.
//!
//! Guarantees required of implementations: `commit` returns `Ok` only when the whole batch is on stable
//! media. A batch is atomic over a crash. After an error the batch may or may not appear later, and the store
//! writes its keys again with the next batch.
//! Cancel/crash: dropping the future of `commit` leaves the outcome unknown, but never half a batch.

use futures::future::BoxFuture;

/// Keys with their new values; `None` removes a key. A key is unique within a batch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    pub writes: Vec<(String, Option<Vec<u8>>)>,
}

/// The kinds of failures that the store must tell apart. The texts carry the whole chain of causes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KvError {
    /// The file system has no space (or quota) left. No acknowledged write is lost, and reads still work.
    #[error("no space left for the database: {0}")]
    Full(String),
    /// The database's own structure is damaged.
    #[error("the database is damaged: {0}")]
    Corrupt(String),
    #[error("the database failed: {0}")]
    Io(String),
}

/// A durable map from keys to values with one writer.
pub trait Kv: Send + Sync + 'static {
    /// Calls `visit` once for every pair, in any order. The store calls it once, at open.
    ///
    /// # Errors
    /// Returns an error if not every pair could be read from the database.
    fn load(&self, visit: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), KvError>;

    /// Returns true if batches with new objects are accepted. They are not on a disk that is nearly full.
    /// Deletions and statuses still are, because they free space and report the shortage.
    fn allows_growth(&self) -> bool {
        true
    }

    /// Reports whether commits can be attempted at all.
    ///
    /// # Errors
    /// Returns the reason while the database does not answer. The store attempts nothing until it answers
    /// again.
    fn health(&self) -> Result<(), KvError> {
        Ok(())
    }

    /// Writes the batch and returns when it is durable.
    fn commit(&self, batch: Batch) -> BoxFuture<'_, Result<(), KvError>>;
}
