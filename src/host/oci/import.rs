//! Images from archives: an OCI layout, `docker save`, or a bare root file system.
//!
//! The archive is as hostile as a registry's answer: only the entries that its own index names are used, each
//! verified by digest, and no path in it is used as a path of the host. It is unpacked once, within bounds, so that
//! entries can be looked up in any order. Memory holds only names and a few documents.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use oci_client::manifest::{OciDescriptor, OciImageManifest};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use stead_controllers::host::HostError;
use stead_schemas::image::ImageConfig;
use stead_schemas::names::Digest;
use stead_schemas::quantity::Bytes;
use stead_schemas::validate::printable;

use super::Refused;
use super::archive::{self, Kind};
use super::holds::Hold;
use super::jobs::Stop;
use super::layout::Layout;
use super::manifest::{
    Blob, INDEXES_MAX, Manifest, Target, ambiguous, as_index, as_manifest, choose, digest_from, digest_of,
    read_manifest,
};
use super::unpack::{self, UNPACKED_BYTES_MAX};

/// Limit on one document of an archive and on all its documents together (index, manifest, configuration), in bytes.
const DOCUMENT_BYTES_MAX: u64 = 4 << 20;
const DOCUMENTS_BYTES_MAX: u64 = 32 << 20;
/// Limit on the entries of an image archive. A layout has one per blob. An archive with more is a root file system.
const ENTRIES_MAX: usize = 20_000;
/// Limit on the names and link targets of all entries, in bytes. Those of a layout have seventy each.
const NAMES_BYTES_MAX: usize = 4 << 20;
/// Limit on symbolic links followed within an archive to reach a layer.
const LINKS_MAX: usize = 8;
/// Number of bytes written between two checks of the free disk space.
const ROOM_INTERVAL_BYTES: u64 = 64 << 20;

/// Imports the archive's blobs into the layout and writes its manifest. The returned hold keeps its content.
pub(super) fn import(
    layout: &Layout,
    path: &Path,
    target: Target,
    stop: &Stop,
) -> Result<(Manifest, Hold), HostError> {
    let refused = |error: Refused| error.into_host("import", "the archive");
    let (manifest, holds) = take(layout, path, target, stop).map_err(refused)?;
    let hold = layout.hold(&manifest.digest);
    layout.write_manifest(&manifest)?;
    // The manifest lists the blobs by now.
    drop(holds);
    Ok((manifest, hold))
}

fn take(layout: &Layout, path: &Path, target: Target, stop: &Stop) -> Result<(Manifest, Vec<Hold>), Refused> {
    let mut opened = Opened::new(layout, path, stop)?;
    if let Some(index) = opened.document("index.json")? {
        let manifest = oci_layout(&mut opened, &index, target)?;
        let mut holds = Vec::new();
        for blob in &manifest.layers {
            let name = format!("blobs/sha256/{}", blob.digest.hex());
            let (digest, _, hold) = opened.store(&name)?;
            holds.push(hold);
            if digest != blob.digest {
                return Err(Refused::new(format!("the archive's {} is something else", blob.digest)));
            }
        }
        Ok((manifest, holds))
    } else if let Some(list) = opened.document("manifest.json")? {
        docker_archive(&mut opened, &list, target)
    } else {
        bare_rootfs(layout, path, opened)
    }
}

/// The position of an entry's content in the unpacked archive.
#[derive(Debug, Clone)]
enum Entry {
    File { at: u64, size: u64 },
    Link(Vec<u8>),
}

/// An unpacked archive with the positions of its entries.
struct Opened<'a> {
    layout: &'a Layout,
    plain: File,
    entries: BTreeMap<String, Entry>,
    documents: u64,
}

impl<'a> Opened<'a> {
    fn new(layout: &'a Layout, path: &Path, stop: &Stop) -> Result<Self, Refused> {
        let file = File::open(path).map_err(Refused::of_io)?;
        let mut plain = tempfile::tempfile_in(layout.scratch()).map_err(Refused::of_io)?;
        let mut unpacked = unpack::open(file, UNPACKED_BYTES_MAX, stop)?;
        copy(layout, &mut unpacked, &mut plain)?;
        plain.rewind().map_err(Refused::of_io)?;
        let entries = list(&plain)?;
        Ok(Self { layout, plain, entries, documents: 0 })
    }

    /// Finds the file with this name. Links within the archive are followed.
    fn find(&self, name: &str) -> Option<(u64, u64)> {
        let mut name = name.trim_start_matches("./").to_owned();
        for _ in 0..LINKS_MAX {
            match self.entries.get(&name)? {
                Entry::File { at, size } => return Some((*at, *size)),
                Entry::Link(target) => name = followed(&name, target)?,
            }
        }
        None
    }

    /// Returns a reader of an entry's content at its position in the archive.
    fn content(&mut self, at: u64, size: u64) -> Result<io::Take<&mut File>, Refused> {
        self.plain.seek(SeekFrom::Start(at)).map_err(Refused::of_io)?;
        Ok((&mut self.plain).take(size))
    }

    fn document(&mut self, name: &str) -> Result<Option<Vec<u8>>, Refused> {
        let Some((at, size)) = self.find(name) else { return Ok(None) };
        self.documents += size;
        if size > DOCUMENT_BYTES_MAX || self.documents > DOCUMENTS_BYTES_MAX {
            return Err(Refused::new(format!("the archive's {} is too large", printable(name, 128))));
        }
        let mut bytes = Vec::new();
        self.content(at, size)?.read_to_end(&mut bytes).map_err(Refused::of_io)?;
        Ok(Some(bytes))
    }

    fn blob_document(&mut self, digest: &Digest) -> Result<Vec<u8>, Refused> {
        let bytes = self.document(&format!("blobs/sha256/{}", digest.hex()))?;
        let bytes = bytes.ok_or_else(|| Refused::new(format!("the archive lacks {digest}")))?;
        if digest_of(&bytes) == *digest {
            Ok(bytes)
        } else {
            Err(Refused::new(format!("the archive's {digest} is something else")))
        }
    }

    /// Stores an entry as a blob under the digest of its content.
    fn store(&mut self, name: &str) -> Result<(Digest, u64, Hold), Refused> {
        let layout = self.layout;
        let (at, size) =
            self.find(name).ok_or_else(|| Refused::new("the archive lacks one of its layers"))?;
        store(layout, &mut self.content(at, size)?)
    }
}

/// Returns the name that a link within the archive leads to.
fn followed(name: &str, target: &[u8]) -> Option<String> {
    let target = std::str::from_utf8(target).ok()?;
    let mut parts: Vec<&str> = if target.starts_with('/') { Vec::new() } else { name.split('/').collect() };
    parts.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

/// Lists names and positions of all entries. The list is empty if there are more than an image archive has.
fn list(plain: &File) -> Result<BTreeMap<String, Entry>, Refused> {
    let mut reader = io::BufReader::with_capacity(64 << 10, plain);
    let mut entries = BTreeMap::new();
    let (mut is_rootfs, mut bytes) = (false, 0);
    archive::each(&mut reader, |item, size, at| {
        if is_rootfs {
            return Ok(());
        }
        let name = String::from_utf8_lossy(&item.path.join(&b'/')).into_owned();
        bytes += name.len();
        if let Kind::Symlink(target) | Kind::Hardlink(target) = &item.kind {
            bytes += target.len();
        }
        match item.kind {
            Kind::File => drop(entries.insert(name, Entry::File { at, size })),
            Kind::Symlink(target) => drop(entries.insert(name, Entry::Link(target))),
            Kind::Hardlink(target) => {
                drop(entries.insert(name, Entry::Link([b"/".as_slice(), &target].concat())));
            }
            _ => {}
        }
        is_rootfs = entries.len() > ENTRIES_MAX || bytes > NAMES_BYTES_MAX;
        Ok(())
    })?;
    if is_rootfs {
        entries.clear();
    }
    Ok(entries)
}

fn oci_layout(opened: &mut Opened<'_>, index: &[u8], target: Target) -> Result<Manifest, Refused> {
    let mut bytes = index.to_vec();
    let mut digest = None;
    for _ in 0..INDEXES_MAX {
        let Some(index) = as_index(&bytes) else {
            let Some(digest) = digest else {
                return Err(Refused::new("index.json is no image index"));
            };
            let manifest = as_manifest(&bytes)?;
            let config: Digest = manifest
                .config
                .digest
                .parse()
                .map_err(|error| Refused::new(format!("its configuration's digest {error}")))?;
            let config = opened.blob_document(&config)?;
            return read_manifest(digest, &manifest, &config, target.platform);
        };
        let chosen = choose(&index, target)?;
        bytes = opened.blob_document(&chosen)?;
        digest = Some(chosen);
    }
    Err(Refused::new("its indexes are nested too deep"))
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

fn docker_archive(
    opened: &mut Opened<'_>,
    list: &[u8],
    target: Target,
) -> Result<(Manifest, Vec<Hold>), Refused> {
    let mut saved: Vec<Saved> =
        serde_json::from_slice(list).map_err(|_| Refused::new("manifest.json is not one of an image"))?;
    saved.dedup_by(|one, other| one.config == other.config);
    if saved.len() > 1 {
        let name = |saved: &Saved| {
            let tag = saved.repo_tags.as_ref().and_then(|tags| tags.first());
            printable(tag.unwrap_or(&saved.config), 128)
        };
        return Err(ambiguous(saved.iter().map(name)));
    }
    let saved = saved.pop().ok_or_else(|| Refused::new("manifest.json lists no image"))?;
    let config = opened.document(&saved.config)?;
    let config = config.ok_or_else(|| Refused::new("the archive lacks its configuration"))?;
    let mut stored: BTreeMap<(u64, u64), (Digest, u64)> = BTreeMap::new();
    let (mut blobs, mut holds) = (Vec::new(), Vec::new());
    for name in &saved.layers {
        let position = opened.find(name);
        let known = position.and_then(|position| stored.get(&position).cloned());
        let blob = match known {
            Some(blob) => blob,
            None => {
                let (digest, size, hold) = opened.store(name)?;
                holds.push(hold);
                stored.extend(position.map(|position| (position, (digest.clone(), size))));
                (digest, size)
            }
        };
        blobs.push(blob);
    }
    let descriptor = |digest: &Digest, size: u64, media_type: &str| OciDescriptor {
        digest: digest.to_string(),
        size: i64::try_from(size).unwrap_or(i64::MAX),
        media_type: media_type.to_owned(),
        ..OciDescriptor::default()
    };
    let layer = "application/vnd.oci.image.layer.v1.tar";
    let manifest = OciImageManifest {
        config: descriptor(
            &digest_of(&config),
            config.len() as u64,
            "application/vnd.oci.image.config.v1+json",
        ),
        layers: blobs.iter().map(|(digest, size)| descriptor(digest, *size, layer)).collect(),
        ..OciImageManifest::default()
    };
    let digest = digest_of(&serde_json::to_vec(&manifest).unwrap_or_default());
    Ok((read_manifest(digest, &manifest, &config, target.platform)?, holds))
}

/// Copies data while there is room for it on the disk.
fn copy(layout: &Layout, from: &mut dyn Read, to: &mut dyn Write) -> Result<u64, Refused> {
    let (mut size, mut unseen) = (0u64, ROOM_INTERVAL_BYTES);
    let mut buffer = vec![0u8; 256 << 10];
    loop {
        let count = from.read(&mut buffer).map_err(Refused::of_io)?;
        if count == 0 {
            return Ok(size);
        }
        (size, unseen) = (size + count as u64, unseen + count as u64);
        if unseen >= ROOM_INTERVAL_BYTES {
            layout.need_room(0).map_err(Refused::of_io)?;
            unseen = 0;
        }
        to.write_all(&buffer[..count]).map_err(Refused::of_io)?;
    }
}

/// Stores a blob under the digest of its content. No other code uses the file before it gets its name.
fn store(layout: &Layout, content: &mut dyn Read) -> Result<(Digest, u64, Hold), Refused> {
    let file = tempfile::NamedTempFile::new_in(layout.scratch()).map_err(Refused::of_io)?;
    let mut out = HashWriter { out: file.as_file(), hash: Sha256::new() };
    let size = copy(layout, content, &mut out)?;
    let digest = digest_from(out.hash);
    file.as_file().sync_all().map_err(Refused::of_io)?;
    let hold = layout.hold(&digest);
    file.persist(layout.blob(&digest)).map_err(|error| Refused::of_io(error.error))?;
    layout.sync_blobs().map_err(Refused::of_io)?;
    Ok((digest, size, hold))
}

/// Imports a bare root file system: the archive itself is the single layer, and the instance names the program to
/// run.
fn bare_rootfs(
    layout: &Layout,
    path: &Path,
    mut opened: Opened<'_>,
) -> Result<(Manifest, Vec<Hold>), Refused> {
    opened.plain.rewind().map_err(Refused::of_io)?;
    let mut out = HashWriter { out: io::sink(), hash: Sha256::new() };
    io::copy(&mut opened.plain, &mut out).map_err(Refused::of_io)?;
    let diff_id = digest_from(out.hash);
    // The file is known to be an archive by now. Its plain form need not occupy space beside the blob.
    drop(opened);
    let (digest, size, hold) = store(layout, &mut File::open(path).map_err(Refused::of_io)?)?;
    let layer = Blob { digest: digest.clone(), size: Bytes(size), diff_id };
    // The layer's own digest would be unique, but it is not the digest of a manifest. So a digest is derived from it.
    let identity = digest_of(format!("bare root file system {digest}").as_bytes());
    Ok((Manifest { digest: identity, layers: vec![layer], config: ImageConfig::default() }, vec![hold]))
}

struct HashWriter<Writer> {
    out: Writer,
    hash: Sha256,
}

impl<Writer: Write> Write for HashWriter<Writer> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.out.write(bytes)?;
        self.hash.update(&bytes[..count]);
        Ok(count)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
