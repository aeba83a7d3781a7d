//! Disks: sparse ext4 files in one directory, each named by its owner's uid.
//!
//! Guarantees: a file is whole or absent: it is created without a name (`O_TMPFILE`), made durable, and then linked
//! to its name. A crash leaves nothing, so there is nothing to clean up.
//! Assumes: the directory's file system supports `O_TMPFILE` (ext4, xfs, btrfs, tmpfs do).
//! Never: touches a file whose name is not a uid with `.ext4`.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use stead_controllers::host::{DiskFile, Disks, HostError, HostErrorKind, Space};
use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;
use tokio::process::Command;

use super::{files, sparse};

const EXTENSION: &str = "ext4";
/// The words of mkfs.ext4 for files that do not fit.
const NO_FIT: &str = "Could not allocate";
/// Name of the root disk among the files of a snapshot.
const SNAPSHOT_DISK: &str = "disk.ext4";

/// Options that leave the inodes, the journal and the group tables of a new file zero, so that there is nothing to
/// write: a 10 GB file system takes 5 ms and 236 KiB, and the guest's kernel does not write them later either.
/// `resize_inode` would reserve blocks for growth, for which the guest's kernel needs none: it uses `meta_bg`.
const MKFS_OPTIONS: &[&str] = &[
    "-q",
    "-F",
    "-m",
    "0",
    "-O",
    "^resize_inode",
    "-E",
    "nodiscard,assume_storage_prezeroed=1,root_owner=0:0",
];
/// Options for a small journal. The default of 64 MB for large disks would in time be written in full, once for every
/// VM.
const JOURNAL_OPTIONS: &[&str] = &["-J", "size=16"];
/// Size from which the default journal is larger than this one.
const JOURNAL_FROM: Bytes = Bytes(512 << 20);

/// The directories of disks in the data directory.
#[derive(Debug, Clone)]
pub struct Ext4Files {
    directory: PathBuf,
    /// Directory of prepared files. It is no part of the disk directory, in which each file is a disk.
    prepared: PathBuf,
    /// Directory of snapshots, to copy from.
    snapshots: PathBuf,
    reserve: Bytes,
}

impl Ext4Files {
    /// Creates the directories of disks and of prepared files, with the parents that they need.
    ///
    /// # Errors
    /// Returns an error when a directory cannot be created.
    pub fn new(data_dir: &Path, reserve: Bytes) -> Result<Self, HostError> {
        let [directory, prepared, snapshots] =
            ["disks", "prepared", "snapshots"].map(|name| data_dir.join(name));
        for made in [&directory, &prepared] {
            files::make_directory(made)
                .map_err(|error| HostError::io("make", made.display().to_string(), error))?;
        }
        Ok(Self { directory, prepared, snapshots, reserve })
    }

    /// Makes a file system with the content of a directory in a prepared file of this name.
    ///
    /// # Errors
    /// Returns an error when the file cannot be made, and removes what there is of it.
    pub(crate) async fn prepare(&self, name: &Uid, size: Bytes, from: &Path) -> Result<Filled, HostError> {
        let failed = |error| HostError::io("prepare disk", name.as_str(), error);
        self.need_room(0).map_err(failed)?;
        let file = self.nameless(size).map_err(failed)?;
        if make_file_system(&file, name, size, Some(from)).await? == Filled::TooSmall {
            return Ok(Filled::TooSmall);
        }
        self.link(self.prepared(name), file).await.map_err(failed)?;
        Ok(Filled::Whole)
    }

    /// Removes a prepared file that no disk takes. What cannot be removed now is removed at the next start.
    pub(crate) fn discard_prepared(&self, name: &Uid) {
        let path = self.prepared(name);
        // Freeing the blocks of a large file takes a while.
        drop(tokio::task::spawn_blocking(move || fs::remove_file(path)));
    }

    /// Removes the prepared files that no disk takes. Nobody may prepare one meanwhile.
    ///
    /// # Errors
    /// Returns an error when the directory cannot be read, or a file cannot be removed.
    pub(crate) fn sweep_prepared(&self, is_taken: impl Fn(&Uid) -> bool) -> Result<(), HostError> {
        let failed = |error| HostError::io("sweep", self.prepared.display().to_string(), error);
        for entry in fs::read_dir(&self.prepared).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if named(&entry.file_name()).is_none_or(|name| !is_taken(&name)) {
                fs::remove_file(entry.path()).map_err(failed)?;
            }
        }
        Ok(())
    }

    /// Checks that `bytes` more can be written while the reserve stays free.
    pub(crate) fn need_room(&self, bytes: u64) -> io::Result<()> {
        let (_, free) = files::space(&self.directory)?;
        if free.0 >= self.reserve.0.saturating_add(bytes) {
            return Ok(());
        }
        let words = "there is no room for it beside what is kept free (disk_reserve)";
        Err(io::Error::new(io::ErrorKind::StorageFull, words))
    }

    fn prepared(&self, name: &Uid) -> PathBuf {
        Self::path(&self.prepared, name)
    }

    /// Returns the name of a disk among the files of a snapshot: of the root disk, or of another disk by its uid.
    #[must_use]
    pub(crate) fn in_snapshot(of: Option<&Uid>) -> String {
        of.map_or_else(|| SNAPSHOT_DISK.to_owned(), |of| format!("volume-{of}.{EXTENSION}"))
    }

    /// Returns the path of the disk of `owner`, even if it does not exist yet.
    #[must_use]
    pub fn path(directory: &Path, owner: &Uid) -> PathBuf {
        directory.join(format!("{owner}.{EXTENSION}"))
    }

    fn path_of(&self, owner: &Uid) -> PathBuf {
        Self::path(&self.directory, owner)
    }

    /// Makes a file without a name durable and gives it its name.
    async fn link(&self, path: PathBuf, file: File) -> io::Result<()> {
        let linked = tokio::task::spawn_blocking(move || {
            file.sync_all()?;
            let nameless = format!("/proc/self/fd/{}", file.as_raw_fd());
            match rustix::fs::linkat(CWD, &nameless, CWD, &path, AtFlags::SYMLINK_FOLLOW) {
                // An earlier pass, dropped before its answer, may have created the name.
                Ok(()) | Err(rustix::io::Errno::EXIST) => sync_directory_of(&path),
                Err(error) => Err(error.into()),
            }
        });
        linked.await.unwrap_or_else(|error| Err(io::Error::other(error)))
    }

    /// Creates a file without a name, with the requested apparent size.
    fn nameless(&self, size: Bytes) -> io::Result<File> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(&self.directory, flags, Mode::RUSR | Mode::WUSR)?);
        file.set_len(size.0)?;
        Ok(file)
    }
}

impl Disks for Ext4Files {
    async fn list(&self) -> Result<Vec<DiskFile>, HostError> {
        let failed = |error| HostError::io("list", self.directory.display().to_string(), error);
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let Some(owner) = named(&entry.file_name()) else { continue };
            match entry.metadata() {
                Ok(metadata) => files.push(DiskFile { owner, size: Bytes(metadata.len()) }),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(error)),
            }
        }
        files.sort_by(|one, other| one.owner.cmp(&other.owner));
        Ok(files)
    }

    async fn inspect(&self, owner: &Uid) -> Result<Option<DiskFile>, HostError> {
        match fs::symlink_metadata(self.path_of(owner)) {
            Ok(metadata) => Ok(Some(DiskFile { owner: owner.clone(), size: Bytes(metadata.len()) })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(HostError::io("inspect disk", owner.as_str(), error)),
        }
    }

    async fn create(&self, owner: &Uid, size: Bytes) -> Result<(), HostError> {
        let failed = |error| HostError::io("create disk", owner.as_str(), error);
        if self.inspect(owner).await?.is_some() {
            return Ok(());
        }
        let file = self.nameless(size).map_err(failed)?;
        make_file_system(&file, owner, size, None).await?;
        self.link(self.path_of(owner), file).await.map_err(failed)
    }

    async fn take(&self, owner: &Uid, prepared: &Uid) -> Result<(), HostError> {
        let failed = |error| HostError::io("take the prepared file of disk", owner.as_str(), error);
        if self.inspect(owner).await?.is_some() {
            return Ok(());
        }
        let (from, to) = (self.prepared(prepared), self.path_of(owner));
        let taken = tokio::task::spawn_blocking(move || {
            fs::rename(&from, &to)?;
            sync_directory_of(&to)?;
            sync_directory_of(&from)
        });
        taken.await.unwrap_or_else(|error| Err(io::Error::other(error))).map_err(failed)
    }

    async fn copy(
        &self,
        owner: &Uid,
        snapshot: &Uid,
        of: Option<&Uid>,
        size: Bytes,
    ) -> Result<(), HostError> {
        let failed = |error| HostError::io("copy disk", owner.as_str(), error);
        if self.inspect(owner).await?.is_some() {
            return Ok(());
        }
        let from = self.snapshots.join(snapshot.as_str()).join("saved").join(Self::in_snapshot(of));
        let from = File::open(from).map_err(failed)?;
        let taken = Bytes(from.metadata().map_err(failed)?.len());
        // A disk may have grown between the request of the snapshot and its copy.
        if taken < size {
            let cut_off = HostError::new(HostErrorKind::Permanent, "copy disk", owner.as_str());
            return Err(
                cut_off.because(format!("that of the snapshot has {} bytes instead of {}", taken.0, size.0))
            );
        }
        let file = self.nameless(taken).map_err(failed)?;
        let copied = tokio::task::spawn_blocking(move || sparse::copy(&from, &file).map(|()| file));
        let file = copied.await.unwrap_or_else(|error| Err(io::Error::other(error))).map_err(failed)?;
        self.link(self.path_of(owner), file).await.map_err(failed)
    }

    async fn grow(&self, owner: &Uid, size: Bytes) -> Result<(), HostError> {
        let (disks, path) = (self.clone(), self.path_of(owner));
        let grown = tokio::task::spawn_blocking(move || {
            disks.need_room(0)?;
            let file = File::options().write(true).open(path)?;
            let seen = file.metadata()?;
            if seen.len() >= size.0 {
                return Ok(());
            }
            file.set_len(size.0)?;
            // A memory that was saved with this disk recognises it by this time. A crash before this line makes the
            // memory useless, and nothing else.
            file.set_modified(seen.modified()?)?;
            file.sync_all()
        });
        let grown = grown.await.unwrap_or_else(|error| Err(io::Error::other(error)));
        grown.map_err(|error| HostError::io("grow disk", owner.as_str(), error))
    }

    async fn remove(&self, owner: &Uid) -> Result<(), HostError> {
        let path = self.path_of(owner);
        // Freeing the blocks of a large file takes a while.
        let removed = tokio::task::spawn_blocking(move || match fs::remove_file(&path) {
            Ok(()) => sync_directory_of(&path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        });
        let removed = removed.await.unwrap_or_else(|error| Err(io::Error::other(error)));
        removed.map_err(|error| HostError::io("remove disk", owner.as_str(), error))
    }

    async fn space(&self) -> Result<Space, HostError> {
        let failed = |error| HostError::io("read the space of", self.directory.display().to_string(), error);
        let (total, available) = files::space(&self.directory).map_err(failed)?;
        Ok(Space { total, available, reserve: self.reserve })
    }
}

/// The result of making a file system with content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Filled {
    Whole,
    /// The content does not fit.
    TooSmall,
}

/// Makes the name of a file durable.
fn sync_directory_of(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
}

/// Returns the uid that a file is named by.
fn named(name: &OsStr) -> Option<Uid> {
    name.to_str()?.strip_suffix(".ext4")?.parse().ok()
}

/// Creates the file system, with the content of a directory. If the future is dropped, the program is killed and the
/// nameless file disappears.
async fn make_file_system(
    file: &File,
    owner: &Uid,
    size: Bytes,
    from: Option<&Path>,
) -> Result<Filled, HostError> {
    let mut command = Command::new("mkfs.ext4");
    command.args(MKFS_OPTIONS).env("LC_ALL", "C").env("MKE2FS_SYNC", "0").kill_on_drop(true);
    if size >= JOURNAL_FROM {
        command.args(JOURNAL_OPTIONS);
    }
    if let Some(from) = from {
        command.arg("-d").arg(from);
    }
    command.arg(format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()));
    let failed = |kind| HostError::new(kind, "make a file system on disk", owner.as_str());
    let output = command.output().await.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            failed(HostErrorKind::Unsupported).because("mkfs.ext4 is not installed (package e2fsprogs)")
        }
        _ => failed(HostError::kind_of_io(&error)).because(error),
    })?;
    if output.status.success() {
        return Ok(Filled::Whole);
    }
    let reported = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if from.is_some() && reported.contains(NO_FIT) {
        return Ok(Filled::TooSmall);
    }
    // Sizes are checked at the request. An error here comes from the disk or the host and may be transient.
    let kind = if reported.contains("No space left") || reported.contains("quota") {
        HostErrorKind::Exhausted
    } else {
        HostErrorKind::Transient
    };
    Err(failed(kind).because(reported))
}
