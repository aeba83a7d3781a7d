//! The image directory: blobs and manifests by digest, root file systems by manifest digest.
//!
//! ```text
//! DATA/images/blobs/HEX            verified; HEX.partial while it is fetched
//! DATA/images/manifests/HEX.json   what was resolved, with the image's configuration
//! DATA/images/rootfs/HEX.squashfs  complete, or not there
//! DATA/images/scratch/             of this daemon; emptied at start
//! ```

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use stead_controllers::host::{HostError, Layer, Resolved, StoredImage};
use stead_schemas::image::ImageConfig;
use stead_schemas::names::Digest;
use stead_schemas::quantity::Bytes;

use crate::host::files;

/// Paths of the image directory.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    root: PathBuf,
}

/// A manifest with its configuration, both verified.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Manifest {
    pub(super) digest: Digest,
    pub(super) layers: Vec<Blob>,
    pub(super) config: ImageConfig,
}

/// One layer as the manifest lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Blob {
    pub(super) digest: Digest,
    pub(super) size: Bytes,
    /// Digest of the uncompressed archive, from the configuration.
    pub(super) diff_id: Digest,
}

impl Layout {
    pub(super) fn open(root: PathBuf) -> Result<Self, HostError> {
        let layout = Self { root };
        let failed = |error| HostError::io("prepare", layout.root.display().to_string(), error);
        // What a crashed daemon left in here is of no use to anyone.
        match fs::remove_dir_all(layout.scratch()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        for dir in ["blobs", "manifests", "rootfs", "scratch"] {
            fs::create_dir_all(layout.root.join(dir)).map_err(failed)?;
        }
        Ok(layout)
    }

    pub(super) fn scratch(&self) -> PathBuf {
        self.root.join("scratch")
    }
    pub(super) fn blob(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs").join(digest.hex())
    }
    pub(super) fn partial(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs").join(format!("{}.partial", digest.hex()))
    }
    pub(super) fn rootfs(&self, digest: &Digest) -> PathBuf {
        self.root.join("rootfs").join(format!("{}.squashfs", digest.hex()))
    }
    fn manifest_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("manifests").join(format!("{}.json", digest.hex()))
    }

    pub(super) fn write_manifest(&self, manifest: &Manifest) -> Result<(), HostError> {
        let bytes = serde_json::to_vec(manifest).unwrap_or_default();
        files::write_whole(&self.manifest_path(&manifest.digest), &bytes, 0o600)
    }

    /// `None` when it is not there or not readable: it is then resolved again.
    pub(super) fn manifest(&self, digest: &Digest) -> Option<Manifest> {
        serde_json::from_slice(&fs::read(self.manifest_path(digest)).ok()?).ok()
    }

    pub(super) fn resolved(&self, manifest: &Manifest) -> Resolved {
        let length = |path: &Path| fs::metadata(path).map(|meta| Bytes(meta.len())).ok();
        let layer = |blob: &Blob| {
            let whole = length(&self.blob(&blob.digest)).map(|_| blob.size);
            // A partial blob that is as long as the whole one is not verified yet.
            let part = || {
                length(&self.partial(&blob.digest)).map(|part| part.min(Bytes(blob.size.0.saturating_sub(1))))
            };
            Layer {
                digest: blob.digest.clone(),
                size: blob.size,
                present: whole.or_else(part).unwrap_or_default(),
            }
        };
        Resolved { digest: manifest.digest.clone(), layers: manifest.layers.iter().map(layer).collect() }
    }

    pub(super) fn stored(&self, digest: &Digest) -> Option<StoredImage> {
        let size = fs::metadata(self.rootfs(digest)).ok()?.len();
        let config = self.manifest(digest)?.config;
        Some(StoredImage { digest: digest.clone(), size: Bytes(size), config })
    }

    /// Digests with a complete root file system.
    pub(super) fn list(&self) -> Result<Vec<Digest>, HostError> {
        let dir = self.root.join("rootfs");
        let entries =
            fs::read_dir(&dir).map_err(|error| HostError::io("list", dir.display().to_string(), error))?;
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        Ok(names
            .filter_map(|name| format!("sha256:{}", name.strip_suffix(".squashfs")?).parse().ok())
            .collect())
    }

    /// Removes all of a digest, and the blobs that no other manifest lists.
    pub(super) fn remove(&self, digest: &Digest) -> io::Result<()> {
        let gone = |path: PathBuf| match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
        gone(self.rootfs(digest))?;
        let layers = self.manifest(digest).map(|manifest| manifest.layers).unwrap_or_default();
        gone(self.manifest_path(digest))?;
        let kept = self.listed_blobs()?;
        for blob in layers.into_iter().filter(|blob| !kept.contains(&blob.digest)) {
            gone(self.blob(&blob.digest))?;
            gone(self.partial(&blob.digest))?;
        }
        Ok(())
    }

    fn listed_blobs(&self) -> io::Result<BTreeSet<Digest>> {
        let manifests = fs::read_dir(self.root.join("manifests"))?
            .flatten()
            .filter_map(|entry| serde_json::from_slice::<Manifest>(&fs::read(entry.path()).ok()?).ok());
        Ok(manifests.flat_map(|manifest| manifest.layers.into_iter().map(|blob| blob.digest)).collect())
    }
}
