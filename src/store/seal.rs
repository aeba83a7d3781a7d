//! The sealer: XChaCha20-Poly1305 with one key per data directory.
//!
//! The extended variant is used because nonces are random, and its 24 bytes rule out a repetition for any
//! number of writes.
//!
//! Guarantees: the key file is 0600 and durable before anything is sealed with it; a value opens only under
//! the key (of the database) it was sealed for.
//! Never: makes a new key where a database exists, because that would lose every record.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use chacha20poly1305::aead::{Aead, Generate, Key, KeyInit, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use rustix::fs::OFlags;
use stead_controllers::store::{SealError, Sealer};
use zeroize::Zeroizing;

use super::sync::sync_directory;

const KEY_BYTES: usize = 32;
const NONCE_BYTES: usize = 24;

/// The bytes of a key, which are cleared when they are no longer used.
pub type KeyBytes = Zeroizing<[u8; KEY_BYTES]>;

/// The reason why there is no usable key.
#[derive(Debug, thiserror::Error)]
pub enum SealKeyError {
    #[error("cannot {operation} the key {path}", path = path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("the key {path} must be a regular file", path = path.display())]
    Kind { path: PathBuf },
    #[error("the key {path} must be {KEY_BYTES} bytes long", path = path.display())]
    Length { path: PathBuf },
    #[error("the key {path} has mode {mode:o}: it must not be open to group or others (chmod 600)", path = path.display())]
    Mode { path: PathBuf, mode: u32 },
    /// The key file is missing; restore it, because the database cannot be read without it.
    #[error("the key {path} is missing but its database exists", path = path.display())]
    Missing { path: PathBuf },
}

/// A sealer with one key.
pub(crate) struct ChaChaSealer(XChaCha20Poly1305);

impl fmt::Debug for ChaChaSealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ChaChaSealer")
    }
}

impl ChaChaSealer {
    /// Reads the key of a data directory or of a backup.
    pub(super) fn existing(path: &Path) -> Result<Self, SealKeyError> {
        let bytes = read(path)?.ok_or_else(|| SealKeyError::Missing { path: path.to_path_buf() })?;
        Ok(Self::with(&bytes))
    }

    fn with(bytes: &[u8; KEY_BYTES]) -> Self {
        let key: &Key<XChaCha20Poly1305> = bytes.into();
        Self(XChaCha20Poly1305::new(key))
    }

    /// Reads the key, or makes one if there is neither a key nor a database.
    pub(super) fn open(path: &Path, has_database: bool) -> Result<Self, SealKeyError> {
        let bytes = match read(path)? {
            Some(bytes) => bytes,
            None if has_database => return Err(SealKeyError::Missing { path: path.to_path_buf() }),
            None => create(path).map_err(|source| SealKeyError::Io {
                operation: "create",
                path: path.to_path_buf(),
                source,
            })?,
        };
        Ok(Self::with(&bytes))
    }
}

/// Reads a key of this directory's files, or makes one: for keys whose loss costs no data.
pub(super) fn read_or_create(path: &Path) -> Result<KeyBytes, SealKeyError> {
    let failed = |source| SealKeyError::Io { operation: "create", path: path.to_path_buf(), source };
    read(path)?.map_or_else(|| create(path).map_err(failed), Ok)
}

/// Reads a key; returns `None` when the file does not exist.
pub(super) fn read(path: &Path) -> Result<Option<KeyBytes>, SealKeyError> {
    let at = || path.to_path_buf();
    let io = |source| SealKeyError::Io { operation: "read", path: at(), source };
    // Without a wait: the opening of a named pipe would last until somebody writes to it.
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
    let file = match File::options().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io(error)),
    };
    let metadata = file.metadata().map_err(io)?;
    if !metadata.is_file() {
        return Err(SealKeyError::Kind { path: at() });
    }
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(SealKeyError::Mode { path: at(), mode });
    }
    let mut bytes = Zeroizing::new(Vec::with_capacity(KEY_BYTES + 1));
    file.take(1 + KEY_BYTES as u64).read_to_end(&mut bytes).map_err(io)?;
    let key: [u8; KEY_BYTES] =
        bytes.as_slice().try_into().map_err(|_| SealKeyError::Length { path: at() })?;
    Ok(Some(Zeroizing::new(key)))
}

/// Creates a key file, complete or not at all: it is written under another name, synced, then renamed.
fn create(path: &Path) -> io::Result<KeyBytes> {
    let directory = path.parent().unwrap_or(Path::new("."));
    super::private_directory(directory)?;
    let key = Key::<XChaCha20Poly1305>::try_generate().map_err(io::Error::other)?;
    let key = Zeroizing::new(<[u8; KEY_BYTES]>::from(key));
    let partial = path.with_extension("partial");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&partial)?;
    file.write_all(key.as_slice())?;
    file.sync_all()?;
    fs::rename(&partial, path)?;
    sync_directory(directory)?;
    sync_directory(directory.parent().unwrap_or(Path::new(".")))?;
    Ok(key)
}

impl Sealer for ChaChaSealer {
    fn seal(&self, plain: &[u8], aad: &[u8]) -> Result<Vec<u8>, SealError> {
        let nonce = XNonce::try_generate().map_err(|error| SealError(format!("no randomness: {error}")))?;
        let sealed = self.0.encrypt(&nonce, Payload { msg: plain, aad });
        let sealed = sealed.map_err(|_| SealError("the value is too large to seal".to_owned()))?;
        Ok([nonce.as_slice(), &sealed].concat())
    }

    fn open(&self, sealed: &[u8], aad: &[u8]) -> Result<Vec<u8>, SealError> {
        let refused = || SealError("wrong key, or the value was changed".to_owned());
        let (nonce, sealed) = sealed.split_first_chunk::<NONCE_BYTES>().ok_or_else(refused)?;
        let nonce = XNonce::from(*nonce);
        self.0.decrypt(&nonce, Payload { msg: sealed, aad }).map_err(|_| refused())
    }
}
