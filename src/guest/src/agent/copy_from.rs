//! Copies a file, or a directory with everything below it, out of the guest.
//!
//! Parents come before their children; the entries of a directory are sorted by name. An entry that is no file,
//! directory or symbolic link has no form on the wire and is left out.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{MemfdFlags, OFlags, memfd_create};
use stead_schemas::guest::{BytePath, CopyFrom, Entry, EntryKind, FrameKind, FromStream};

use super::source::Source;
use super::stream::{SENT_BYTES_MAX, Stream};

/// Limit on the length of a file that is read whole before its length is sent, in bytes. The longest `/proc` files
/// that people read have some hundred kilobytes.
const MADE_UP_BYTES_MAX: u64 = 4 << 20;

/// The reason why a copy ends early.
enum Stop {
    /// The host closed the stream.
    Closed,
    Failed(String, PathBuf),
}

struct Copy<'a> {
    stream: &'a Stream,
    follows_links: bool,
    /// True if the previous entry was sent without its end. Whether it is the last one is known only with the next
    /// entry.
    has_open_end: bool,
}

pub(super) fn run(stream: &Stream, request: &CopyFrom) {
    let path = Path::new(OsStr::from_bytes(&request.path.0));
    let mut copy = Copy { stream, follows_links: request.follows_links, has_open_end: false };
    let copied = if path.is_absolute() {
        copy.root(path)
    } else {
        Err(Stop::Failed("the path must be absolute".to_owned(), path.to_owned()))
    };
    match copied {
        Ok(()) => drop(stream.message(&FromStream::EntryEnd { is_last: true })),
        Err(Stop::Closed) => {}
        Err(Stop::Failed(why, at)) => stream.failed(why, None, Some(&bytes_of(&at).shown())),
    }
}

impl Copy<'_> {
    fn root(&mut self, path: &Path) -> Result<(), Stop> {
        let meta = self.metadata_of(path).map_err(|error| failed(path, &error))?;
        if meta.is_dir() {
            return self.directory(path, &meta);
        }
        let name = path.file_name().map_or(path, Path::new);
        if self.entry(path, name, &meta)? {
            return Ok(());
        }
        Err(Stop::Failed("is neither a file, a directory nor a link".to_owned(), path.to_owned()))
    }

    fn metadata_of(&self, path: &Path) -> io::Result<Metadata> {
        if !self.follows_links {
            return fs::symlink_metadata(path);
        }
        // A dangling link is reported as a link.
        fs::metadata(path).or_else(|_| fs::symlink_metadata(path))
    }

    /// Sends everything below a directory, without the directory itself. There is no recursion, so no depth is too
    /// deep.
    fn directory(&mut self, root: &Path, meta: &Metadata) -> Result<(), Stop> {
        let mut open = vec![Level::read(root, PathBuf::new(), meta)?];
        while let Some(level) = open.last_mut() {
            let Some(name) = level.names.pop() else {
                open.pop();
                continue;
            };
            let (path, below) = (level.path.join(&name), level.below.join(&name));
            let meta = match self.metadata_of(&path) {
                Ok(meta) => meta,
                // The entry was removed after its directory was read.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(failed(&path, &error)),
            };
            // A link that leads back to a parent directory would never end.
            let is_loop =
                meta.is_dir() && open.iter().any(|level| level.identity == (meta.dev(), meta.ino()));
            if is_loop {
                continue;
            }
            self.entry(&path, &below, &meta)?;
            if meta.is_dir() {
                open.push(Level::read(&path, below, &meta)?);
            }
        }
        Ok(())
    }

    /// Sends one entry with its contents. Returns `false` if the entry has no form on the wire.
    fn entry(&mut self, path: &Path, below: &Path, meta: &Metadata) -> Result<bool, Stop> {
        // The file is opened before the entry is sent: a file that cannot be read is not sent as an entry.
        let file =
            if meta.is_file() { Some(open(path, meta).map_err(|error| failed(path, &error))?) } else { None };
        let kind = if meta.is_dir() {
            EntryKind::Directory
        } else if let Some((_, size)) = &file {
            EntryKind::File { size: *size }
        } else if meta.is_symlink() {
            EntryKind::Link { target: bytes_of(&fs::read_link(path).map_err(|error| failed(path, &error))?) }
        } else {
            return Ok(false);
        };
        let (mode, uid, gid, mtime) = (meta.mode() & 0o777, meta.uid(), meta.gid(), meta.mtime());
        let entry = Entry { path: bytes_of(below), kind, mode, uid, gid, mtime };
        if self.has_open_end {
            self.report(&FromStream::EntryEnd { is_last: false })?;
        }
        self.report(&FromStream::Entry(entry))?;
        self.has_open_end = true;
        file.map_or(Ok(()), |(file, size)| self.contents(path, file, size))?;
        Ok(true)
    }

    /// Sends exactly as many bytes as were announced.
    fn contents(&mut self, path: &Path, file: File, size: u64) -> Result<(), Stop> {
        let (mut source, mut sent) = (Source::new(file, size), 0);
        while sent < size {
            // All frames but the last are full: a part of a frame costs as much as a whole frame.
            let room = SENT_BYTES_MAX.min(usize::try_from(size - sent).unwrap_or(usize::MAX));
            if !self.stream.wait_credit(room) {
                return Err(Stop::Closed);
            }
            let mut frame = self.stream.data_begun(FrameKind::Data, room);
            let mut left = room;
            while left > 0 {
                let count = source.read(&mut frame, left).map_err(|error| failed(path, &error.into()))?;
                if count == 0 {
                    let why = "the file became shorter while it was copied";
                    return Err(Stop::Failed(why.to_owned(), path.to_owned()));
                }
                left -= count;
            }
            sent += room as u64;
            if !self.stream.data_read(frame) {
                return Err(Stop::Closed);
            }
        }
        Ok(())
    }

    fn report(&self, message: &FromStream) -> Result<(), Stop> {
        if self.stream.message(message) { Ok(()) } else { Err(Stop::Closed) }
    }
}

/// Opens a file and returns it with its length. A file without blocks (in `/proc` or `/sys`) does not report its
/// length, so it is read whole first.
fn open(path: &Path, meta: &Metadata) -> io::Result<(File, u64)> {
    if meta.blocks() > 0 || meta.len() > MADE_UP_BYTES_MAX {
        return Ok((File::open(path)?, meta.len()));
    }
    // `O_NONBLOCK`: a file that has no data yet is not waited for.
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
    let mut file = File::options().read(true).custom_flags(flags).open(path)?;
    let mut bytes = Vec::new();
    match (&mut file).take(MADE_UP_BYTES_MAX + 1).read_to_end(&mut bytes) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
        read => drop(read?),
    }
    if bytes.len() as u64 > MADE_UP_BYTES_MAX {
        return Err(io::Error::other("it says nothing of its length, and is too long to be read before"));
    }
    let copy = File::from(memfd_create("copy", MemfdFlags::CLOEXEC)?);
    copy.write_all_at(&bytes, 0)?;
    Ok((copy, bytes.len() as u64))
}

/// A directory between the root of the copy and the current entry.
struct Level {
    path: PathBuf,
    below: PathBuf,
    identity: (u64, u64),
    /// Names of the remaining entries, the last one first.
    names: Vec<std::ffi::OsString>,
}

impl Level {
    fn read(path: &Path, below: PathBuf, meta: &Metadata) -> Result<Self, Stop> {
        let entries = fs::read_dir(path).map_err(|error| failed(path, &error))?;
        let names: BTreeSet<_> = entries.flatten().map(|entry| entry.file_name()).collect();
        let names = names.into_iter().rev().collect();
        Ok(Self { path: path.to_owned(), below, identity: (meta.dev(), meta.ino()), names })
    }
}

fn bytes_of(path: &Path) -> BytePath {
    BytePath(path.as_os_str().as_bytes().to_vec())
}

fn failed(path: &Path, error: &io::Error) -> Stop {
    Stop::Failed(error.to_string(), path.to_owned())
}
