//! A layer's archive, read with bounds: names, links, sizes and attributes of hostile origin.
//!
//! The tar crate's own handling of long names and PAX records reads them whole, however large they
//! claim to be; so entries are read raw, and those records here, with a limit.

use std::cell::Cell;
use std::io::{self, Read};
use std::rc::Rc;

use tar::{Archive, EntryType, PaxExtensions};

use super::Refused;

/// What an entry makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    Directory,
    File,
    Symlink(Vec<u8>),
    /// To a path of the merged tree.
    Hardlink(Vec<u8>),
    Fifo,
    /// Device nodes: the guest has a devtmpfs of its own, so they are dropped.
    Dropped,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Meta {
    pub(super) mode: u32,
    pub(super) uid: u64,
    pub(super) gid: u64,
    pub(super) mtime: u64,
    /// The one extended attribute that is kept: file capabilities.
    pub(super) capability: Option<Vec<u8>>,
}

/// One entry: path components, none of them special.
#[derive(Debug, Clone)]
pub(super) struct Item {
    pub(super) path: Vec<Vec<u8>>,
    pub(super) kind: Kind,
    pub(super) meta: Meta,
}

/// PATH_MAX of Linux: longer ones cannot be opened in the guest.
const PATH_BYTES_MAX: usize = 4096;
/// NAME_MAX of Linux.
const NAME_BYTES_MAX: usize = 255;
/// Extended headers hold two paths and some attributes.
const EXTENSION_BYTES_MAX: u64 = 256 << 10;
/// The format's unit.
const BLOCK_BYTES: u64 = 512;
/// A file capability is 24 bytes.
const CAPABILITY_BYTES_MAX: usize = 1024;

/// An archive's last block, filled up: umoci leaves out what comes after the last content, and
/// container runtimes accept that. Content itself is never made up.
struct Padded<R> {
    reader: R,
    position: u64,
    /// Where the content of the entry that is being read ends.
    content_end: Rc<Cell<u64>>,
}

impl<R: Read> Read for Padded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut count = self.reader.read(buffer)?;
        let missing = self.position.next_multiple_of(BLOCK_BYTES) - self.position;
        if count == 0 && missing > 0 && self.position >= self.content_end.get() {
            count = buffer.len().min(usize::try_from(missing).unwrap_or(usize::MAX));
            buffer[..count].fill(0);
        }
        self.position += u64::try_from(count).unwrap_or(u64::MAX);
        Ok(count)
    }
}

/// Reads every entry in order; `visit` may read the content.
pub(super) fn read<R: Read>(
    reader: R,
    mut visit: impl FnMut(Item, u64, &mut dyn Read) -> Result<(), Refused>,
) -> Result<(), Refused> {
    let content_end = Rc::new(Cell::new(u64::MAX));
    let mut archive = Archive::new(Padded { reader, position: 0, content_end: content_end.clone() });
    let mut extension = Extension::default();
    for entry in archive.entries().map_err(broken)?.raw(true) {
        let mut entry = entry.map_err(broken)?;
        let kind = entry.header().entry_type();
        let size = entry.header().entry_size().map_err(broken)?;
        content_end.set(entry.raw_file_position().saturating_add(size));
        if matches!(
            kind,
            EntryType::GNULongName | EntryType::GNULongLink | EntryType::XHeader | EntryType::XGlobalHeader
        ) {
            extension.take(kind, &mut entry)?;
            continue;
        }
        let found = std::mem::take(&mut extension);
        if found.size.is_some_and(|given| given != size) {
            return Err(Refused::new(
                "an entry's size stands only in an extended header, which is not supported",
            ));
        }
        let item = item(entry.header(), &entry.path_bytes(), found)?;
        visit(item, size, &mut entry)?;
    }
    Ok(())
}

fn broken(error: io::Error) -> Refused {
    Refused::new(format!("the archive is broken: {error}"))
}

/// What extended headers said of the entry that follows.
#[derive(Default)]
struct Extension {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    capability: Option<Vec<u8>>,
}

impl Extension {
    fn take(&mut self, kind: EntryType, entry: &mut impl Read) -> Result<(), Refused> {
        let mut bytes = Vec::new();
        entry.take(EXTENSION_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(broken)?;
        if bytes.len() as u64 > EXTENSION_BYTES_MAX {
            return Err(Refused::new("an extended header is larger than any name needs"));
        }
        match kind {
            EntryType::GNULongName => self.path = Some(without_nul(bytes)),
            EntryType::GNULongLink => self.link = Some(without_nul(bytes)),
            EntryType::XHeader => self.take_records(&bytes)?,
            // Global records of layers are comments of their builders.
            _ => {}
        }
        Ok(())
    }

    fn take_records(&mut self, bytes: &[u8]) -> Result<(), Refused> {
        for record in PaxExtensions::new(bytes) {
            let record = record.map_err(broken)?;
            let value = record.value_bytes();
            let number = || std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
            match record.key_bytes() {
                b"path" => self.path = Some(value.to_vec()),
                b"linkpath" => self.link = Some(value.to_vec()),
                b"size" => self.size = number(),
                b"uid" => self.uid = number(),
                b"gid" => self.gid = number(),
                b"SCHILY.xattr.security.capability" if value.len() <= CAPABILITY_BYTES_MAX => {
                    self.capability = Some(value.to_vec());
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn without_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    bytes.truncate(end);
    bytes
}

fn item(header: &tar::Header, plain_path: &[u8], found: Extension) -> Result<Item, Refused> {
    let path = components(&found.path.unwrap_or_else(|| plain_path.to_vec()))?;
    let link = || -> Result<Vec<u8>, Refused> {
        let link = found.link.clone().or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned));
        let link = link.unwrap_or_default();
        if link.is_empty() || link.len() > PATH_BYTES_MAX || link.contains(&0) {
            return Err(Refused::new(format!("{} has a link target that is empty or too long", show(&path))));
        }
        Ok(link)
    };
    let kind = match header.entry_type() {
        EntryType::Directory => Kind::Directory,
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Kind::File,
        EntryType::Symlink => Kind::Symlink(link()?),
        EntryType::Link => Kind::Hardlink(link()?),
        EntryType::Fifo => Kind::Fifo,
        EntryType::Char | EntryType::Block => Kind::Dropped,
        other => return Err(Refused::new(format!("{} is of the unknown kind {:?}", show(&path), other))),
    };
    if header.entry_type() == EntryType::GNUSparse {
        return Err(Refused::new(format!("{} is a sparse entry, which images do not use", show(&path))));
    }
    let meta = Meta {
        mode: header.mode().map_err(broken)? & 0o7777,
        uid: found.uid.map_or_else(|| header.uid(), Ok).map_err(broken)?,
        gid: found.gid.map_or_else(|| header.gid(), Ok).map_err(broken)?,
        mtime: header.mtime().unwrap_or(0),
        capability: found.capability,
    };
    if meta.uid > u64::from(u32::MAX) || meta.gid > u64::from(u32::MAX) {
        return Err(Refused::new(format!("{} has an owner beyond any user id", show(&path))));
    }
    Ok(Item { path, kind, meta })
}

/// Splits a path; nothing may lead out of the root.
pub(super) fn components(path: &[u8]) -> Result<Vec<Vec<u8>>, Refused> {
    let refuse = |why: &str| {
        Err(Refused::new(format!(
            "the path {:?} {why}",
            String::from_utf8_lossy(&path[..path.len().min(128)])
        )))
    };
    if path.len() > PATH_BYTES_MAX {
        return refuse("is too long");
    }
    let mut parts = Vec::new();
    for part in path.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return refuse("leads out of the image"),
            part if part.len() > NAME_BYTES_MAX => return refuse("has a name that is too long"),
            part if part.contains(&0) => return refuse("contains a NUL"),
            part => parts.push(part.to_vec()),
        }
    }
    Ok(parts)
}

/// A path for a message.
pub(super) fn show(path: &[Vec<u8>]) -> String {
    let joined = path.join(&b'/');
    stead_schemas::validate::printable(&String::from_utf8_lossy(&joined), 128)
}
