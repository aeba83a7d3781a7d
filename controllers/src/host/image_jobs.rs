//! Image jobs: questions to registries, downloads and conversions, which continue behind the port.

use std::future::Future;

use stead_schemas::names::{Digest, ImageRef, Platform, Uid};

use super::HostError;
use super::images::Resolved;

/// Work on a digest that continues behind the port, so that a pass stays short and progress is visible.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Job {
    /// The job waits for one of the configured permits. The position counts from 1.
    Queued {
        position: u32,
    },
    Fetching,
    Converting,
}

/// Work that fills the image directory. `owner` is the image object on whose behalf a call is made. It
/// selects the credentials kept in memory, and work that has no owner any more is ended.
///
/// All progress for an owner is announced on the adapter's change channel with that owner, about twice a
/// second, so that the reconciler observes it again.
pub trait ImageJobs: Send + Sync + 'static {
    /// Returns the owners for which [`ImageJobs::is_busy`] is true. Removes parts of content that belong to no
    /// image as a side effect.
    fn owners(&self) -> impl Future<Output = Result<Vec<Uid>, HostError>> + Send;
    /// Returns true if `forget` would end or free something that costs other owners anything.
    fn is_busy(&self, owner: &Uid) -> impl Future<Output = bool> + Send;
    /// Returns the job for this owner's content, while there is one.
    fn job(&self, owner: &Uid, digest: &Digest) -> impl Future<Output = Option<Job>> + Send;
    /// Asks the registry in the background. Returns `None` while the request runs, and then the result once,
    /// after its manifest and configuration are stored and verified. A call with another `number` asks again.
    ///
    /// Errors: Missing if there is no such image; Denied for credentials; Unsupported if the image is not
    /// built for this platform; Permanent if the reference is not an image; Exhausted for a rate limit or a
    /// lack of space; Transient if the registry is unreachable.
    fn resolve(
        &self,
        owner: &Uid,
        reference: &ImageRef,
        platform: Platform,
        number: u64,
    ) -> impl Future<Output = Result<Option<Resolved>, HostError>> + Send;
    /// Starts to fetch the missing blobs and returns at once. The fetch continues where an earlier attempt
    /// ended and verifies each digest. Returns `Ok` while a job for the digest from this source runs. The
    /// failure of the owner's last job is returned once, by the next call.
    fn fetch(
        &self,
        owner: &Uid,
        reference: &ImageRef,
        digest: &Digest,
    ) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Starts to merge the layers and to build the root file system under a temporary name, which is then
    /// renamed. Returns as `fetch` does.
    fn convert(&self, owner: &Uid, digest: &Digest) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Ends the work that runs for this owner alone, and forgets its credentials and results.
    fn forget(&self, owner: &Uid) -> impl Future<Output = Result<(), HostError>> + Send;
}
