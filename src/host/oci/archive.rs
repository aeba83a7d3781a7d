//! A reader of a layer's archive with bounds: names, links, sizes and attributes come from a hostile source.
//!
//! The tar crate's own reader reads long names and extended headers whole, however large they claim to be, and
//! ignores sizes that stand only in an extended header. So blocks are read here, with limits, and the crate only
//! decodes the fields of a header.

use std::io::{self, Read};

use tar::EntryType;

use super::Refused;
use super::pax;

/// The kind of file that an entry makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::host) enum Kind {
    Directory,
    File,
    Symlink(Vec<u8>),
    /// A hard link to a path of the merged tree.
    Hardlink(Vec<u8>),
    Fifo,
    /// Device nodes, which are dropped, because the guest has its own devtmpfs.
    Dropped,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::host) struct Meta {
    pub(in crate::host) mode: u32,
    pub(in crate::host) uid: u64,
    pub(in crate::host) gid: u64,
    pub(in crate::host) mtime: u64,
    /// Extended attributes that are kept: file capabilities and `user.` attributes.
    pub(in crate::host) attributes: Vec<(Vec<u8>, Vec<u8>)>,
}

/// An entry with its path components, none of which is special (`.` or `..`).
#[derive(Debug, Clone)]
pub(in crate::host) struct Item {
    pub(in crate::host) path: Vec<Vec<u8>>,
    pub(in crate::host) kind: Kind,
    pub(in crate::host) meta: Meta,
}

/// Limit on the length of a path, in bytes (PATH_MAX of Linux). Longer ones cannot be opened in the guest.
const PATH_BYTES_MAX: usize = 4096;
/// Limit on the length of a name, in bytes (NAME_MAX of Linux).
const NAME_BYTES_MAX: usize = 255;
/// Limit on an extended header, in bytes. It holds two paths and some attributes.
const EXTENSION_BYTES_MAX: u64 = 256 << 10;
/// Size of a block of the format, in bytes.
const BLOCK_BYTES: usize = 512;
/// Limit on a file capability, in bytes. A real one has 24 bytes.
const CAPABILITY_BYTES_MAX: usize = 1024;
/// Limit on the attributes of one entry, in bytes. ext4 takes 4 KiB, and programs that write more do not rely on
/// them.
const ATTRIBUTES_BYTES_MAX: usize = 64 << 10;
/// Limit on the length of an attribute's name, in bytes (XATTR_NAME_MAX of Linux).
const ATTRIBUTE_NAME_BYTES_MAX: usize = 255;

/// Reads all entries in order. `visit` may read the content.
pub(in crate::host) fn read<Reader: Read>(
    mut reader: Reader,
    mut visit: impl FnMut(Item, u64, &mut dyn Read) -> Result<(), Refused>,
) -> Result<(), Refused> {
    each_with(&mut reader, |item, size, _, content| visit(item, size, content))
}

/// Calls `visit` with each entry, its size, and the offset of its content in the archive.
pub(super) fn each<Reader: Read>(
    mut reader: Reader,
    mut visit: impl FnMut(Item, u64, u64) -> Result<(), Refused>,
) -> Result<(), Refused> {
    each_with(&mut reader, |item, size, at, _| visit(item, size, at))
}

fn each_with<Reader: Read>(
    reader: &mut Reader,
    mut visit: impl FnMut(Item, u64, u64, &mut dyn Read) -> Result<(), Refused>,
) -> Result<(), Refused> {
    let mut extension = Extension::default();
    // Offset of the next header.
    let mut at = 0u64;
    while let Some(header) = next_header(reader)? {
        let kind = header.entry_type();
        let size = header.entry_size().map_err(broken)?;
        let is_extension = matches!(
            kind,
            EntryType::GNULongName | EntryType::GNULongLink | EntryType::XHeader | EntryType::XGlobalHeader
        );
        at += BLOCK_BYTES as u64;
        if is_extension {
            content(reader, size, |content| extension.take(kind, content))?;
            at = at.saturating_add(padded(size)?);
            continue;
        }
        let found = std::mem::take(&mut extension);
        let size = found.size.unwrap_or(size);
        let item = item(&header, found)?;
        content(reader, size, |content| match item {
            Some(item) => visit(item, size, at, content),
            None => Ok(()),
        })?;
        at = at.saturating_add(padded(size)?);
    }
    Ok(())
}

/// Passes an entry's content to `visit`, then reads on to the next header. An archive may end with its last content:
/// umoci leaves out the padding and the end marker, and container runtimes accept that. Missing content is always an
/// error.
fn content<Reader: Read>(
    reader: &mut Reader,
    size: u64,
    visit: impl FnOnce(&mut dyn Read) -> Result<(), Refused>,
) -> Result<(), Refused> {
    let mut content = reader.by_ref().take(size);
    visit(&mut content)?;
    io::copy(&mut content, &mut io::sink()).map_err(broken)?;
    if content.limit() > 0 {
        return Err(Refused::new("the archive is broken: it ends within an entry"));
    }
    let padding = padded(size)? - size;
    io::copy(&mut reader.take(padding), &mut io::sink()).map_err(broken).map(drop)
}

/// Returns the size of content in whole blocks, in bytes.
fn padded(size: u64) -> Result<u64, Refused> {
    let overflow = || Refused::new("the archive is broken: an entry's size is beyond any file's");
    size.checked_next_multiple_of(BLOCK_BYTES as u64).ok_or_else(overflow)
}

/// Returns the next header, or `None` at the end: a block of zeros, or the end of the input.
fn next_header<Reader: Read>(reader: &mut Reader) -> Result<Option<tar::Header>, Refused> {
    let mut header = tar::Header::new_old();
    let block = header.as_mut_bytes();
    let mut count = 0;
    while count < BLOCK_BYTES {
        match reader.read(&mut block[count..]).map_err(broken)? {
            0 => break,
            more => count += more,
        }
    }
    if count < BLOCK_BYTES && block[..count].iter().any(|&byte| byte != 0) {
        return Err(Refused::new("the archive is broken: it ends within a header"));
    }
    if count < BLOCK_BYTES || block.iter().all(|&byte| byte == 0) {
        return Ok(None);
    }
    // The checksum is calculated with its own eight bytes as blanks.
    let sum: u32 = block
        .iter()
        .enumerate()
        .map(|(at, &byte)| if (148..156).contains(&at) { u32::from(b' ') } else { u32::from(byte) })
        .sum();
    if header.cksum().map_err(broken)? != sum {
        return Err(Refused::new("the archive is broken: a header's checksum is wrong"));
    }
    Ok(Some(header))
}

/// Converts a read error. A system error keeps its kind, for example a full disk under the archive, or the stop of
/// the work.
fn broken(error: io::Error) -> Refused {
    let refused = Refused::of_io(error);
    Refused { message: format!("the archive is broken: {}", refused.message), ..refused }
}

/// Values from extended headers for the entry that follows.
#[derive(Default)]
struct Extension {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<u64>,
    attributes: Vec<(Vec<u8>, Vec<u8>)>,
    is_sparse: bool,
}

impl Extension {
    fn take(&mut self, kind: EntryType, entry: &mut dyn Read) -> Result<(), Refused> {
        let mut bytes = Vec::new();
        entry.take(EXTENSION_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(broken)?;
        if bytes.len() as u64 > EXTENSION_BYTES_MAX {
            return Err(Refused::new("an extended header is larger than any name needs"));
        }
        match kind {
            EntryType::GNULongName => self.path = Some(without_nul(bytes)),
            EntryType::GNULongLink => self.link = Some(without_nul(bytes)),
            EntryType::XHeader => pax::records(&bytes, |key, value| self.take_record(key, value))?,
            // Global records of layers are comments of their builders.
            _ => {}
        }
        Ok(())
    }

    fn take_record(&mut self, key: &[u8], value: &[u8]) -> Result<(), Refused> {
        let number = || {
            let number = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
            let refused = || Refused::new("the archive is broken: an extended header has no number in it");
            number.ok_or_else(refused).map(Some)
        };
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = number()?,
            b"uid" => self.uid = number()?,
            b"gid" => self.gid = number()?,
            b"mtime" => self.mtime = Some(seconds(value)),
            _ if key.starts_with(b"GNU.sparse.") => self.is_sparse = true,
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.take_attribute(name, value);
                }
            }
        }
        Ok(())
    }

    fn take_attribute(&mut self, name: &[u8], value: &[u8]) {
        let is_kept = match name {
            b"security.capability" => value.len() <= CAPABILITY_BYTES_MAX,
            _ => name.starts_with(b"user.") && name.len() <= ATTRIBUTE_NAME_BYTES_MAX && !name.contains(&0),
        };
        let used: usize = self.attributes.iter().map(|(name, value)| name.len() + value.len()).sum();
        if is_kept && used + name.len() + value.len() <= ATTRIBUTES_BYTES_MAX {
            self.attributes.push((name.to_vec(), value.to_vec()));
        }
    }
}

/// Parses a decimal time as whole seconds since 1970. An earlier time, or text that is no number, gives 0.
fn seconds(value: &[u8]) -> u64 {
    let whole = value.split(|&byte| byte == b'.').next().unwrap_or_default();
    std::str::from_utf8(whole).ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// Returns a header's time in seconds since 1970. In the binary form a set sign bit means a time before 1970.
fn header_seconds(header: &tar::Header) -> u64 {
    let first = header.as_old().mtime[0];
    if first == 0xff { 0 } else { header.mtime().unwrap_or(0) }
}

fn without_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    bytes.truncate(end);
    bytes
}

/// Returns the item of a header, or `None` for an entry that makes no file.
fn item(header: &tar::Header, found: Extension) -> Result<Option<Item>, Refused> {
    let plain = found.path.unwrap_or_else(|| header.path_bytes().into_owned());
    // Old writers mark a directory as a file whose name ends with a slash.
    let is_old_directory = plain.ends_with(b"/");
    let link = || -> Result<Vec<u8>, Refused> {
        let link = found.link.clone().or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned));
        let link = link.unwrap_or_default();
        if link.is_empty() || link.len() > PATH_BYTES_MAX || link.contains(&0) {
            let path = show(std::slice::from_ref(&plain));
            return Err(Refused::new(format!("{path} has a link target that is empty or too long")));
        }
        Ok(link)
    };
    // A volume label is no file. A directory of GNU's incremental archives has a listing as content.
    let (is_label, is_dump) = (header.entry_type().as_byte() == b'V', header.entry_type().as_byte() == b'D');
    let kind = match header.entry_type() {
        _ if is_label => return Ok(None),
        _ if is_dump => Kind::Directory,
        EntryType::Directory => Kind::Directory,
        EntryType::Regular if is_old_directory => Kind::Directory,
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Kind::File,
        EntryType::Symlink => Kind::Symlink(link()?),
        EntryType::Link => Kind::Hardlink(link()?),
        EntryType::Fifo => Kind::Fifo,
        EntryType::Char | EntryType::Block => Kind::Dropped,
        other => {
            let (path, letter) = (show(std::slice::from_ref(&plain)), other.as_byte().escape_ascii());
            return Err(Refused::new(format!(
                "{path} is an entry of kind '{letter}', which images do not use"
            )));
        }
    };
    let path = components(&plain)?;
    if found.is_sparse || header.entry_type() == EntryType::GNUSparse {
        let words = "is a sparse entry, which is not taken; archives made without tar's -S are";
        return Err(Refused::new(format!("{} {words}", show(&path))));
    }
    let meta = Meta {
        mode: header.mode().map_err(broken)? & 0o7777,
        uid: found.uid.map_or_else(|| header.uid(), Ok).map_err(broken)?,
        gid: found.gid.map_or_else(|| header.gid(), Ok).map_err(broken)?,
        mtime: found.mtime.unwrap_or_else(|| header_seconds(header)),
        attributes: found.attributes,
    };
    if meta.uid >= u64::from(u32::MAX) || meta.gid >= u64::from(u32::MAX) {
        return Err(Refused::new(format!("{} has an owner beyond any user id", show(&path))));
    }
    Ok(Some(Item { path, kind, meta }))
}

/// Splits a path into components. A path that leads out of the root is refused.
pub(in crate::host) fn components(path: &[u8]) -> Result<Vec<Vec<u8>>, Refused> {
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

/// Formats a path for a message.
pub(in crate::host) fn show(path: &[Vec<u8>]) -> String {
    let joined = path.join(&b'/');
    stead_schemas::validate::printable(&String::from_utf8_lossy(&joined), 128)
}
