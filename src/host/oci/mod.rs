//! Images behind the ports `Images` and `ImageJobs`: registries, the image directory, and background jobs.
//!
//! Guarantees: content is named by its verified digest. A blob or root file system is whole or absent. Layers are
//! shared by digest. Nothing of an image is unpacked on the host, and no path, link or size in it is trusted.
//! Chosen by measurement: squashfs with lz4 by `sqfstar`, which reads one archive on its standard input (recipes.md
//! has the figures); `mkfs.erofs` of Debian 12 would need an unpacked tree.
//! Cancel/crash: jobs end with the daemon, or with the last image that needs them, and are begun again. Blobs
//! continue at the point where they stopped.

pub(super) mod archive;
mod asked;
mod clients;
mod emit;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod guard;
mod holds;
mod import;
#[cfg(test)]
mod import_cases;
pub(super) mod jobs;
mod layout;
mod manifest;
mod merge;
#[cfg(test)]
mod merge_memory;
#[cfg(test)]
mod merge_model;
#[cfg(test)]
mod odd_archives;
mod pax;
mod quota;
pub(super) mod receive;
mod registry;
mod rootfs;
mod session;
mod shares;
#[cfg(test)]
mod tests;
mod transfer;
mod transport;
pub(super) mod unpack;
mod uploaded;

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use stead_controllers::host::{HostError, HostErrorKind, ImageJobs, Images, Job, Resolved, StoredImage};
use stead_schemas::api::PushCredentials;
use stead_schemas::names::{Digest, ImageRef, Platform, Uid};
use stead_schemas::quantity::Bytes;

use asked::{Question, Questions};
use clients::Clients;
pub use guard::Allowed;
pub use holds::Hold;
use jobs::{Jobs, Key};
use layout::{Layout, Source};
use manifest::Manifest;
pub use manifest::Target;
pub use quota::space;
use registry::Registry;

/// The configuration of the image directory.
#[derive(Debug, Clone)]
pub struct OciConfig {
    /// Path of the image directory, `DATA/images`.
    pub directory: PathBuf,
    /// Registries used without TLS, besides loopback.
    pub plain_http_hosts: Vec<String>,
    /// Hosts and networks that may be connected to, besides public addresses.
    pub registry_allow: Vec<Allowed>,
    /// Limit on simultaneous conversions, and on simultaneous fetches from one registry.
    pub jobs_max: usize,
    pub target: Target,
    /// Free space that must remain on the directory's file system.
    pub disk_reserve: Bytes,
    /// Limit on the size of the directory.
    pub quota: Option<Bytes>,
}

/// The adapter. Clones share their jobs.
#[derive(Clone)]
pub struct Oci {
    layout: Layout,
    registry: Arc<Registry>,
    jobs: Jobs,
    questions: Questions,
    clients: Clients,
    target: Target,
    uploads: receive::Uploads,
}

impl std::fmt::Debug for Oci {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Oci").finish_non_exhaustive()
    }
}

impl Oci {
    /// Opens the image directory. `changed` is called with an image object whose work has made progress.
    ///
    /// # Errors
    /// Returns an error when the directory cannot be prepared, or the host's certificates cannot be read.
    pub fn open(
        config: OciConfig,
        changed: impl Fn(&Uid) + Send + Sync + 'static,
    ) -> Result<Self, HostError> {
        let OciConfig { directory, plain_http_hosts, registry_allow, jobs_max, target, disk_reserve, quota } =
            config;
        let clients = Clients::default();
        Ok(Self {
            layout: Layout::open(directory, disk_reserve, quota)?,
            registry: Arc::new(Registry::new(plain_http_hosts, registry_allow)?),
            jobs: Jobs::new(jobs_max, clients.clone(), Box::new(changed)),
            questions: Questions::new(clients.clone()),
            clients,
            target,
            uploads: receive::Uploads::new(),
        })
    }

    /// Records the client that first asked for an image: fetches and builds for the image count as this client's.
    /// After a restart of the daemon no client is known, and all unfinished work counts as one client's.
    pub fn asked_by(&self, owner: &Uid, client: &Arc<str>) {
        self.clients.asked_by(owner, client);
    }

    /// Keeps the credentials of a request. They stay in memory and serve pulls of this image only.
    pub fn keep_credentials(&self, owner: &Uid, credentials: PushCredentials) {
        self.registry.keep_credentials(owner, credentials);
        // Answers to queries without the credentials do not count.
        self.questions.forget(owner);
        self.jobs.announce(owner);
    }

    /// Returns the path of a digest's root file system, even if it does not exist yet.
    #[must_use]
    pub fn rootfs(&self, digest: &Digest) -> PathBuf {
        self.layout.rootfs(digest)
    }

    /// Returns the digest of a root file system from its file name.
    #[must_use]
    pub fn digest_of_rootfs(name: &str) -> Option<Digest> {
        format!("sha256:{}", name.strip_suffix(layout::ROOTFS_ENDING)?).parse().ok()
    }

    async fn known_manifest(&self, operation: &'static str, digest: &Digest) -> Result<Manifest, HostError> {
        let (layout, digest) = (self.layout.clone(), digest.clone());
        // The next pass asks for it again, so the error is transient.
        let gone = HostError::new(HostErrorKind::Transient, operation, digest.as_str());
        let failed = move |error| HostError::io(operation, "an image's manifest", error);
        blocking(operation, move || layout.manifest(&digest).map_err(failed))
            .await?
            .ok_or_else(|| gone.because("its manifest is not here any more"))
    }
}

impl Images for Oci {
    async fn list(&self) -> Result<Vec<Digest>, HostError> {
        let layout = self.layout.clone();
        blocking("list", move || layout.list()).await
    }

    async fn known(&self) -> Result<Vec<Digest>, HostError> {
        let layout = self.layout.clone();
        blocking("list", move || layout.known()).await
    }

    async fn inspect(&self, digest: &Digest) -> Result<Option<StoredImage>, HostError> {
        let (layout, digest) = (self.layout.clone(), digest.clone());
        blocking("inspect", move || {
            layout.stored(&digest).map_err(|error| HostError::io("inspect the image", digest.as_str(), error))
        })
        .await
    }

    async fn manifest(&self, digest: &Digest) -> Result<Option<Resolved>, HostError> {
        let (layout, digest) = (self.layout.clone(), digest.clone());
        blocking("inspect", move || {
            let found = layout
                .manifest(&digest)
                .and_then(|found| found.map(|manifest| layout.resolved(&manifest)).transpose());
            found.map_err(|error| HostError::io("inspect the image", digest.as_str(), error))
        })
        .await
    }

    async fn remove(
        &self,
        digest: &Digest,
        is_referenced: Box<dyn FnOnce() -> bool + Send>,
    ) -> Result<(), HostError> {
        let (layout, digest) = (self.layout.clone(), digest.clone());
        blocking("remove the image", move || {
            let removed = layout.remove(&digest, is_referenced);
            removed.map_err(|error| HostError::io("remove the image", digest.as_str(), error))
        })
        .await
    }
}

impl ImageJobs for Oci {
    async fn resolve(
        &self,
        owner: &Uid,
        reference: &ImageRef,
        platform: Platform,
        number: u64,
    ) -> Result<Option<Resolved>, HostError> {
        let question = Question { reference: reference.clone(), platform, number };
        let work = || {
            let (oci, owner, reference) = (self.clone(), owner.clone(), reference.clone());
            async move {
                let target = Target { platform, ..oci.target };
                let manifest = oci.registry.resolve(&owner, &reference, target).await?;
                let hold = oci.write_manifest(&manifest).await?;
                Ok((manifest, hold))
            }
        };
        let (jobs, of) = (self.jobs.clone(), owner.clone());
        let answer = self.questions.ask(owner, &question, work, move || jobs.announce(&of))?;
        let Some(manifest) = answer else { return Ok(None) };
        let layout = self.layout.clone();
        blocking("inspect", move || {
            let resolved = layout.resolved(&manifest);
            let failed = |error| HostError::io("inspect the image", manifest.digest.as_str(), error);
            resolved.map(Some).map_err(failed)
        })
        .await
    }

    async fn job(&self, owner: &Uid, digest: &Digest) -> Option<Job> {
        self.jobs.of(owner, digest)
    }

    async fn fetch(&self, owner: &Uid, reference: &ImageRef, digest: &Digest) -> Result<(), HostError> {
        self.questions.recorded(owner);
        let manifest = self.known_manifest("fetch", digest).await?;
        let key = Key { source: Some(Source::of(reference)), digest: digest.clone() };
        self.jobs.begin(owner, &key, |_| {
            let (oci, owner, reference) = (self.clone(), owner.clone(), reference.clone());
            async move { oci.registry.fetch(&owner, &reference, &manifest, &oci.layout).await }
        })
    }

    async fn convert(&self, owner: &Uid, digest: &Digest) -> Result<(), HostError> {
        self.questions.recorded(owner);
        let manifest = self.known_manifest("convert", digest).await?;
        let key = Key { source: None, digest: digest.clone() };
        self.jobs.begin(owner, &key, |stop| {
            let layout = self.layout.clone();
            async move { blocking("convert", move || rootfs::build(&layout, &manifest, &stop)).await }
        })
    }

    async fn forget(&self, owner: &Uid) -> Result<(), HostError> {
        self.jobs.forget(owner);
        self.clients.forget(owner);
        self.questions.forget(owner);
        self.registry.forget(owner);
        Ok(())
    }

    async fn owners(&self) -> Result<Vec<Uid>, HostError> {
        let layout = self.layout.clone();
        // The sweep also finds unowned files on the disk.
        blocking("collect", move || layout.sweep().map_err(|error| HostError::io("collect", "blobs", error)))
            .await?;
        let owners: BTreeSet<Uid> = self.jobs.owners().union(&self.questions.owners()).cloned().collect();
        Ok(owners.into_iter().collect())
    }

    async fn is_busy(&self, owner: &Uid) -> bool {
        self.jobs.owners().contains(owner) || self.questions.owners().contains(owner)
    }
}

impl Oci {
    async fn write_manifest(&self, manifest: &Manifest) -> Result<Hold, HostError> {
        let (layout, manifest) = (self.layout.clone(), manifest.clone());
        blocking("store the manifest", move || {
            let hold = layout.hold(&manifest.digest);
            layout
                .need_room_for(&manifest)
                .map_err(|error| HostError::io("pull", manifest.digest.as_str(), error))?;
            layout.write_manifest(&manifest)?;
            Ok(hold)
        })
        .await
    }
}

pub(super) async fn blocking<T: Send + 'static>(
    operation: &'static str,
    work: impl FnOnce() -> Result<T, HostError> + Send + 'static,
) -> Result<T, HostError> {
    let ended = tokio::task::spawn_blocking(work).await;
    ended.unwrap_or_else(|error| {
        Err(HostError::new(HostErrorKind::Transient, operation, "an image").because(error))
    })
}

/// A refusal of an image's content, or a disk error during the work on it.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) kind: HostErrorKind,
    pub(super) message: String,
}

impl Refused {
    /// Creates a permanent refusal: this content can never succeed.
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self { kind: HostErrorKind::Permanent, message: message.into() }
    }

    fn unsupported(message: impl Into<String>) -> Self {
        Self { kind: HostErrorKind::Unsupported, message: message.into() }
    }

    /// Converts an I/O error. Invalid content has these kinds too, because decoders have no others.
    pub(super) fn of_io(error: io::Error) -> Self {
        let kind = match error.kind() {
            // Files of ours that were removed by others are fetched again.
            io::ErrorKind::NotFound => HostErrorKind::Transient,
            io::ErrorKind::InvalidData
            | io::ErrorKind::UnexpectedEof
            | io::ErrorKind::InvalidInput
            | io::ErrorKind::Other => HostErrorKind::Permanent,
            _ => HostError::kind_of_io(&error),
        };
        Self { kind, message: error.to_string() }
    }

    pub(super) fn into_host(self, operation: &'static str, subject: impl Into<String>) -> HostError {
        HostError::new(self.kind, operation, subject).because(self.message)
    }
}
