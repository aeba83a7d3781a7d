//! A writer of the single archive that the builder of a root file system reads. Everything passes through unchanged:
//! names and link targets byte for byte, extended attributes, and sizes that exceed the size field of a header.

use std::io::{self, Read, Write};

use super::Refused;
use super::archive::{Kind, Meta};
use super::layout::Layout;
use super::merge::{Named, Node};

/// Number of bytes written between two checks of the free disk space.
const ROOM_INTERVAL_BYTES: u64 = 64 << 20;

/// A writer of entries. The builder's file system grows with them.
pub(super) struct Emitter<'a, Writer: Write> {
    out: tar::Builder<io::BufWriter<Writer>>,
    layout: &'a Layout,
    /// Number of bytes written since the last check of the free disk space.
    written: u64,
}

impl<'a, Writer: Write> Emitter<'a, Writer> {
    pub(super) fn new(out: Writer, layout: &'a Layout) -> Self {
        let out = tar::Builder::new(io::BufWriter::with_capacity(1 << 20, out));
        Self { out, layout, written: ROOM_INTERVAL_BYTES }
    }

    pub(super) fn directory(&mut self, path: &[u8], meta: &Meta) -> Result<(), Refused> {
        self.append(tar::EntryType::Directory, path, b"", meta, 0, &mut io::empty())
    }

    /// Writes a node at its first path, and hard links to it at its other paths.
    pub(super) fn node(
        &mut self,
        node: &Node,
        paths: &[Named],
        size: u64,
        content: &mut dyn Read,
    ) -> Result<(), Refused> {
        let Some((first, links)) = paths.split_first() else { return Ok(()) };
        let (meta, none) = (&node.meta, &mut io::empty());
        match &node.kind {
            Kind::File => self.append(tar::EntryType::Regular, &first.path, b"", meta, size, content)?,
            Kind::Fifo => self.append(tar::EntryType::Fifo, &first.path, b"", meta, 0, none)?,
            Kind::Symlink(target) => {
                self.append(tar::EntryType::Symlink, &first.path, target, meta, 0, none)?
            }
            Kind::Directory | Kind::Hardlink(_) | Kind::Dropped => {}
        }
        let plain = Meta { attributes: Vec::new(), ..meta.clone() };
        for link in links {
            self.append(tar::EntryType::Link, &link.path, &first.path, &plain, 0, &mut io::empty())?;
        }
        Ok(())
    }

    pub(super) fn finish(self) -> Result<(), Refused> {
        self.out.into_inner().and_then(|mut inner| inner.flush()).map_err(Refused::of_io)
    }

    fn append(
        &mut self,
        kind: tar::EntryType,
        path: &[u8],
        link: &[u8],
        meta: &Meta,
        size: u64,
        content: &mut dyn Read,
    ) -> Result<(), Refused> {
        let records = meta.attributes.iter().map(|(name, value)| {
            // Names are bytes in the archive, and the builder takes the same names as the kernel.
            (format!("SCHILY.xattr.{}", String::from_utf8_lossy(name)), value.as_slice())
        });
        let records: Vec<_> = records.collect();
        let pairs = records.iter().map(|(key, value)| (key.as_str(), *value));
        self.out.append_pax_extensions(pairs).map_err(Refused::of_io)?;
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(meta.mode);
        header.set_uid(meta.uid);
        header.set_gid(meta.gid);
        header.set_mtime(meta.mtime.min(u64::from(u32::MAX)));
        header.set_size(size);
        self.long(tar::EntryType::GNULongName, path, &mut header.as_old_mut().name)?;
        self.long(tar::EntryType::GNULongLink, link, &mut header.as_old_mut().linkname)?;
        header.set_cksum();
        let watched = Watched { inner: content, layout: self.layout, written: &mut self.written };
        self.out.append(&header, watched.take(size)).map_err(Refused::of_io)
    }

    /// Writes a name into its field, or as an entry of its own before the header if it does not fit.
    fn long(&mut self, kind: tar::EntryType, bytes: &[u8], field: &mut [u8]) -> Result<(), Refused> {
        let fits = bytes.len().min(field.len());
        field[..fits].copy_from_slice(&bytes[..fits]);
        if fits == bytes.len() {
            return Ok(());
        }
        let mut header = tar::Header::new_gnu();
        header.as_old_mut().name[..13].copy_from_slice(b"././@LongLink");
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        // The size includes the terminating NUL.
        header.set_size(bytes.len() as u64 + 1);
        header.set_cksum();
        self.out.append(&header, bytes.chain(&b"\0"[..])).map_err(Refused::of_io)
    }
}

/// Content that is passed on with checks of the free disk space.
struct Watched<'a> {
    inner: &'a mut dyn Read,
    layout: &'a Layout,
    written: &'a mut u64,
}

impl Read for Watched<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        *self.written = self.written.saturating_add(count as u64);
        if *self.written >= ROOM_INTERVAL_BYTES {
            *self.written = 0;
            self.layout.need_room(0)?;
        }
        Ok(count)
    }
}
