//! Images from archives: an OCI layout, `docker save`, or a bare root file system.
//!
//! The archive is as hostile as a registry's answer: only the entries that its own index names are
//! taken, each verified by digest, and no path of it is used as a path of the host.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::Path;

use oci_client::manifest::{OciDescriptor, OciImageManifest};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use stead_controllers::host::HostError;
use stead_schemas::image::ImageConfig;
use stead_schemas::names::{Digest, Platform};
use stead_schemas::quantity::Bytes;

use super::Refused;
use super::archive;
use super::layout::{Blob, Layout, Manifest};
use super::registry::{as_index, choose, digest_of, read_manifest};

/// Documents of an archive that are read into memory.
const DOCUMENT_BYTES_MAX: u64 = 4 << 20;
/// As many small files are looked at; a layout has one for each blob.
const DOCUMENTS_MAX: usize = 4096;

/// Takes the archive's blobs into the layout and writes its manifest.
pub(super) fn import(layout: &Layout, path: &Path, platform: Platform) -> Result<Manifest, HostError> {
    let refused = |error: Refused| error.into_host("import", "the archive");
    let documents = documents(path).map_err(refused)?;
    let manifest = if let Some(index) = documents.get("index.json") {
        let found = oci_layout(&documents, index, platform).map_err(refused)?;
        let wanted = found
            .layers
            .iter()
            .map(|blob| (format!("blobs/sha256/{}", blob.digest.hex()), blob.digest.clone()));
        take_blobs(layout, path, &wanted.collect()).map_err(refused)?;
        found
    } else if let Some(list) = documents.get("manifest.json") {
        docker_archive(layout, path, &documents, list, platform).map_err(refused)?
    } else {
        bare_rootfs(layout, path).map_err(refused)?
    };
    layout.write_manifest(&manifest)?;
    Ok(manifest)
}

fn broken(error: io::Error) -> Refused {
    Refused::of_io(error)
}

fn open(path: &Path) -> Result<Box<dyn Read>, Refused> {
    let mut file = File::open(path).map_err(broken)?;
    let mut magic = [0u8; 2];
    let count = file.read(&mut magic).map_err(broken)?;
    io::Seek::rewind(&mut file).map_err(broken)?;
    let reader = BufReader::with_capacity(256 << 10, file);
    if magic[..count] == [0x1f, 0x8b] {
        return Ok(Box::new(flate2::bufread::MultiGzDecoder::new(reader)));
    }
    Ok(Box::new(reader))
}

fn name(item: &archive::Item) -> String {
    String::from_utf8_lossy(&item.path.join(&b'/')).into_owned()
}

/// Every small file at the top or among the blobs: indexes, manifests, configurations.
fn documents(path: &Path) -> Result<BTreeMap<String, Vec<u8>>, Refused> {
    let mut found = BTreeMap::new();
    archive::read(open(path)?, |item, size, content| {
        let name = name(&item);
        let is_document = !name.contains('/') || name.starts_with("blobs/sha256/");
        if item.kind == archive::Kind::File && is_document && size <= DOCUMENT_BYTES_MAX {
            let mut bytes = Vec::new();
            content.take(DOCUMENT_BYTES_MAX).read_to_end(&mut bytes).map_err(broken)?;
            // Layers are no documents: only what reads as JSON is kept.
            if bytes.first() == Some(&b'{') || bytes.first() == Some(&b'[') {
                found.insert(name, bytes);
            }
            if found.len() > DOCUMENTS_MAX {
                return Err(Refused::new("the archive has too many documents"));
            }
        }
        Ok(())
    })?;
    Ok(found)
}

type Documents = BTreeMap<String, Vec<u8>>;

fn blob_document<'a>(documents: &'a Documents, digest: &Digest) -> Result<&'a [u8], Refused> {
    let bytes = documents.get(&format!("blobs/sha256/{}", digest.hex()));
    let bytes = bytes.ok_or_else(|| Refused::new(format!("the archive lacks {digest}")))?;
    if digest_of(bytes) == *digest {
        Ok(bytes)
    } else {
        Err(Refused::new(format!("the archive's {digest} is something else")))
    }
}

fn oci_layout(documents: &Documents, index: &[u8], platform: Platform) -> Result<Manifest, Refused> {
    let mut index = as_index(index).ok_or_else(|| Refused::new("index.json is no image index"))?;
    // An index may hold one more index, as multi-platform layouts do.
    for _ in 0..2 {
        let lone = index.manifests.first().filter(|_| index.manifests.len() == 1);
        let digest = match lone {
            Some(entry) => entry.digest.parse().ok(),
            None => choose(&index, platform),
        };
        let digest: Digest = digest
            .ok_or_else(|| Refused::unsupported(format!("it holds nothing for {}", platform.as_str())))?;
        let bytes = blob_document(documents, &digest)?;
        if let Some(inner) = as_index(bytes) {
            index = inner;
            continue;
        }
        let manifest: OciImageManifest = serde_json::from_slice(bytes)
            .map_err(|error| Refused::new(format!("its manifest is not one: {error}")))?;
        let config: Digest = manifest
            .config
            .digest
            .parse()
            .map_err(|error| Refused::new(format!("its configuration's digest {error}")))?;
        return read_manifest(digest, &manifest, blob_document(documents, &config)?, Some(platform));
    }
    Err(Refused::new("its indexes are nested too deep"))
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    layers: Vec<String>,
}

fn docker_archive(
    layout: &Layout,
    path: &Path,
    documents: &Documents,
    list: &[u8],
    platform: Platform,
) -> Result<Manifest, Refused> {
    let saved: Vec<Saved> = serde_json::from_slice(list)
        .map_err(|error| Refused::new(format!("manifest.json is not one: {error}")))?;
    let saved = saved.into_iter().next().ok_or_else(|| Refused::new("manifest.json lists no image"))?;
    let config =
        documents.get(&saved.config).ok_or_else(|| Refused::new("the archive lacks its configuration"))?;
    let blobs = store_layers(layout, path, &saved.layers)?;
    let descriptor = |digest: String, size: u64| OciDescriptor {
        digest,
        size: i64::try_from(size).unwrap_or(i64::MAX),
        media_type: "application/vnd.oci.image.layer.v1.tar".to_owned(),
        ..OciDescriptor::default()
    };
    let manifest = OciImageManifest {
        config: descriptor(digest_of(config).to_string(), config.len() as u64),
        layers: blobs.iter().map(|(digest, size)| descriptor(digest.to_string(), *size)).collect(),
        ..OciImageManifest::default()
    };
    let digest = digest_of(&serde_json::to_vec(&manifest).unwrap_or_default());
    read_manifest(digest, &manifest, config, Some(platform))
}

/// Stores the named entries as blobs, in the order of the names.
fn store_layers(layout: &Layout, path: &Path, names: &[String]) -> Result<Vec<(Digest, u64)>, Refused> {
    let mut stored = BTreeMap::new();
    archive::read(open(path)?, |item, _, content| {
        let name = name(&item);
        if names.contains(&name) {
            stored.insert(name, store(layout, content)?);
        }
        Ok(())
    })?;
    let find = |name: &String| {
        stored.get(name).cloned().ok_or_else(|| Refused::new("the archive lacks one of its layers"))
    };
    names.iter().map(find).collect()
}

/// Stores a blob under the digest that it turns out to have.
fn store(layout: &Layout, content: &mut dyn Read) -> Result<(Digest, u64), Refused> {
    let mut file = tempfile::NamedTempFile::new_in(layout.scratch()).map_err(broken)?;
    let mut hash = Sha256::new();
    let mut size = 0u64;
    let mut buffer = vec![0u8; 256 << 10];
    loop {
        let count = content.read(&mut buffer).map_err(broken)?;
        if count == 0 {
            break;
        }
        hash.update(&buffer[..count]);
        file.write_all(&buffer[..count]).map_err(broken)?;
        size += count as u64;
    }
    let digest: Digest =
        format!("sha256:{}", hex::encode(hash.finalize())).parse().map_err(|_| Refused::new("no digest"))?;
    file.as_file().sync_all().map_err(broken)?;
    file.persist(layout.blob(&digest)).map_err(|error| broken(error.error))?;
    Ok((digest, size))
}

/// Takes the blobs that a manifest lists, each verified.
fn take_blobs(layout: &Layout, path: &Path, wanted: &BTreeMap<String, Digest>) -> Result<(), Refused> {
    let mut missing: Vec<&String> = wanted.keys().collect();
    archive::read(open(path)?, |item, _, content| {
        let name = name(&item);
        let Some(expected) = wanted.get(&name) else { return Ok(()) };
        let (digest, _) = store(layout, content)?;
        if digest != *expected {
            return Err(Refused::new(format!("the archive's {expected} is something else")));
        }
        missing.retain(|other| **other != name);
        Ok(())
    })?;
    if missing.is_empty() { Ok(()) } else { Err(Refused::new("the archive lacks one of its layers")) }
}

/// The archive itself is the one layer; what to run is said by the instance.
fn bare_rootfs(layout: &Layout, path: &Path) -> Result<Manifest, Refused> {
    let (diff_id, _) = {
        let mut hash = Sha256::new();
        let count = io::copy(&mut open(path)?, &mut HashWriter(&mut hash)).map_err(broken)?;
        let digest: Digest = format!("sha256:{}", hex::encode(hash.finalize()))
            .parse()
            .map_err(|_| Refused::new("no digest"))?;
        (digest, count)
    };
    let (digest, size) = store(layout, &mut File::open(path).map_err(broken)?)?;
    let layer = Blob { digest: digest.clone(), size: Bytes(size), diff_id };
    // A digest of the layer's own would collide with nothing, but is no manifest's: one is derived.
    let identity = digest_of(format!("bare root file system {digest}").as_bytes());
    Ok(Manifest { digest: identity, layers: vec![layer], config: ImageConfig::default() })
}

struct HashWriter<'a>(&'a mut Sha256);

impl Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
