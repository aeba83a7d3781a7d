//! The identity of a data directory, and the guard of VMs that belong to another one.
//!
//! ```text
//! DATA/store-id   made with the database
//! RUN/store-id    the data directory whose VMs are in RUN/vm
//! ```
//! A daemon ends VMs that its store does not know. An empty store that was made because the real data
//! directory is not mounted yet would end all of them, so a start beside VMs of another store is refused.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::sync::sync_directory;
use crate::unfinished::remove_unfinished;

/// Name of the file in both directories.
const FILE: &str = "store-id";

/// The reason why a daemon must not start here.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error(
        "{run} holds {machines} VMs of another data directory, and {data} {state}. Mount the right data directory \
         and start again. To give these VMs up, end their processes (the pid is in machine.json of each) and \
         remove {run}/vm",
        run = run_dir.display(), data = data_dir.display(),
        state = if *is_new { "holds no database" } else { "holds the database of other VMs" }
    )]
    ForeignMachines { data_dir: PathBuf, run_dir: PathBuf, machines: usize, is_new: bool },
    #[error("cannot use {path}", path = path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// Checks, before the database is opened or made, that the VMs in `run_dir` belong to it.
///
/// # Errors
/// Fails when there are VMs of another data directory; nothing was changed then.
pub fn check(data_dir: &Path, run_dir: &Path) -> Result<(), IdentityError> {
    let machines = count(&run_dir.join("vm"))?;
    if machines == 0 {
        return Ok(());
    }
    let (own, theirs) = (read(data_dir)?, read(run_dir)?);
    let is_new = !data_dir.join("db").join("db").exists();
    // An older release wrote no identity: its database exists, and so do its VMs.
    let is_same = if theirs.is_none() { !is_new } else { own == theirs };
    if is_same {
        return Ok(());
    }
    let (data_dir, run_dir) = (data_dir.to_path_buf(), run_dir.to_path_buf());
    Err(IdentityError::ForeignMachines { data_dir, run_dir, machines, is_new })
}

/// Gives the data directory an identity if it has none, and records it in `run_dir`.
///
/// # Errors
/// Fails when a file cannot be read or written.
pub fn record(data_dir: &Path, run_dir: &Path) -> Result<(), IdentityError> {
    for path in [data_dir, run_dir] {
        let removed = remove_unfinished(path);
        removed.map_err(|source| IdentityError::Io { path: path.to_path_buf(), source })?;
    }
    let own = match read(data_dir)? {
        Some(own) => own,
        None => {
            let own = cuid2::create_id();
            write(data_dir, &own)?;
            own
        }
    };
    if read(run_dir)?.as_ref() == Some(&own) { Ok(()) } else { write(run_dir, &own) }
}

fn count(directory: &Path) -> Result<usize, IdentityError> {
    match fs::read_dir(directory) {
        Ok(entries) => Ok(entries.count()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(source) => Err(IdentityError::Io { path: directory.to_path_buf(), source }),
    }
}

fn read(directory: &Path) -> Result<Option<String>, IdentityError> {
    let path = directory.join(FILE);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text.trim().to_owned()).filter(|text| !text.is_empty())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(IdentityError::Io { path, source }),
    }
}

fn write(directory: &Path, id: &str) -> Result<(), IdentityError> {
    let path = directory.join(FILE);
    let written = (|| {
        super::private_directory(directory)?;
        let mut file = tempfile::NamedTempFile::new_in(directory)?;
        writeln!(file, "{id}")?;
        file.as_file().sync_all()?;
        file.persist(&path)?;
        sync_directory(directory)
    })();
    written.map_err(|source| IdentityError::Io { path, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Host {
        scratch: tempfile::TempDir,
    }

    impl Host {
        fn new() -> Self {
            Self { scratch: tempfile::tempdir().expect("a scratch directory") }
        }
        fn path(&self, name: &str) -> PathBuf {
            self.scratch.path().join(name)
        }
        fn make(&self, name: &str) {
            fs::create_dir_all(self.path(name)).expect("made");
        }
        fn database(&self, data: &str) {
            self.make(&format!("{data}/db"));
            fs::write(self.path(data).join("db/db"), "pages").expect("written");
        }
        fn check(&self, data: &str) -> Result<(), IdentityError> {
            check(&self.path(data), &self.path("run"))
        }
        fn record(&self, data: &str) {
            record(&self.path(data), &self.path("run")).expect("recorded");
        }
    }

    #[test]
    fn an_empty_or_foreign_data_directory_beside_vms_is_refused_and_nothing_is_made() {
        let host = Host::new();
        assert!(host.check("data").is_ok(), "a first start");
        host.database("data");
        host.record("data");
        host.make("run/vm/one");
        assert!(host.check("data").is_ok(), "its own VMs");
        let refused = host.check("empty").expect_err("the data directory is not mounted");
        assert!(refused.to_string().contains("1 VMs of another data directory"), "{refused}");
        assert!(!host.path("empty").exists());
        host.database("other");
        assert!(host.check("other").is_err(), "a data directory of other VMs");
        fs::remove_dir_all(host.path("run/vm")).expect("removed");
        assert!(host.check("other").is_ok(), "no VM can be harmed");
        host.record("other");
        host.make("run/vm/two");
        assert!(host.check("other").is_ok());
        assert!(host.check("data").is_err());
    }

    #[test]
    fn vms_of_a_release_without_identities_are_adopted_by_their_database_only() {
        let host = Host::new();
        host.make("run/vm/one");
        assert!(host.check("data").is_err(), "no database");
        host.database("data");
        assert!(host.check("data").is_ok());
        host.record("data");
        assert!(host.check("data").is_ok());
    }
}
