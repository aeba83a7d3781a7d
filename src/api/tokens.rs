//! The files that tokens are created and revoked with; the daemon polls them.
//!
//! ```text
//! DATA/keys/jwt.key       signs (`crate::store`)
//! DATA/keys/jwt.old.key   the previous key, still trusted until it is removed
//! DATA/keys/tokens.json   the tokens that were made here, as long as they have not expired
//! ```

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::auth::Keys;
use crate::store::{SealKeyError, token_key, token_keys};
use crate::unfinished::remove_unfinished;

/// Time between two polls: a token that is revoked ends within this time.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Largest number of tokens that are remembered; a larger number means that a token is made for every
/// request.
const TOKENS_MAX: usize = 100_000;

/// The record of a token that was made here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    pub id: String,
    pub subject: String,
    pub scopes: Vec<String>,
    pub created_at: jiff::Timestamp,
    pub expires_at: jiff::Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked_at: Option<jiff::Timestamp>,
}

fn list_path(directory: &Path) -> PathBuf {
    directory.join("keys").join("tokens.json")
}

/// Returns the tokens that were made here and have not expired.
///
/// # Errors
/// Fails when the file exists and cannot be read: it is then unknown which tokens are revoked.
pub fn records(directory: &Path) -> io::Result<Vec<TokenRecord>> {
    match std::fs::read(list_path(directory)) {
        Ok(text) => serde_json::from_slice(&text).map_err(io::Error::other),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Changes the records; expired ones are removed.
///
/// # Errors
/// Fails when they cannot be read or written, or are too many.
pub fn change<T>(directory: &Path, change: impl FnOnce(&mut Vec<TokenRecord>) -> T) -> io::Result<T> {
    let keys = directory.join("keys");
    let guard = std::fs::File::open(&keys)?;
    // Two concurrent changes would lose one of them.
    rustix::fs::flock(&guard, rustix::fs::FlockOperation::LockExclusive)?;
    // A file is only written here with the lock held.
    remove_unfinished(&keys)?;
    let mut all = records(directory)?;
    let now = jiff::Timestamp::now();
    all.retain(|record| record.expires_at > now);
    let done = change(&mut all);
    if all.len() > TOKENS_MAX {
        return Err(io::Error::other(format!("more than {TOKENS_MAX} tokens are there")));
    }
    // The file is readable only by its owner from the start.
    let file = tempfile::NamedTempFile::new_in(&keys)?;
    serde_json::to_writer_pretty(&file, &all)?;
    file.as_file().sync_all()?;
    file.persist(list_path(directory)).map_err(|error| error.error)?;
    guard.sync_all()?;
    Ok(done)
}

/// Modification times and inodes of the three files; `None` for a file that does not exist.
type Stamp = [Option<(SystemTime, u64)>; 3];

fn stamp(directory: &Path) -> io::Result<Stamp> {
    let poll = |name: &str| match std::fs::metadata(directory.join("keys").join(name)) {
        Ok(meta) => Ok(Some((meta.modified()?, std::os::unix::fs::MetadataExt::ino(&meta)))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    };
    Ok([poll("jwt.key")?, poll("jwt.old.key")?, poll("tokens.json")?])
}

fn trust(directory: &Path, keys: &Keys) -> Result<(), SealKeyError> {
    let secrets = token_keys(directory)?;
    let path = list_path(directory);
    let records =
        records(directory).map_err(|source| SealKeyError::Io { operation: "read", path, source })?;
    let revoked = records.into_iter().filter(|record| record.revoked_at.is_some()).map(|record| record.id);
    keys.trust(&secrets, revoked.collect::<BTreeSet<_>>());
    Ok(())
}

/// Loads the keys of a data directory, as they are now.
///
/// # Errors
/// Fails when a file cannot be read or made.
pub fn load(directory: &Path) -> Result<Keys, SealKeyError> {
    let keys = Keys::new(token_key(directory)?.as_slice());
    trust(directory, &keys)?;
    Ok(keys)
}

/// Applies the files if they have changed; returns their new stamp.
fn poll(directory: &Path, keys: &Keys, before: Option<Stamp>) -> anyhow::Result<Stamp> {
    let now = stamp(directory)?;
    if Some(now) != before {
        trust(directory, keys)?;
    }
    Ok(now)
}

/// Follows the files, and applies every change. A file that cannot be read changes nothing, is logged, and
/// is read again: a token that was revoked meanwhile must end.
pub async fn follow(directory: PathBuf, keys: Keys) {
    let mut seen = None;
    loop {
        let (for_poll, for_keys) = (directory.clone(), keys.clone());
        let observed = tokio::task::spawn_blocking(move || poll(&for_poll, &for_keys, seen)).await;
        seen = match observed {
            Ok(Ok(stamp)) => Some(stamp),
            Ok(Err(error)) => {
                let error = format!("{error:#}");
                tracing::error!(error, "the token files cannot be read; what was trusted stays so");
                None
            }
            Err(_) => None,
        };
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_kept_until_they_expire_and_are_nobody_elses_to_read() {
        use std::os::unix::fs::PermissionsExt;
        let scratch = tempfile::tempdir().expect("scratch");
        let keys = load(scratch.path()).expect("made");
        let record = |id: &str, seconds: i64| {
            let now = jiff::Timestamp::now();
            TokenRecord {
                id: id.to_owned(),
                subject: "a".to_owned(),
                scopes: vec!["*".to_owned()],
                created_at: now,
                expires_at: now + jiff::SignedDuration::from_secs(seconds),
                revoked_at: None,
            }
        };
        change(scratch.path(), |all| all.extend([record("old", -1), record("new", 60)])).expect("kept");
        change(scratch.path(), |all| all.push(record("other", 60))).expect("kept");
        let ids: Vec<String> =
            records(scratch.path()).expect("read").into_iter().map(|record| record.id).collect();
        assert_eq!(ids, ["new", "other"]);
        let mode = std::fs::metadata(list_path(scratch.path())).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        std::fs::write(list_path(scratch.path()), "nonsense").expect("written");
        trust(scratch.path(), &keys).expect_err("nobody knows what is revoked");
    }

    #[test]
    fn files_that_could_not_be_read_are_read_again_though_they_did_not_change() {
        let scratch = tempfile::tempdir().expect("scratch");
        let keys = load(scratch.path()).expect("made");
        let seen = poll(scratch.path(), &keys, None).expect("read");
        assert_eq!(poll(scratch.path(), &keys, Some(seen)).expect("as before"), seen);
        std::fs::create_dir(list_path(scratch.path())).expect("a directory cannot be read");
        poll(scratch.path(), &keys, Some(seen)).expect_err("nobody knows what is revoked");
        std::fs::remove_dir(list_path(scratch.path())).expect("removed");
        std::fs::write(list_path(scratch.path()), "[]").expect("written");
        assert_ne!(poll(scratch.path(), &keys, None).expect("read"), seen);
    }
}
