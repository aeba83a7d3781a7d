//! The revision that the database has reached, recorded beside it from time to time.
//!
//! ```text
//! DATA/store-mark     a revision that the database has reached
//! ```
//! The daemon ends VMs and removes disks that its store does not know. With a database that is gone, or that
//! has lost records (a file cut short, an old copy), it would remove them all; such a database is refused
//! instead.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use stead_controllers::store::Store;

use super::sync::sync_directory;

/// Name of the file.
const FILE: &str = "store-mark";
/// Time between two marks. A loss of records that were stored after the last mark is not noticed; a loss of
/// earlier records is.
const PAUSE: Duration = Duration::from_secs(30);

/// The reason why a database is not used.
#[derive(Debug, thiserror::Error)]
pub enum MarkError {
    #[error(
        "the database in {path} {state}, but it had come to revision {mark}. Nothing was changed. With this database \
         the daemon would end the VMs and remove the disks that it does not know. Mount the right database, put a \
         copy of it back, or restore a backup into another directory (stead restore-backup). To give up what was \
         stored, remove {path}/store-mark",
        path = path.display(),
        state = found.map_or_else(|| "is gone".to_owned(), |found| format!("is at revision {found}"))
    )]
    Lost { path: PathBuf, found: Option<u64>, mark: u64 },
    #[error("cannot use {path}", path = path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// Returns the recorded revision; `None` when there is no mark, as from an older release.
///
/// # Errors
/// Fails when it cannot be read.
fn read(directory: &Path) -> Result<Option<u64>, MarkError> {
    let path = directory.join(FILE);
    match fs::read_to_string(&path) {
        Ok(text) => {
            let wrong =
                |_| io::Error::new(io::ErrorKind::InvalidData, "it is no revision; it may be removed");
            text.trim().parse().map(Some).map_err(|error| MarkError::Io { path, source: wrong(error) })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(MarkError::Io { path, source }),
    }
}

/// Checks that the database is there (`found` is `None` if it is not) and has reached the recorded revision.
///
/// # Errors
/// Fails when it has lost records, or the mark cannot be read.
pub(super) fn check(directory: &Path, found: Option<u64>) -> Result<(), MarkError> {
    match read(directory)? {
        Some(mark) if found.is_none_or(|found| found < mark) => {
            Err(MarkError::Lost { path: directory.to_path_buf(), found, mark })
        }
        _ => Ok(()),
    }
}

/// Checks that a database that once existed is not gone.
///
/// # Errors
/// Fails when it is gone, or the mark cannot be read.
pub fn check_presence(directory: &Path) -> Result<(), MarkError> {
    if directory.join("db").join("db").exists() { Ok(()) } else { check(directory, None) }
}

/// Records a revision that is durable. The file is replaced as a whole. Blocks.
///
/// # Errors
/// Fails when it cannot be written; the previous mark stays.
pub fn note(directory: &Path, revision: u64) -> Result<(), MarkError> {
    let path = directory.join(FILE);
    let written = (|| {
        let mut file = tempfile::NamedTempFile::new_in(directory)?;
        writeln!(file, "{revision}")?;
        file.as_file().sync_all()?;
        file.persist(&path)?;
        sync_directory(directory)
    })();
    written.map_err(|source| MarkError::Io { path, source })
}

/// Records the store's durable revision now, and whenever it has changed from now on.
pub async fn keep(directory: PathBuf, store: Store) {
    let mut noted = note_changed(&directory, &store, None).await;
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(PAUSE).await;
            noted = note_changed(&directory, &store, noted).await;
        }
    });
}

/// Returns the revision that is recorded afterwards. A mark that cannot be written, as on a full disk, is
/// logged and written later.
async fn note_changed(directory: &Path, store: &Store, noted: Option<u64>) -> Option<u64> {
    let revision = store.revision();
    if noted == Some(revision) {
        return noted;
    }
    let path = directory.to_path_buf();
    match tokio::task::spawn_blocking(move || note(&path, revision)).await {
        Ok(Ok(())) => Some(revision),
        Ok(Err(error)) => {
            let error = format!("{:#}", anyhow::Error::from(error));
            tracing::warn!(error, "the database's revision cannot be noted");
            noted
        }
        Err(_) => noted,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_that_has_less_than_it_had_is_refused() {
        let scratch = tempfile::tempdir().expect("scratch");
        let check = |found| check(scratch.path(), found);
        check(None).expect("a first start");
        check(Some(3)).expect("of an older release");
        note(scratch.path(), 7).expect("noted");
        check(Some(7)).expect("as it was");
        check(Some(9)).expect("there is more than was noted");
        for found in [None, Some(0), Some(6)] {
            let refused = check(found).expect_err("it had more").to_string();
            assert!(refused.contains("revision 7") && refused.contains("store-mark"), "{refused}");
        }
        note(scratch.path(), 9).expect("noted");
        assert!(check(Some(8)).is_err());
        fs::write(scratch.path().join(FILE), "x").expect("written");
        assert!(matches!(check(Some(9)), Err(MarkError::Io { .. })));
        fs::remove_file(scratch.path().join(FILE)).expect("removed");
        check(None).expect("given up");
    }
}
