//! The data directory: lock, seal key and the embedded database behind `Kv`.
//!
//! ```text
//! DATA/lock           held by the daemon
//! DATA/keys/seal.key  0600; without it the database cannot be read
//! DATA/keys/jwt.key   0600; signs the API's tokens; the previous key is jwt.old.key
//! DATA/db/            the database
//! DATA/store-mark     a revision that the database has reached
//! ```

pub mod backup;
mod clock;
mod closing;
pub mod identity;
mod lock;
pub mod mark;
mod private;
mod reserve;
mod seal;
mod sled;
mod sled_start;
#[cfg(test)]
mod stall_tests;
mod sync;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stead_controllers::store::{Kinds, KvError, Store, StoreError, Writer};

pub use clock::{CuidIds, SystemClock};
pub use lock::{DirectoryLock, LockError};
pub use private::{close, close_new_files, private_directory};
pub use seal::{KeyBytes, SealKeyError};

use seal::ChaChaSealer;
use sled::SledKv;

/// An open data directory; it must be kept as long as the store is used.
#[derive(Debug)]
pub struct DataDirectory {
    pub store: Store,
    pub writer: Writer,
    /// Frees the directory when dropped.
    pub lock: DirectoryLock,
}

/// The reason why a data directory could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("cannot make the data directory {path}", path = path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error("cannot open the data directory")]
    Lock(#[source] LockError),
    #[error("cannot open the data directory")]
    SealKey(#[source] SealKeyError),
    #[error("cannot open the database")]
    Database(#[source] KvError),
    #[error("cannot open the store")]
    Store(#[source] StoreError),
    #[error("the database has lost what it held")]
    Mark(#[source] mark::MarkError),
}

/// Returns the key that signs the API's tokens; makes it when there is none. Works beside a running daemon.
///
/// # Errors
/// Fails when it cannot be read or made, or is open to other users.
pub fn token_key(directory: &Path) -> Result<KeyBytes, SealKeyError> {
    seal::read_or_create(&directory.join("keys").join("jwt.key"))
}

/// Returns the key that signs the API's tokens, followed by the previous key as long as that is kept.
///
/// # Errors
/// Fails when a key cannot be read or is open to other users, or when there is no key that signs.
pub fn token_keys(directory: &Path) -> Result<Vec<KeyBytes>, SealKeyError> {
    let path = directory.join("keys").join("jwt.key");
    let signs = seal::read(&path)?;
    let absent = || SealKeyError::Io { operation: "read", path, source: io::ErrorKind::NotFound.into() };
    let mut keys = vec![signs.ok_or_else(absent)?];
    keys.extend(seal::read(&directory.join("keys").join("jwt.old.key"))?);
    Ok(keys)
}

/// Makes a new signing key; the current key stays trusted, and the key before it does not.
///
/// # Errors
/// Fails when a file cannot be renamed or made.
pub fn rotate_token_key(directory: &Path) -> Result<(), SealKeyError> {
    // This makes sure that a key exists that can be kept.
    token_key(directory)?;
    let (key, old) = (directory.join("keys").join("jwt.key"), directory.join("keys").join("jwt.old.key"));
    fs::rename(&key, old).map_err(|source| SealKeyError::Io { operation: "rename", path: key, source })?;
    token_key(directory).map(drop)
}

/// Ends the trust in the key before the last rotation, if there is one.
///
/// # Errors
/// Fails when it cannot be removed.
pub fn remove_old_token_key(directory: &Path) -> Result<(), SealKeyError> {
    let path = directory.join("keys").join("jwt.old.key");
    match fs::remove_file(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(SealKeyError::Io { operation: "remove", path, source })
        }
        _ => Ok(()),
    }
}

/// Returns a new unique id for a token.
#[must_use]
pub fn new_token_id() -> String {
    cuid2::create_id()
}

/// Locks a run directory for this daemon: two daemons would end each other's VMs and take each other's sockets.
///
/// # Errors
/// Fails when another process holds the lock.
pub fn lock_run_directory(directory: &Path) -> Result<DirectoryLock, LockError> {
    DirectoryLock::take(directory)
}

/// Locks and opens a data directory; makes it if it does not exist. Blocks: call it at start.
///
/// # Errors
/// Returns an [`OpenError`]; nothing was changed when the lock is held by another process.
pub fn open(directory: &Path, kinds: Kinds) -> Result<DataDirectory, OpenError> {
    private_directory(directory)
        .map_err(|source| OpenError::Directory { path: directory.to_path_buf(), source })?;
    let lock = DirectoryLock::take(directory).map_err(OpenError::Lock)?;
    let database = directory.join("db");
    let has_database = database.join("db").exists();
    // The check comes before an empty database is made.
    mark::check_presence(directory).map_err(OpenError::Mark)?;
    let sealer = ChaChaSealer::open(&directory.join("keys").join("seal.key"), has_database)
        .map_err(OpenError::SealKey)?;
    let kv = SledKv::open(&database).map_err(OpenError::Database)?;
    let (store, writer) = Store::open(kv, Arc::new(sealer), Arc::new(SystemClock), Arc::new(CuidIds), kinds)
        .map_err(OpenError::Store)?;
    mark::check(directory, Some(store.revision())).map_err(OpenError::Mark)?;
    Ok(DataDirectory { store, writer, lock })
}
