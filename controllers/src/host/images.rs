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

/// Work on a digest that goes on behind the port, so that a pass stays short and progress is seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Job {
    /// Waits for one of the configured places; position from 1.
    Queued {
        position: u32,
    },
    Fetching,
    Converting,
}

/// Registry access and the image directory. `owner` is the image object that something is done for: it
/// selects credentials kept in memory, and what nobody owns any more is ended.
///
/// Whatever gets on for an owner is announced on the adapter's change channel with that owner, so that
/// the reconciler looks at it again (progress about twice a second).
pub trait Images: Send + Sync + 'static {
    /// Digests of all complete root file systems.
    fn list(&self) -> impl Future<Output = Result<Vec<Digest>, HostError>> + Send;
    /// Digests of which anything is here, complete or not, unless the adapter itself still needs it.
    fn known(&self) -> impl Future<Output = Result<Vec<Digest>, HostError>> + Send;
    fn inspect(&self, digest: &Digest)
    -> impl Future<Output = Result<Option<StoredImage>, HostError>> + Send;
    /// What a manifest resolved earlier lists and how much of it is here; `None` when unknown.
    fn manifest(&self, digest: &Digest) -> impl Future<Output = Result<Option<Resolved>, HostError>> + Send;
    /// Asks the registry in the background; `None` while it is asked, and then the answer once, its
    /// manifest and configuration stored and verified. A call with another `number` asks anew. Missing:
    /// no such image. Denied: credentials. Unsupported: not for this platform. Permanent: not an image.
    /// Exhausted: rate limit, or no room. Transient: registry unreachable.
    fn resolve(
        &self,
        owner: &Uid,
        reference: &ImageRef,
        platform: Platform,
        number: u64,
    ) -> impl Future<Output = Result<Option<Resolved>, HostError>> + Send;
    /// The job for this owner's content, while there is one.
    fn job(&self, owner: &Uid, digest: &Digest) -> impl Future<Output = Option<Job>> + Send;
    /// Begins to fetch the blobs that are missing, from where an earlier try ended, verifying each
    /// digest, and answers at once. While a job for the digest from this source goes on, `Ok`. The failure
    /// of the owner's last job is what the next call answers, once.
    fn fetch(
        &self,
        owner: &Uid,
        reference: &ImageRef,
        digest: &Digest,
    ) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Begins to merge the layers and to build the root file system under a temporary name, which
    /// is then renamed. Answers as `fetch` does.
    fn convert(&self, owner: &Uid, digest: &Digest) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Ends what goes on for this owner alone, and forgets its credentials and answers.
    fn forget(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Whether there is something to forget that costs others anything.
    fn is_busy(&self, owner: &Uid) -> impl Future<Output = bool> + Send;
    /// Owners for which [`Images::is_busy`]; parts of content that belong to nothing are removed by the way.
    fn owners(&self) -> impl Future<Output = Result<Vec<Uid>, HostError>> + Send;
    /// Removes root file system, manifest, and the blobs that no other manifest lists; unless the adapter
    /// needs the content, or it is referred to: `is_referenced` is asked while nothing can appear.
    fn remove(
        &self,
        digest: &Digest,
        is_referenced: Box<dyn FnOnce() -> bool + Send>,
    ) -> impl Future<Output = Result<(), HostError>> + Send;
}
