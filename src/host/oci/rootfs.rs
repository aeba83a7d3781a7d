//! From layers to one read-only root file system, without unpacking anything on the host.
//!
//! Two passes over the layers: the first reads only names and checks every diff id, the second
//! streams the content of what survived into one archive, which `sqfstar` (as an unprivileged user)
//! turns into a squashfs. Memory holds the names, never the content.

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use sha2::{Digest as _, Sha256};
use stead_controllers::host::HostError;

use super::Refused;
use super::archive::{self, Kind, Meta};
use super::layout::{Blob, Layout, Manifest};
use super::merge::{Merged, Place, Tree};

/// What an image may unpack to; the largest in common use are some 20 GiB.
const UNPACKED_BYTES_MAX: u64 = 64 << 30;
/// gzip reaches 1030; real layers stay below 20. A small archive may unpack to this much anyway.
const RATIO_MAX: u64 = 200;
const RATIO_FREE_BYTES: u64 = 1 << 30;
/// `nobody` of Debian: the builder of file systems needs no right at all.
const NOBODY: u32 = 65534;

/// Builds the root file system of a manifest whose blobs are all here.
pub(super) fn build(layout: &Layout, manifest: &Manifest) -> Result<(), HostError> {
    let refused = |error: Refused| error.into_host("convert the image", manifest.digest.as_str());
    let mut tree = Tree::default();
    let mut budget = UNPACKED_BYTES_MAX;
    for (layer, blob) in manifest.layers.iter().enumerate() {
        let used = index(layout, blob, layer, budget, &mut tree).map_err(refused)?;
        budget = budget.saturating_sub(used);
    }
    let merged = tree.finish();
    let scratch = tempfile::NamedTempFile::new_in(layout.scratch())
        .map_err(|error| HostError::io("convert the image", manifest.digest.as_str(), error))?;
    let failed = |error| HostError::io("convert the image", manifest.digest.as_str(), error);
    let mut builder = start_builder(scratch.as_file()).map_err(failed)?;
    let stdin = builder.stdin.take().expect("it was asked for");
    let written = emit(layout, manifest, &merged, stdin);
    let output = builder.wait_with_output().map_err(failed)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        // The builder ran out of room: its own words say so, its status does not.
        let kind =
            if said.contains("No space left") { io::ErrorKind::StorageFull } else { io::ErrorKind::Other };
        return Err(failed(io::Error::new(kind, said)));
    }
    written.map_err(refused)?;
    let finish = || -> io::Result<()> {
        std::os::unix::fs::chown(scratch.path(), Some(0), Some(0))?;
        scratch.as_file().sync_all()?;
        fs::rename(scratch.path(), layout.rootfs(&manifest.digest))?;
        File::open(layout.rootfs(&manifest.digest).parent().unwrap_or(Path::new("/")))?.sync_all()
    };
    finish().map_err(failed)
}

/// Reads the names of a layer into the tree; how many bytes it unpacked to.
fn index(layout: &Layout, blob: &Blob, layer: usize, budget: u64, tree: &mut Tree) -> Result<u64, Refused> {
    let mut reader = Hashing { inner: open(layout, blob, budget)?, hash: Sha256::new(), count: 0 };
    let mut ordinal = 0;
    archive::read(&mut reader, |item, _, _| {
        let place = Place { layer, ordinal };
        ordinal += 1;
        tree.apply(place, item)
    })?;
    // What follows the archive's end is part of its digest.
    io::copy(&mut reader, &mut io::sink()).map_err(broken)?;
    if hex::encode(reader.hash.finalize()) != blob.diff_id.hex() {
        return Err(Refused::new("a layer's content is not what the image's configuration says (diff_id)"));
    }
    Ok(reader.count)
}

/// Streams what survived: directories first, then each layer's entries.
fn emit(layout: &Layout, manifest: &Manifest, merged: &Merged, stdin: impl Write) -> Result<(), Refused> {
    let mut out = tar::Builder::new(io::BufWriter::with_capacity(1 << 20, stdin));
    for (path, meta) in merged.directories.iter().filter(|(path, _)| !path.is_empty()) {
        append(&mut out, path, tar::EntryType::Directory, meta, 0, &mut io::empty())?;
    }
    for (layer, blob) in manifest.layers.iter().enumerate() {
        let mut ordinal = 0;
        archive::read(open(layout, blob, UNPACKED_BYTES_MAX)?, |_, size, content| {
            let place = Place { layer, ordinal };
            ordinal += 1;
            match merged.content.get(&place) {
                Some((node, paths)) => emit_node(&mut out, &node.kind, &node.meta, paths, size, content),
                None => Ok(()),
            }
        })?;
    }
    out.into_inner().and_then(|mut inner| inner.flush()).map_err(broken)
}

fn emit_node<W: Write>(
    out: &mut tar::Builder<W>,
    kind: &Kind,
    meta: &Meta,
    paths: &[Vec<u8>],
    size: u64,
    content: &mut dyn Read,
) -> Result<(), Refused> {
    let Some((first, links)) = paths.split_first() else { return Ok(()) };
    match kind {
        Kind::File => append(out, first, tar::EntryType::Regular, meta, size, content)?,
        Kind::Fifo => append(out, first, tar::EntryType::Fifo, meta, 0, &mut io::empty())?,
        Kind::Symlink(target) => append_link(out, first, tar::EntryType::Symlink, meta, target)?,
        Kind::Directory | Kind::Hardlink(_) | Kind::Dropped => {}
    }
    for link in links {
        append_link(out, link, tar::EntryType::Link, meta, first)?;
    }
    Ok(())
}

fn header(kind: tar::EntryType, meta: &Meta, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(meta.mode);
    header.set_uid(meta.uid);
    header.set_gid(meta.gid);
    header.set_mtime(meta.mtime.min(u64::from(u32::MAX)));
    header.set_size(size);
    header
}

fn append<W: Write>(
    out: &mut tar::Builder<W>,
    path: &[u8],
    kind: tar::EntryType,
    meta: &Meta,
    size: u64,
    content: &mut dyn Read,
) -> Result<(), Refused> {
    if let Some(capability) = &meta.capability {
        let record = ("SCHILY.xattr.security.capability", capability.as_slice());
        out.append_pax_extensions([record]).map_err(broken)?;
    }
    out.append_data(&mut header(kind, meta, size), as_path(path), content.take(size)).map_err(broken)
}

fn append_link<W: Write>(
    out: &mut tar::Builder<W>,
    path: &[u8],
    kind: tar::EntryType,
    meta: &Meta,
    target: &[u8],
) -> Result<(), Refused> {
    out.append_link(&mut header(kind, meta, 0), as_path(path), as_path(target)).map_err(broken)
}

fn as_path(bytes: &[u8]) -> &Path {
    Path::new(std::ffi::OsStr::from_bytes(bytes))
}

fn broken(error: io::Error) -> Refused {
    Refused::of_io(error)
}

/// A layer's archive, decompressed by what its first bytes say, within the budget.
fn open(layout: &Layout, blob: &Blob, budget: u64) -> Result<Box<dyn Read>, Refused> {
    let mut file = File::open(layout.blob(&blob.digest)).map_err(broken)?;
    let mut magic = [0u8; 4];
    let count = file.read(&mut magic).map_err(broken)?;
    io::Seek::rewind(&mut file).map_err(broken)?;
    let file = BufReader::with_capacity(256 << 10, file);
    let reader: Box<dyn Read> = match &magic[..count] {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
        [0x28, 0xb5, 0x2f, 0xfd] => Box::new(zstd::Decoder::with_buffer(file).map_err(broken)?),
        _ => Box::new(file),
    };
    let by_ratio = RATIO_FREE_BYTES.saturating_add(blob.size.0.saturating_mul(RATIO_MAX));
    Ok(Box::new(Bounded { inner: reader, left: budget.min(by_ratio) }))
}

/// Ends with an error where `take` would end silently.
struct Bounded {
    inner: Box<dyn Read>,
    left: u64,
}

impl Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        let too_much =
            || io::Error::new(io::ErrorKind::InvalidData, "the layers unpack to more than an image may");
        self.left = self.left.checked_sub(count as u64).ok_or_else(too_much)?;
        Ok(count)
    }
}

struct Hashing<R> {
    inner: R,
    hash: Sha256,
    count: u64,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hash.update(&buffer[..count]);
        self.count += count as u64;
        Ok(count)
    }
}

/// `sqfstar` as nobody, with no environment; its one file is the one it is handed, by descriptor,
/// so that it need not reach into the data directory.
fn start_builder(out: &File) -> io::Result<Child> {
    std::os::unix::fs::fchown(out, Some(NOBODY), Some(NOBODY))?;
    Command::new("sqfstar")
        .args(["-comp", "lz4", "-quiet", "-no-progress", "-force", "/proc/self/fd/1"])
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .current_dir("/")
        .uid(NOBODY)
        .gid(NOBODY)
        .stdin(Stdio::piped())
        .stdout(out.try_clone()?)
        .stderr(Stdio::piped())
        .spawn()
}
