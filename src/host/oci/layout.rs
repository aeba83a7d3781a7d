//! The image directory: blobs and manifests by digest, root file systems by manifest digest.
//!
//! ```text
//! DATA/images/blobs/HEX            verified
//! DATA/images/partials/HEX.SOURCE  while it is fetched; each source writes to a file of its own
//! DATA/images/manifests/HEX.json   what was resolved, with the image's configuration
//! DATA/images/rootfs/HEX.squashfs  complete, or not there
//! DATA/images/scratch/             of this daemon; emptied at start
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stead_controllers::host::{HostError, Layer, Resolved, StoredImage};
use stead_schemas::names::{Digest, ImageRef};
use stead_schemas::quantity::Bytes;

use super::holds::{Held, Hold, Holds};
use super::manifest::{Blob, Manifest, digest_of};
use super::quota::Quota;
use crate::host::files;
use crate::unfinished::remove_unfinished;

/// File name extension of root file systems.
pub(super) const ROOTFS_ENDING: &str = ".squashfs";

/// The image directory and its paths.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    root: PathBuf,
    /// Free space that must remain on the file system.
    reserve: Bytes,
    quota: Option<Arc<Quota>>,
    holds: Arc<Holds>,
}

/// The origin of content: a repository of a registry.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Source {
    pub(super) registry: String,
    /// Hash of registry and repository, for file names.
    name: String,
}

impl Source {
    pub(super) fn of(reference: &ImageRef) -> Self {
        let words = format!("{}/{}", reference.registry, reference.repository);
        Self {
            registry: reference.registry.clone(),
            name: digest_of(words.as_bytes()).hex()[..32].to_owned(),
        }
    }
}

impl Layout {
    pub(super) fn open(root: PathBuf, reserve: Bytes, quota: Option<Bytes>) -> Result<Self, HostError> {
        let quota = quota.map(Quota::of).map(Arc::new);
        let layout = Self { root, reserve, quota, holds: Arc::default() };
        let failed = |error| HostError::io("prepare", layout.root.display().to_string(), error);
        // Files that a crashed daemon left here are useless.
        match fs::remove_dir_all(layout.scratch()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        for dir in ["blobs", "partials", "manifests", "rootfs", "scratch"] {
            files::make_directory(&layout.root.join(dir)).map_err(failed)?;
        }
        remove_unfinished(&layout.root.join("manifests")).map_err(failed)?;
        // A single unreadable file must not stop everything else. Content that is not collected stays.
        if let Err(error) = layout.sweep() {
            tracing::error!(%error, "blobs of images that are gone cannot be collected");
        }
        Ok(layout)
    }

    /// Keeps the content of a manifest or blob from being collected.
    pub(super) fn hold(&self, digest: &Digest) -> Hold {
        self.holds.hold(digest)
    }

    /// Checks that `bytes` more can be written within the quota while the reserve stays free.
    pub(super) fn need_room(&self, bytes: u64) -> io::Result<()> {
        let (_, free) = files::space(&self.root)?;
        if free.0 >= self.reserve.0.saturating_add(bytes) {
            return match &self.quota {
                Some(quota) => quota.admit(&self.root, bytes, || self.sweep()),
                None => Ok(()),
            };
        }
        Err(io::Error::new(
            io::ErrorKind::StorageFull,
            "there is no room for it beside what is kept free (disk_reserve)",
        ))
    }

    /// Checks that the missing layers can be written.
    pub(super) fn need_room_for(&self, manifest: &Manifest) -> io::Result<()> {
        let layers = self.resolved(manifest)?.layers;
        let missing: BTreeMap<_, _> = layers
            .iter()
            .map(|layer| (&layer.digest, layer.size.0.saturating_sub(layer.present.0)))
            .collect();
        self.need_room(missing.into_values().fold(0, u64::saturating_add))
    }

    pub(super) fn scratch(&self) -> PathBuf {
        self.root.join("scratch")
    }
    pub(super) fn blob(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs").join(digest.hex())
    }
    pub(super) fn partial(&self, digest: &Digest, source: &Source) -> PathBuf {
        self.root.join("partials").join(format!("{}.{}", digest.hex(), source.name))
    }

    pub(super) fn sync_blobs(&self) -> io::Result<()> {
        fs::File::open(self.root.join("blobs"))?.sync_all()
    }
    pub(super) fn rootfs(&self, digest: &Digest) -> PathBuf {
        self.root.join("rootfs").join(format!("{}{ROOTFS_ENDING}", digest.hex()))
    }
    fn manifest_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("manifests").join(format!("{}.json", digest.hex()))
    }

    pub(super) fn write_manifest(&self, manifest: &Manifest) -> Result<(), HostError> {
        let bytes = serde_json::to_vec(manifest).unwrap_or_default();
        files::write_whole(&self.manifest_path(&manifest.digest), &bytes, 0o600)
    }

    /// Reads a manifest. Returns `None` if it is absent or invalid; it is then resolved again.
    pub(super) fn manifest(&self, digest: &Digest) -> io::Result<Option<Manifest>> {
        read_manifest(&self.manifest_path(digest))
    }

    pub(super) fn resolved(&self, manifest: &Manifest) -> io::Result<Resolved> {
        let parts = self.parts()?;
        let layer = |blob: &Blob| {
            let whole = self.blob(&blob.digest).try_exists()?.then_some(blob.size);
            // A partial blob with the full length is not verified yet.
            let part =
                parts.get(blob.digest.hex()).map(|part| Bytes(*part.min(&blob.size.0.saturating_sub(1))));
            Ok(Layer {
                digest: blob.digest.clone(),
                size: blob.size,
                present: whole.or(part).unwrap_or_default(),
            })
        };
        let layers = manifest.layers.iter().map(layer).collect::<io::Result<_>>()?;
        Ok(Resolved { digest: manifest.digest.clone(), layers })
    }

    /// Returns the length of the longest part of each blob, by its digest in hexadecimal digits.
    fn parts(&self) -> io::Result<BTreeMap<String, u64>> {
        let mut parts = BTreeMap::new();
        for (name, path) in names(&self.root.join("partials"))? {
            let Some((hex, _)) = name.split_once('.') else { continue };
            let Some(part) = found(fs::metadata(path))? else { continue };
            let longest: &mut u64 = parts.entry(hex.to_owned()).or_default();
            *longest = part.len().max(*longest);
        }
        Ok(parts)
    }

    pub(super) fn stored(&self, digest: &Digest) -> io::Result<Option<StoredImage>> {
        let Some(rootfs) = found(fs::metadata(self.rootfs(digest)))? else { return Ok(None) };
        let Some(Manifest { config, .. }) = self.manifest(digest)? else { return Ok(None) };
        Ok(Some(StoredImage { digest: digest.clone(), size: Bytes(rootfs.len()), config }))
    }

    /// Lists the digests with a complete root file system.
    pub(super) fn list(&self) -> Result<Vec<Digest>, HostError> {
        Ok(self.digests("rootfs", ROOTFS_ENDING)?.into_iter().collect())
    }

    /// Lists the digests that have any content here that no hold of this process keeps.
    pub(super) fn known(&self) -> Result<Vec<Digest>, HostError> {
        let mut found = self.digests("rootfs", ROOTFS_ENDING)?;
        found.extend(self.digests("manifests", ".json")?);
        let held = self.holds.digests();
        Ok(found.difference(&held).cloned().collect())
    }

    fn digests(&self, dir: &str, ending: &str) -> Result<BTreeSet<Digest>, HostError> {
        let dir = self.root.join(dir);
        let names = names(&dir).map_err(|error| HostError::io("list", dir.display().to_string(), error))?;
        Ok(names
            .into_iter()
            .filter_map(|(name, _)| format!("sha256:{}", name.strip_suffix(ending)?).parse().ok())
            .collect())
    }

    /// Removes all content of a digest that is neither held nor referenced, and the blobs that no other manifest
    /// lists. `is_referenced` is called while no new hold can be taken.
    pub(super) fn remove(&self, digest: &Digest, is_referenced: impl FnOnce() -> bool) -> io::Result<()> {
        let held = self.holds.freeze();
        if held.contains(digest) || is_referenced() {
            return Ok(());
        }
        gone(&self.rootfs(digest))?;
        // The manifest is removed last: while any content of the image is left, the image stays known.
        self.sweep_while(&held, Some(digest))?;
        gone(&self.manifest_path(digest))
    }

    /// Removes complete and partial blobs that no manifest lists and no transfer is fetching.
    pub(super) fn sweep(&self) -> io::Result<()> {
        self.sweep_while(&self.holds.freeze(), None)
    }

    fn sweep_while(&self, held: &Held<'_>, leaving: Option<&Digest>) -> io::Result<()> {
        let mut kept = self.listed_blobs(leaving)?;
        kept.extend(held.iter().map(|digest| digest.hex().to_owned()));
        for dir in ["blobs", "partials"] {
            for (name, path) in names(&self.root.join(dir))? {
                let is_part = dir == "partials";
                let hex = if is_part { name.split('.').next().unwrap_or_default() } else { name.as_str() };
                if !kept.contains(hex) {
                    gone(&path)?;
                }
            }
        }
        Ok(())
    }

    /// Lists the blobs of all manifests except `leaving`, which is being removed. An unreadable manifest is an error:
    /// nothing may be collected then.
    fn listed_blobs(&self, leaving: Option<&Digest>) -> io::Result<BTreeSet<String>> {
        let mut listed = BTreeSet::new();
        for (_, path) in names(&self.root.join("manifests"))? {
            // An invalid manifest is resolved again, and its blobs are fetched again.
            let Some(manifest) = read_manifest(&path)? else { continue };
            if Some(&manifest.digest) != leaving {
                listed.extend(manifest.layers.into_iter().map(|blob| blob.digest.hex().to_owned()));
            }
        }
        Ok(listed)
    }
}

fn read_manifest(path: &Path) -> io::Result<Option<Manifest>> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    Ok(found(fs::read(path)).map_err(named)?.and_then(|text| serde_json::from_slice(&text).ok()))
}

/// Lists a directory. An incomplete listing is an error, because missing entries would be taken for removed ones.
fn names(dir: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        names.extend(entry.file_name().into_string().ok().map(|name| (name, entry.path())));
    }
    Ok(names)
}

fn found<T>(observed: io::Result<T>) -> io::Result<Option<T>> {
    match observed {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn gone(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use stead_schemas::image::ImageConfig;

    use super::*;

    #[test]
    fn nothing_is_collected_while_a_manifest_cannot_be_read_and_what_is_left_of_an_image_is_known() {
        let dir = tempfile::tempdir().expect("scratch");
        let layout = Layout::open(dir.path().to_owned(), Bytes(0), None).expect("opened");
        let digest = |text: &str| digest_of(text.as_bytes());
        let layers = vec![Blob { digest: digest("layer"), size: Bytes(9), diff_id: digest("layer") }];
        let manifest = Manifest { digest: digest("m"), layers, config: ImageConfig::default() };
        layout.write_manifest(&manifest).expect("written");
        fs::write(layout.blob(&digest("layer")), b"123456789").expect("written");
        // The manifest exists, and reading it fails.
        let unreadable = dir.path().join("manifests").join(format!("{}.json", digest("other").hex()));
        fs::create_dir(&unreadable).expect("made");
        layout.manifest(&digest("other")).expect_err("it is not absent");
        layout.sweep().expect_err("its layers are not known");
        layout.remove(&manifest.digest, || false).expect_err("nor whether they are shared");
        assert!(layout.blob(&digest("layer")).exists());
        assert!(layout.known().expect("listed").contains(&manifest.digest), "so that it is removed later");
        drop(layout);
        let layout = Layout::open(dir.path().to_owned(), Bytes(0), None).expect("the others can be used");
        assert!(layout.blob(&digest("layer")).exists() && layout.manifest(&manifest.digest).is_ok());
        fs::remove_dir(&unreadable).expect("removed");
        layout.remove(&manifest.digest, || false).expect("removed");
        assert!(layout.known().expect("listed").is_empty() && !layout.blob(&digest("layer")).exists());
    }

    #[test]
    fn what_no_manifest_lists_is_collected_at_start_and_the_rest_is_kept() {
        let dir = tempfile::tempdir().expect("scratch");
        let layout = Layout::open(dir.path().to_owned(), Bytes(0), None).expect("opened");
        let digest = |text: &str| digest_of(text.as_bytes());
        let blob = |text: &str| Blob { digest: digest(text), size: Bytes(9), diff_id: digest(text) };
        let layers = vec![blob("whole"), blob("part")];
        let manifest = Manifest { digest: digest("m"), layers, config: ImageConfig::default() };
        layout.write_manifest(&manifest).expect("written");
        let source = Source::of(&"127.0.0.1:5000/x".parse().expect("a reference"));
        let kept = [layout.blob(&digest("whole")), layout.partial(&digest("part"), &source)];
        let stray = [
            layout.blob(&digest("nobody's")),
            layout.partial(&digest("nobody's"), &source),
            // These names were used by an earlier version.
            dir.path().join("blobs").join(format!("{}.partial", digest("part").hex())),
            layout.scratch().join("upload"),
        ];
        for path in kept.iter().chain(&stray) {
            fs::write(path, b"12345").expect("written");
        }
        drop(layout);
        let layout = Layout::open(dir.path().to_owned(), Bytes(0), None).expect("opened");
        assert!(kept.iter().all(|path| path.exists()), "what a manifest lists");
        assert!(stray.iter().all(|path| !path.exists()), "what nothing lists");
        let present: Vec<u64> =
            layout.resolved(&manifest).expect("read").layers.iter().map(|layer| layer.present.0).collect();
        assert_eq!(present, [9, 5]);
        let hold = layout.hold(&digest("part"));
        layout.remove(&manifest.digest, || false).expect("removed");
        assert_eq!(kept.map(|path| path.exists()), [false, true], "a transfer still brings it");
        drop(hold);
        layout.sweep().expect("collected");
        assert!(layout.known().expect("listed").is_empty());
    }
}
