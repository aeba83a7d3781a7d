//! Fuzz targets for input from registries and archives: layers, documents, and HTTP values.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::sync::LazyLock;

use rustix::fs::{MemfdFlags, memfd_create};
use stead_schemas::names::Platform;
use stead_schemas::quantity::Bytes;

use super::emit::Emitter;
use super::guard::Allowed;
use super::import;
use super::jobs::Stop;
use super::layout::Layout;
use super::manifest::{Manifest, Target, as_index, as_manifest, choose, digest_of, read_manifest};
use super::merge::{Position, Tree};
use super::{Refused, archive, session, transport, unpack};

/// Limit on the unpacked size of a fuzzed layer, in bytes. It is small, so that a run is short.
const BUDGET_BYTES: u64 = 4 << 20;
/// Size of a block of the format, and the position of a header's magic value in it, in bytes.
const BLOCK_BYTES: usize = 512;
const MARK: std::ops::Range<usize> = 257..262;

/// Layout that exists as long as the process. The emitter asks it for free space.
static LAYOUT: LazyLock<(tempfile::TempDir, Layout)> = LazyLock::new(|| {
    let dir = tempfile::tempdir().expect("scratch");
    let layout = Layout::open(dir.path().join("images"), Bytes(0), None).expect("opened");
    (dir, layout)
});

/// Imports the input as an archive of an image. Checksums of headers are made right first.
pub fn imports(data: &[u8]) {
    let mut archive = data.to_vec();
    mend_checksums(&mut archive);
    let (_wanted, stop) = Stop::new();
    let target = Target { platform: Platform::LinuxAmd64, level: 4 };
    let Ok(mut file) = tempfile::NamedTempFile::new() else { return };
    if file.write_all(&archive).is_ok()
        && let Ok((manifest, _hold)) = import::import(&LAYOUT.1, file.path(), target, &stop)
    {
        assert!(!manifest.layers.is_empty(), "an image without content");
    }
}

/// Gives all headers the right checksum: a fuzzer does not find one by chance.
fn mend_checksums(archive: &mut [u8]) {
    for block in archive.chunks_exact_mut(BLOCK_BYTES).filter(|block| &block[MARK] == b"ustar") {
        let mut header = tar::Header::new_old();
        header.as_mut_bytes().copy_from_slice(block);
        header.set_cksum();
        block.copy_from_slice(header.as_bytes());
    }
}

/// Merges two layers and writes the surviving entries. The first byte gives the layers' border in blocks. The result
/// must be readable again.
pub fn layers(data: &[u8]) {
    let Some((&blocks, archives)) = data.split_first() else { return };
    let mut archives = archives.to_vec();
    mend_checksums(&mut archives);
    let border = (usize::from(blocks) * BLOCK_BYTES).min(archives.len());
    let (first, second) = archives.split_at(border);
    let Ok(written) = merge(&[first, second]) else { return };
    let again = archive::read(&written[..], |_, _, _| Ok(()));
    assert!(again.is_ok(), "what was written cannot be read: {again:?}");
}

fn merge(layers: &[&[u8]]) -> Result<Vec<u8>, Refused> {
    let (_wanted, stop) = Stop::new();
    let mut tree = Tree::default();
    for (layer, bytes) in (0..).zip(layers) {
        let mut ordinal = 0;
        archive::read(
            unpack::open(file(bytes).map_err(Refused::of_io)?, BUDGET_BYTES, &stop)?,
            |item, _, _| {
                ordinal += 1;
                tree.apply(Position { layer, ordinal }, item)
            },
        )?;
    }
    let merged = tree.finish();
    let mut out = Vec::new();
    let mut emitter = Emitter::new(&mut out, &LAYOUT.1);
    for (path, meta) in merged.directories.iter().filter(|(path, _)| !path.is_empty()) {
        emitter.directory(path, meta)?;
    }
    for (layer, bytes) in (0..).zip(layers) {
        let mut ordinal = 0;
        let reader = unpack::open(file(bytes).map_err(Refused::of_io)?, BUDGET_BYTES, &stop)?;
        archive::read(reader, |_, size, content| {
            ordinal += 1;
            match merged.at(Position { layer, ordinal }) {
                Some((node, paths)) => emitter.node(node, paths, size, content),
                None => Ok(()),
            }
        })?;
    }
    emitter.finish()?;
    Ok(out)
}

fn file(bytes: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create("layer", MemfdFlags::CLOEXEC)?);
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file)
}

/// Reads an index, a manifest and a configuration, separated by NULs.
pub fn manifests(data: &[u8]) {
    let mut documents = data.split(|&byte| byte == 0);
    let mut next = || documents.next().unwrap_or_default();
    let (index, manifest, config) = (next(), next(), next());
    for platform in [Platform::LinuxAmd64, Platform::LinuxArm64] {
        if let Some(index) = as_index(index) {
            let _ = choose(&index, Target { platform, level: 4 });
        }
        if let Ok(manifest) = as_manifest(manifest) {
            let _ = read_manifest(digest_of(config), &manifest, config, platform);
        }
    }
    let _ = serde_json::from_slice::<Manifest>(index);
}

/// Reads the input as a challenge, a token, a redirect and an address of the configuration.
pub fn registry(data: &[u8]) {
    session::fuzz(data);
    if let Ok(text) = std::str::from_utf8(data) {
        transport::fuzz(text);
        let _ = text.parse::<Allowed>();
    }
}
