//! The files of the audit logs: two for each owner, which the process fills by descriptors that it is given.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use stead_schemas::names::Uid;

/// The endings of the two files of a log.
const ENDINGS: [&str; 2] = ["0", "1"];

/// The directory of the logs.
#[derive(Debug, Clone)]
pub struct AuditFiles(PathBuf);

impl AuditFiles {
    /// Names the directory, which is made with the first log.
    #[must_use]
    pub fn new(data_dir: &Path) -> Self {
        Self(data_dir.join("egress"))
    }

    pub(super) fn directory(&self) -> &Path {
        &self.0
    }

    fn paths(&self, owner: &Uid) -> [PathBuf; 2] {
        ENDINGS.map(|ending| self.0.join(format!("{owner}.{ending}")))
    }

    /// Opens both files of a log and makes those that are missing. Waits for the disk.
    pub(super) fn open(&self, owner: &Uid) -> io::Result<[File; 2]> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.0)?;
        let [one, other] = self.paths(owner);
        let open = |path: PathBuf| {
            File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
        };
        Ok([open(one)?, open(other)?])
    }

    /// Returns whether a log is kept.
    pub(super) fn exists(&self, owner: &Uid) -> io::Result<bool> {
        let [one, other] = self.paths(owner);
        Ok(one.try_exists()? || other.try_exists()?)
    }

    /// Removes a log.
    pub(super) fn remove(&self, owner: &Uid) -> io::Result<()> {
        for path in self.paths(owner) {
            match fs::remove_file(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                done => done?,
            }
        }
        Ok(())
    }

    /// Lists the owners of logs.
    pub(super) fn owners(&self) -> io::Result<BTreeSet<Uid>> {
        let entries = match fs::read_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
            entries => entries?,
        };
        let mut owners = BTreeSet::new();
        for entry in entries {
            let name = entry?.file_name();
            let stem = name.to_str().and_then(|name| name.split_once('.'));
            owners.extend(stem.and_then(|(owner, _)| owner.parse().ok()));
        }
        Ok(owners)
    }

    /// Returns the files of a log that exist, the older one first: its first line is older.
    ///
    /// # Errors
    /// The error of an open.
    pub fn read(&self, owner: &Uid) -> io::Result<Vec<File>> {
        let mut files = Vec::new();
        for path in self.paths(owner) {
            match File::open(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                file => {
                    let file = file?;
                    let meta = file.metadata()?;
                    if meta.len() > 0 {
                        files.push((meta.modified()?, file));
                    }
                }
            }
        }
        // The file that is filled changed last.
        files.sort_by_key(|(changed, _)| *changed);
        Ok(files.into_iter().map(|(_, file)| file).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_log_has_two_private_files_and_leaves_none() {
        let scratch = tempfile::tempdir().expect("scratch");
        let logs = AuditFiles::new(scratch.path());
        let owner: Uid = format!("p{:023}", 0).parse().expect("a uid");
        assert!(!logs.exists(&owner).expect("looked"));
        assert!(logs.owners().expect("listed").is_empty() && logs.read(&owner).expect("read").is_empty());
        let [mut one, _] = logs.open(&owner).expect("opened");
        one.write_all(b"{}\n").expect("written");
        logs.open(&owner).expect("opened again");
        assert_eq!(logs.read(&owner).expect("read").len(), 1, "the other one is empty");
        for path in logs.paths(&owner) {
            assert_eq!(fs::metadata(path).expect("there").permissions().mode() & 0o777, 0o600);
        }
        assert_eq!(logs.owners().expect("listed"), BTreeSet::from([owner.clone()]));
        logs.remove(&owner).expect("removed");
        logs.remove(&owner).expect("gone already");
        assert!(!logs.exists(&owner).expect("looked") && logs.owners().expect("listed").is_empty());
    }
}
