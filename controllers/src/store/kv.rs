//! `Kv`: the few verbs the store asks of a database.
//!
//! Guarantees asked of implementations: `commit` returns `Ok` only when the whole batch is on
//! stable media; a batch is atomic over a crash; after an error the batch may or may not turn up
//! later, and the store writes its keys again with the next batch.
//! Cancel/crash: dropping the future of `commit` leaves the outcome unknown, never half a batch.

use futures::future::BoxFuture;

/// Keys with their new values; `None` removes. Keys are unique within a batch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    pub writes: Vec<(String, Option<Vec<u8>>)>,
}

/// What went wrong, as far as the store must tell it apart. Texts carry the whole chain.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KvError {
    /// No space (or quota) left; nothing acknowledged is lost, reads go on.
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
    /// Calls `visit` once for every pair, in any order; called once, at open.
    ///
    /// # Errors
    /// When not every pair could be read from the database.
    fn load(&self, visit: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), KvError>;

    /// Whether batches with new objects are welcome. On a disk that is nearly full they are not,
    /// while deletions and statuses still are: they are what makes room, and tells of the need.
    fn allows_growth(&self) -> bool {
        true
    }

    /// Reports whether commits can be tried at all.
    ///
    /// # Errors
    /// With the reason, while the database does not answer. Nothing is tried until it is over.
    fn health(&self) -> Result<(), KvError> {
        Ok(())
    }

    /// Writes the batch and returns when it is durable.
    fn commit(&self, batch: Batch) -> BoxFuture<'_, Result<(), KvError>>;
}
