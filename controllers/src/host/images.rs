//! Images: layers by digest, and read-only root file systems by manifest digest.

use std::future::Future;

use stead_schemas::image::ImageConfig;
use stead_schemas::names::Digest;
use stead_schemas::quantity::Bytes;

use super::HostError;

/// A reference resolved for one platform: the manifest and its layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// Digest of the platform's manifest, which is the identity of the content.
    pub digest: Digest,
    pub layers: Vec<Layer>,
}

/// A blob of a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    pub digest: Digest,
    pub size: Bytes,
    /// Number of bytes of the blob that are on disk, verified or partial.
    pub present: Bytes,
}

/// A root file system that is complete on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredImage {
    pub digest: Digest,
    pub size: Bytes,
    pub config: ImageConfig,
}

/// The image directory. It is filled by the work behind the port [`ImageJobs`](super::ImageJobs).
pub trait Images: Send + Sync + 'static {
    /// Returns the digests of all complete root file systems.
    fn list(&self) -> impl Future<Output = Result<Vec<Digest>, HostError>> + Send;
    /// Returns the digests of all content on disk, complete or not, except content that the adapter itself
    /// still needs.
    fn known(&self) -> impl Future<Output = Result<Vec<Digest>, HostError>> + Send;
    fn inspect(&self, digest: &Digest)
    -> impl Future<Output = Result<Option<StoredImage>, HostError>> + Send;
    /// Returns the layers of a manifest that was resolved earlier, with the number of bytes present, or
    /// `None` if the manifest is unknown.
    fn manifest(&self, digest: &Digest) -> impl Future<Output = Result<Option<Resolved>, HostError>> + Send;
    /// Removes the root file system, the manifest, and the blobs that no other manifest lists, unless the
    /// adapter needs the content or something refers to it. `is_referenced` is called while no new reference
    /// can appear.
    fn remove(
        &self,
        digest: &Digest,
        is_referenced: Box<dyn FnOnce() -> bool + Send>,
    ) -> impl Future<Output = Result<(), HostError>> + Send;
}
