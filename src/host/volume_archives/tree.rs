//! A directory tree that is written from a hostile archive.
//!
//! Guarantees: nothing outside of the tree is reached. Every name is opened below a descriptor of its directory, one
//! component at a time, and no link is followed.
//! Assumes: nobody else writes to the tree.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, RawMode, Timespec, Timestamps, Uid, XattrFlags, chownat, fchmod,
    fchown, fsetxattr, futimens, linkat, mkdirat, mknodat, openat, statat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;
use stead_schemas::quantity::Bytes;

use crate::host::oci::Refused;
use crate::host::oci::archive::{Item, Kind, Meta, components, show};

/// Limit on the entries of an archive, and on the directories that are only named in paths: so many files fit into
/// 16 GiB of ext4, and more would fill the host's own inodes.
pub(super) const ENTRIES_MAX: usize = 1 << 20;
/// Limit on the length of the paths of all directories, in bytes: their times are set last, so they stay in memory.
const DIRECTORIES_BYTES_MAX: usize = 16 << 20;
/// Size of the pieces in which content is copied, in bytes.
const PIECE_BYTES: usize = 256 << 10;
/// Mode of a directory that is only named in paths.
const DIRECTORY_MODE: u32 = 0o755;

/// The tree, and what it may still take.
pub(super) struct Tree {
    root: OwnedFd,
    /// Number of content bytes that still fit.
    left: u64,
    entries: usize,
    /// Length of the paths of `directories`, in bytes.
    path_bytes: usize,
    directories: Vec<(Vec<Vec<u8>>, Meta)>,
    is_full: bool,
}

/// The directory of an entry, and the entry's name in it.
struct Position<'a> {
    directory: OwnedFd,
    name: &'a [u8],
}

impl Tree {
    /// Begins with an empty directory. Its files may have this size together.
    pub(super) fn new(root: &Path, size: Bytes) -> io::Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root = rustix::fs::open(root, flags, Mode::empty())?;
        Ok(Self { root, left: size.0, entries: 0, path_bytes: 0, directories: Vec::new(), is_full: false })
    }

    /// Returns whether an entry was refused because the archive has more than fits.
    pub(super) fn is_full(&self) -> bool {
        self.is_full
    }

    /// Writes an entry. A later entry replaces an earlier one of the same path, but no directory that is not empty.
    pub(super) fn put(&mut self, item: Item, size: u64, content: &mut dyn Read) -> Result<(), Refused> {
        self.count()?;
        let Item { path, kind, meta } = item;
        if matches!(kind, Kind::Dropped) {
            return Ok(());
        }
        let Some((name, parents)) = path.split_last() else {
            return match kind {
                Kind::Directory => self.remember(path, meta),
                _ => Err(Refused::new("the archive's root is no directory")),
            };
        };
        let failed = |error: Errno| refused(&path, error);
        let position = Position { directory: self.directory(parents)?, name };
        match &kind {
            Kind::Directory => {
                position.make_directory().map_err(failed)?;
                self.remember(path, meta)
            }
            Kind::File => self.put_file(&path, &position, &meta, size, content),
            Kind::Symlink(target) => {
                position.clear().map_err(failed)?;
                symlinkat(target.as_slice(), &position.directory, position.name).map_err(failed)?;
                position.set_owner_and_times(&meta).map_err(failed)
            }
            Kind::Hardlink(target) => self.put_link(&path, &position, target),
            Kind::Fifo => {
                position.clear().map_err(failed)?;
                let mode = Mode::from_raw_mode(meta.mode as RawMode);
                mknodat(&position.directory, position.name, FileType::Fifo, mode, 0).map_err(failed)?;
                position.set_owner_and_times(&meta).map_err(failed)
            }
            Kind::Dropped => Ok(()),
        }
    }

    /// Sets owners, modes and times of the directories, which files in them would change.
    pub(super) fn finish(mut self) -> Result<(), Refused> {
        // The last entry of a path counts, and a directory comes after what it contains.
        let directories = std::mem::take(&mut self.directories);
        for (path, meta) in directories.into_iter().rev() {
            match self.existing(&path) {
                Ok(directory) => {
                    set_meta(&File::from(directory), &meta).map_err(|error| refused(&path, error))?
                }
                // It was replaced by something else.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(error) => return Err(refused(&path, error)),
            }
        }
        Ok(())
    }

    fn count(&mut self) -> Result<(), Refused> {
        self.entries += 1;
        if self.entries > ENTRIES_MAX {
            self.is_full = true;
            return Err(Refused::new(format!("the archive has more than {ENTRIES_MAX} entries")));
        }
        Ok(())
    }

    fn remember(&mut self, path: Vec<Vec<u8>>, meta: Meta) -> Result<(), Refused> {
        self.path_bytes += path.iter().map(|name| name.len() + size_of::<Vec<u8>>()).sum::<usize>();
        if self.path_bytes > DIRECTORIES_BYTES_MAX {
            self.is_full = true;
            return Err(Refused::new("the archive has too many directories"));
        }
        self.directories.push((path, meta));
        Ok(())
    }

    /// Opens a directory of the tree. Missing ones are made, with the mode that archivers give them.
    fn directory(&mut self, path: &[Vec<u8>]) -> Result<OwnedFd, Refused> {
        let failed = |error| refused(path, error);
        let mut directory = self.root.try_clone().map_err(Refused::of_io)?;
        for name in path {
            directory = match open_directory(&directory, name) {
                Err(Errno::NOENT) => {
                    self.count()?;
                    mkdirat(&directory, name.as_slice(), Mode::from_raw_mode(DIRECTORY_MODE))
                        .map_err(failed)?;
                    open_directory(&directory, name).map_err(failed)?
                }
                opened => opened.map_err(failed)?,
            };
        }
        Ok(directory)
    }

    fn existing(&self, path: &[Vec<u8>]) -> Result<OwnedFd, Errno> {
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root = openat(&self.root, ".", flags, Mode::empty())?;
        path.iter().try_fold(root, |directory, name| open_directory(&directory, name))
    }

    fn put_file(
        &mut self,
        path: &[Vec<u8>],
        position: &Position<'_>,
        meta: &Meta,
        size: u64,
        content: &mut dyn Read,
    ) -> Result<(), Refused> {
        let Some(left) = self.left.checked_sub(size) else {
            self.is_full = true;
            return Err(Refused::new(format!("{} does not fit into the volume", show(path))));
        };
        self.left = left;
        position.clear().map_err(|error| refused(path, error))?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&position.directory, position.name, flags, Mode::RUSR | Mode::WUSR);
        let mut file = File::from(file.map_err(|error| refused(path, error))?);
        write_sparsely(content, &mut file, size)?;
        set_meta(&file, meta).map_err(|error| refused(path, error))
    }

    /// Makes a hard link to an earlier entry.
    fn put_link(&mut self, path: &[Vec<u8>], position: &Position<'_>, target: &[u8]) -> Result<(), Refused> {
        let target = components(target)?;
        let missing =
            || Refused::new(format!("{} is a link to {}, which is not there", show(path), show(&target)));
        let (name, parents) = target.split_last().ok_or_else(missing)?;
        if target == path {
            return Ok(());
        }
        let parent = self.existing(parents).map_err(|_| missing())?;
        position.clear().map_err(|error| refused(path, error))?;
        // No flag: a link to a symbolic link is one to the link itself.
        match linkat(&parent, name.as_slice(), &position.directory, position.name, AtFlags::empty()) {
            Err(Errno::NOENT) => Err(missing()),
            made => made.map_err(|error| refused(path, error)),
        }
    }
}

impl Position<'_> {
    /// Removes what an earlier entry left here.
    fn clear(&self) -> Result<(), Errno> {
        match unlinkat(&self.directory, self.name, AtFlags::empty()) {
            Err(Errno::ISDIR) => unlinkat(&self.directory, self.name, AtFlags::REMOVEDIR),
            Err(Errno::NOENT) => Ok(()),
            removed => removed,
        }
    }

    fn make_directory(&self) -> Result<(), Errno> {
        let is_there = match statat(&self.directory, self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) => FileType::from_raw_mode(found.st_mode) == FileType::Directory,
            Err(Errno::NOENT) => false,
            Err(error) => return Err(error),
        };
        if is_there {
            return Ok(());
        }
        self.clear()?;
        mkdirat(&self.directory, self.name, Mode::from_raw_mode(DIRECTORY_MODE))
    }

    /// Sets owner and times of what cannot be opened.
    fn set_owner_and_times(&self, meta: &Meta) -> Result<(), Errno> {
        let (uid, gid) = owner(meta);
        chownat(&self.directory, self.name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        utimensat(&self.directory, self.name, &times(meta), AtFlags::SYMLINK_NOFOLLOW)
    }
}

fn open_directory(directory: impl AsFd, name: &[u8]) -> Result<OwnedFd, Errno> {
    openat(directory, name, OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// Sets owner, mode, attributes and times of a file or a directory. The mode comes after the owner, because a change of
/// the owner takes rights away.
fn set_meta(file: &File, meta: &Meta) -> Result<(), Errno> {
    let (uid, gid) = owner(meta);
    fchown(file, Some(uid), Some(gid))?;
    fchmod(file, Mode::from_raw_mode(meta.mode as RawMode))?;
    for (name, value) in &meta.attributes {
        match fsetxattr(file, name.as_slice(), value, XattrFlags::empty()) {
            // The host's file system has none, or has no room for them. Images do without them too.
            Err(Errno::OPNOTSUPP | Errno::NOSPC | Errno::RANGE | Errno::TOOBIG) => {}
            set => set?,
        }
    }
    futimens(file, &times(meta))
}

fn owner(meta: &Meta) -> (Uid, Gid) {
    // The reader refuses larger numbers.
    let number = |id: u64| u32::try_from(id).unwrap_or(0);
    (Uid::from_raw(number(meta.uid)), Gid::from_raw(number(meta.gid)))
}

fn times(meta: &Meta) -> Timestamps {
    let time = Timespec { tv_sec: i64::try_from(meta.mtime).unwrap_or(0), tv_nsec: 0 };
    Timestamps { last_access: time, last_modification: time }
}

/// Copies content, with holes for pieces of zeros: a small archive can hold a large file of zeros.
fn write_sparsely(content: &mut dyn Read, file: &mut File, size: u64) -> Result<(), Refused> {
    use std::io::{Seek, SeekFrom};
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let mut count = 0;
        while count < piece.len() {
            match content.read(&mut piece[count..]).map_err(Refused::of_io)? {
                0 => break,
                more => count += more,
            }
        }
        if count == 0 {
            break;
        }
        let piece = &piece[..count];
        if piece.iter().all(|&byte| byte == 0) {
            let by = i64::try_from(count).map_err(|error| Refused::of_io(io::Error::other(error)))?;
            file.seek(SeekFrom::Current(by)).map_err(Refused::of_io)?;
        } else {
            file.write_all(piece).map_err(Refused::of_io)?;
        }
    }
    file.set_len(size).map_err(Refused::of_io)
}

/// Converts an error at a path of the archive. A path through a link, or through a file, is the archive's fault.
fn refused(path: &[Vec<u8>], error: Errno) -> Refused {
    match error {
        Errno::LOOP | Errno::NOTDIR => {
            Refused::new(format!("{} leads through something that is no directory", show(path)))
        }
        Errno::EXIST
        | Errno::NOTEMPTY
        | Errno::ISDIR
        | Errno::PERM
        | Errno::INVAL
        | Errno::NAMETOOLONG
        | Errno::MLINK => {
            let why = io::Error::from(error);
            Refused::new(format!("{} cannot be made: {why}", show(path)))
        }
        error => Refused::of_io(error.into()),
    }
}
