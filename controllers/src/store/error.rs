//! Errors of the store as a whole, of a step in a transaction, and of a transaction.

use stead_schemas::names::{Name, Uid};

use super::kv::KvError;

/// A failure of the store. Nothing of the transaction is visible.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The file system is full (HTTP 507). Nothing was stored; reads still work.
    #[error("cannot store: the data directory's file system is full")]
    Full,
    /// The queue of transactions is at its limit (HTTP 503).
    #[error("cannot store: too many writes are waiting")]
    Overloaded,
    /// The writer ended: the daemon is shutting down.
    #[error("cannot store: the store is closed")]
    Closed,
    #[error("cannot store: {0}")]
    Database(KvError),
    /// Sealing or serialising failed.
    #[error("cannot encode {key}: {cause}")]
    Encode { key: String, cause: String },
    /// The closure of a transaction panicked; none of its steps was kept.
    #[error("cannot store: the transaction failed inside")]
    Panicked,
    /// A new object or claim names an owner that is not in the store.
    #[error("cannot store: owner {owner} does not exist")]
    OwnerGone { owner: Uid },
    /// The database holds a key that does not belong to the store.
    #[error("cannot open the store: key {key:?} is not known to this version")]
    ForeignKey { key: String },
    /// No record could be opened, because of another seal key or another format.
    #[error("cannot open the store: none of its {records} records can be read ({cause})")]
    Unopenable { records: usize, cause: String },
}

impl From<KvError> for StoreError {
    fn from(error: KvError) -> Self {
        match error {
            KvError::Full(_) => Self::Full,
            KvError::Corrupt(_) | KvError::Io(_) => Self::Database(error),
        }
    }
}

/// Returns the sentence that refuses a request for an object that does not exist.
pub(crate) fn absent(kind: &str, word: impl std::fmt::Display) -> String {
    format!("there is no {kind} {:?}", word.to_string())
}

/// A step of a transaction that broke a rule. The closure may continue or refuse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TxError {
    #[error("{kind} name {name} is taken by {by}")]
    NameTaken { kind: &'static str, name: Name, by: Uid },
    #[error("{kind} {uid} exists already")]
    UidTaken { kind: &'static str, uid: Uid },
    #[error("{kind} {uid} does not exist")]
    NotFound { kind: &'static str, uid: Uid },
    #[error("{kind} {uid} is being deleted")]
    Deleting { kind: &'static str, uid: Uid },
    /// The comparison with `resource_version` failed.
    #[error("{kind} {uid} was changed: resource version {actual}, not {expected}")]
    Stale { kind: &'static str, uid: Uid, expected: u64, actual: u64 },
    /// The limit [`stead_schemas::limits::OBJECTS_PER_KIND_MAX`] is reached.
    #[error("the store holds the most {kind} objects it may")]
    TooMany { kind: &'static str },
    /// The stored record cannot be read; only `remove_unreadable` can be applied.
    #[error("the record of {kind} {uid} cannot be read")]
    Unreadable { kind: &'static str, uid: Uid },
}

/// A value of a claim table that another owner holds.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("claimed by {by}")]
pub struct Claimed {
    pub by: Uid,
}

/// The reason why a transaction failed: its own closure refused it, or it was not stored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransactError<E> {
    /// The closure returned an error; nothing was staged.
    #[error("refused")]
    Refused(E),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// An error of a watch: the ring no longer holds the events after the requested revision. The caller must
/// list again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too old: events before revision {oldest} are gone, list again")]
pub struct TooOld {
    /// The oldest revision that `watch` accepts now.
    pub oldest: u64,
}
