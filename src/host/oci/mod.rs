//! Images behind the port `Images`: registries, the image directory, and the work that goes on.
//!
//! Guarantees: content is named by the digest it was verified to have; a blob or root file system
//! is whole or absent; layers are shared by digest; nothing of an image is unpacked on the host, and
//! no path, link or size in it is trusted.
//! Chosen by measurement: squashfs with lz4 by `sqfstar`, which takes one archive on its standard
//! input (recipes.md has the figures); `mkfs.erofs` of Debian 12 would need an unpacked tree.
//! Cancel/crash: jobs die with the daemon and are begun again; blobs continue where they stopped.

mod archive;
mod import;
mod layout;
mod merge;
#[cfg(test)]
mod merge_model;
mod registry;
mod rootfs;
mod session;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use stead_controllers::host::{HostError, HostErrorKind, Images, Job, Resolved, StoredImage};
use stead_schemas::api::PushCredentials;
use stead_schemas::names::{Digest, ImageRef, Platform, Uid};
use tokio::sync::Semaphore;

use layout::Layout;
use registry::{Registry, SharedRegistry};

/// What the image directory is made with.
#[derive(Debug, Clone)]
pub struct OciConfig {
    /// `DATA/images`.
    pub directory: PathBuf,
    /// Registries spoken to without TLS, besides loopback.
    pub plain_http_hosts: Vec<String>,
    /// Images fetched or converted at once.
    pub jobs_max: usize,
    pub platform: Platform,
}

/// The adapter; clones share their jobs.
#[derive(Clone)]
pub struct Oci {
    inner: Arc<Inner>,
}

struct Inner {
    layout: Layout,
    registry: SharedRegistry,
    places: Arc<Semaphore>,
    jobs: Mutex<Jobs>,
    changed: Box<dyn Fn() + Send + Sync>,
    platform: Platform,
}

#[derive(Default)]
struct Jobs {
    running: BTreeMap<Digest, Job>,
    /// In the order of arrival.
    queued: Vec<Digest>,
    failed: BTreeMap<Digest, HostError>,
}

impl std::fmt::Debug for Oci {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Oci").finish_non_exhaustive()
    }
}

/// Layers of one image fetched at once.
const FETCHES_MAX: usize = 4;
/// Between two announcements of progress while something is fetched.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);

impl Oci {
    /// Opens the image directory; `changed` is told when some job got on.
    ///
    /// # Errors
    /// When the directory cannot be prepared.
    pub fn open(config: OciConfig, changed: impl Fn() + Send + Sync + 'static) -> Result<Self, HostError> {
        let OciConfig { directory, plain_http_hosts, jobs_max, platform } = config;
        let inner = Inner {
            layout: Layout::open(directory)?,
            registry: Arc::new(Registry::new(plain_http_hosts)),
            places: Arc::new(Semaphore::new(jobs_max)),
            jobs: Mutex::default(),
            changed: Box::new(changed),
            platform,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Credentials of a request; they stay in memory and serve pulls of this image only.
    pub fn keep_credentials(&self, owner: &Uid, credentials: PushCredentials) {
        self.inner.registry.keep_credentials(owner, credentials);
    }

    /// Where a digest's root file system is, or will be.
    #[must_use]
    pub fn rootfs(&self, digest: &Digest) -> PathBuf {
        self.inner.layout.rootfs(digest)
    }

    /// A directory for archives on their way in; emptied at start.
    #[must_use]
    pub fn scratch(&self) -> PathBuf {
        self.inner.layout.scratch()
    }

    /// Takes an archive in a file into the directory and builds its root file system.
    ///
    /// # Errors
    /// Permanent, with the reason, for what is no image or a hostile one.
    pub async fn import(&self, archive: PathBuf) -> Result<Digest, HostError> {
        let inner = self.inner.clone();
        blocking("import", move || {
            let manifest = import::import(&inner.layout, &archive, inner.platform)?;
            rootfs::build(&inner.layout, &manifest)?;
            Ok(manifest.digest)
        })
        .await
    }

    fn lock(&self) -> MutexGuard<'_, Jobs> {
        self.inner.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a job unless one goes on; answers the last one's failure, once.
    fn begin<F>(&self, digest: &Digest, kind: Job, work: impl FnOnce(Self) -> F) -> Result<(), HostError>
    where
        F: Future<Output = Result<(), HostError>> + Send + 'static,
    {
        {
            let mut jobs = self.lock();
            if let Some(failure) = jobs.failed.remove(digest) {
                return Err(failure);
            }
            if jobs.running.contains_key(digest) || jobs.queued.contains(digest) {
                return Ok(());
            }
            jobs.queued.push(digest.clone());
        }
        let (oci, digest, work) = (self.clone(), digest.clone(), work(self.clone()));
        tokio::spawn(async move {
            let place = oci.inner.places.clone().acquire_owned().await;
            {
                let mut jobs = oci.lock();
                jobs.queued.retain(|queued| *queued != digest);
                jobs.running.insert(digest.clone(), kind);
            }
            (oci.inner.changed)();
            let result = oci.with_progress(work).await;
            {
                let mut jobs = oci.lock();
                jobs.running.remove(&digest);
                if let Err(error) = result {
                    jobs.failed.insert(digest, error);
                }
            }
            drop(place);
            (oci.inner.changed)();
        });
        Ok(())
    }

    /// Announces progress while the work goes on.
    async fn with_progress<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        loop {
            match tokio::time::timeout(PROGRESS_INTERVAL, &mut work).await {
                Ok(done) => return done,
                Err(_) => (self.inner.changed)(),
            }
        }
    }

    fn missing(operation: &'static str, digest: &Digest) -> HostError {
        HostError::new(HostErrorKind::Missing, operation, digest.as_str())
    }
}

impl Images for Oci {
    async fn list(&self) -> Result<Vec<Digest>, HostError> {
        self.inner.layout.list()
    }

    async fn inspect(&self, digest: &Digest) -> Result<Option<StoredImage>, HostError> {
        Ok(self.inner.layout.stored(digest))
    }

    async fn manifest(&self, digest: &Digest) -> Result<Option<Resolved>, HostError> {
        let layout = &self.inner.layout;
        Ok(layout.manifest(digest).map(|manifest| layout.resolved(&manifest)))
    }

    async fn resolve(
        &self,
        owner: &Uid,
        reference: &ImageRef,
        platform: Platform,
    ) -> Result<Resolved, HostError> {
        let manifest = self.inner.registry.resolve(owner, reference, platform).await?;
        self.inner.layout.write_manifest(&manifest)?;
        Ok(self.inner.layout.resolved(&manifest))
    }

    async fn job(&self, digest: &Digest) -> Option<Job> {
        let jobs = self.lock();
        let queued = || {
            let position = jobs.queued.iter().position(|queued| queued == digest)?;
            Some(Job::Queued { position: u32::try_from(position + 1).unwrap_or(u32::MAX) })
        };
        jobs.running.get(digest).cloned().or_else(queued)
    }

    async fn fetch(&self, owner: &Uid, reference: &ImageRef, digest: &Digest) -> Result<(), HostError> {
        let manifest = self.inner.layout.manifest(digest).ok_or_else(|| Self::missing("fetch", digest))?;
        let (owner, reference) = (owner.clone(), reference.clone());
        self.begin(digest, Job::Fetching, |oci| async move {
            let fetches = manifest.layers.into_iter().map(|blob| {
                let (oci, owner, reference) = (oci.clone(), owner.clone(), reference.clone());
                async move { oci.inner.registry.fetch(&owner, &reference, &blob, &oci.inner.layout).await }
            });
            // The first failure ends the job; what the others brought is kept in their partials.
            let mut fetches = futures::stream::iter(fetches).buffer_unordered(FETCHES_MAX);
            while let Some(result) = fetches.next().await {
                result?;
            }
            Ok(())
        })
    }

    async fn convert(&self, digest: &Digest) -> Result<(), HostError> {
        let manifest = self.inner.layout.manifest(digest).ok_or_else(|| Self::missing("convert", digest))?;
        self.begin(digest, Job::Converting, |oci| async move {
            blocking("convert", move || rootfs::build(&oci.inner.layout, &manifest)).await
        })
    }

    async fn remove(&self, digest: &Digest) -> Result<(), HostError> {
        self.inner
            .layout
            .remove(digest)
            .map_err(|error| HostError::io("remove the image", digest.as_str(), error))
    }
}

async fn blocking<T: Send + 'static>(
    operation: &'static str,
    work: impl FnOnce() -> Result<T, HostError> + Send + 'static,
) -> Result<T, HostError> {
    let ended = tokio::task::spawn_blocking(work).await;
    ended.unwrap_or_else(|error| {
        Err(HostError::new(HostErrorKind::Transient, operation, "an image").because(error))
    })
}

/// Why an image's content was refused, or the disk failed under it.
#[derive(Debug)]
struct Refused {
    kind: HostErrorKind,
    message: String,
}

impl Refused {
    /// Can never succeed with this content.
    fn new(message: impl Into<String>) -> Self {
        Self { kind: HostErrorKind::Permanent, message: message.into() }
    }

    fn unsupported(message: impl Into<String>) -> Self {
        Self { kind: HostErrorKind::Unsupported, message: message.into() }
    }

    /// Broken content shows as these kinds too: decoders have no others.
    fn of_io(error: io::Error) -> Self {
        let kind = match error.kind() {
            io::ErrorKind::InvalidData
            | io::ErrorKind::UnexpectedEof
            | io::ErrorKind::InvalidInput
            | io::ErrorKind::Other => HostErrorKind::Permanent,
            _ => HostError::kind_of_io(&error),
        };
        Self { kind, message: error.to_string() }
    }

    fn into_host(self, operation: &'static str, subject: impl Into<String>) -> HostError {
        HostError::new(self.kind, operation, subject).because(self.message)
    }
}
