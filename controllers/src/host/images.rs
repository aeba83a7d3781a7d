//! Images: registries, layers by digest, and read-only root file systems by manifest digest.

use std::future::Future;

use stead_schemas::image::ImageConfig;
use stead_schemas::names::{Digest, ImageRef, Platform, Uid};
use stead_schemas::quantity::Bytes;

use super::HostError;

/// A reference resolved for one platform: the manifest and what it lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// Digest of the platform's manifest: the identity of the content.
    pub digest: Digest,
    pub layers: Vec<Layer>,
}

/// A blob of a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    pub digest: Digest,
    pub size: Bytes,
    /// Bytes of it that are on disk, verified or partial.
    pub present: Bytes,
}

/// A root file system that is complete on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredImage {
    pub digest: Digest,
    pub size: Bytes,
    pub config: ImageConfig,
}

/// Registry access and the image directory. `owner` selects credentials kept in memory.
pub trait Images: Send + Sync + 'static {
    /// Digests of all complete root file systems.
    fn list(&self) -> impl Future<Output = Result<Vec<Digest>, HostError>> + Send;
    fn inspect(&self, digest: &Digest)
    -> impl Future<Output = Result<Option<StoredImage>, HostError>> + Send;
    /// What a manifest resolved earlier lists and how much of it is here; `None` when unknown.
    fn manifest(&self, digest: &Digest) -> impl Future<Output = Result<Option<Resolved>, HostError>> + Send;
    /// Asks the registry; stores manifest and configuration, verified, before it answers. Missing:
    /// no such image. Denied: credentials. Unsupported: not for this platform. Permanent: not an
    /// image. Exhausted: rate limit. Transient: registry unreachable.
    fn resolve(
        &self,
        owner: &Uid,
        reference: &ImageRef,
        platform: Platform,
    ) -> impl Future<Output = Result<Resolved, HostError>> + Send;
    /// Fetches the blobs that are missing, from where an earlier try ended, verifying each digest.
    fn fetch(
        &self,
        owner: &Uid,
        reference: &ImageRef,
        digest: &Digest,
    ) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Merges the layers and builds the root file system under a temporary name, then renames it.
    fn convert(&self, digest: &Digest) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Removes root file system, manifest, and the blobs that no other manifest lists.
    fn remove(&self, digest: &Digest) -> impl Future<Output = Result<(), HostError>> + Send;
}
