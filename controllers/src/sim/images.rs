//! A simulated registry, and an image directory whose jobs take time.

use std::time::Duration;

use stead_schemas::image::ImageConfig;
use stead_schemas::names::{Digest, ImageRef, Platform, Uid};
use stead_schemas::quantity::Bytes;
use tokio::time::Instant;

use super::{State, World};
use crate::host::{HostError, HostErrorKind, ImageJobs, Images, Job, Layer, Resolved, StoredImage};

/// An image that the registry serves under a reference.
#[derive(Debug, Clone)]
pub struct SimRegistryImage {
    pub digest: Digest,
    pub config: ImageConfig,
}

#[derive(Debug, Clone)]
pub(super) struct Manifest {
    config: ImageConfig,
    is_fetched: bool,
}

#[derive(Debug, Clone)]
pub(super) struct Running {
    is_conversion: bool,
    ends_at: Instant,
}

const FETCH: Duration = Duration::from_millis(1500);
/// Time until the registry's answer arrives.
const ANSWER: Duration = Duration::from_millis(20);
const CONVERT: Duration = Duration::from_millis(700);
const LAYER: Bytes = Bytes(1 << 20);

impl World {
    /// Puts an image into the registry.
    pub fn serve(&self, reference: &ImageRef, image: SimRegistryImage) {
        self.lock().registry.insert(reference.to_string(), image);
    }

    /// Starts a job, and announces its end.
    fn begin(&self, digest: &Digest, is_conversion: bool, owner: &Uid) {
        let duration = if is_conversion { CONVERT } else { FETCH };
        let ends_at = Instant::now() + duration;
        self.lock().jobs.entry(digest.clone()).or_insert(Running { is_conversion, ends_at });
        self.announce_in(owner, duration);
    }
}

impl State {
    /// Stores the results of jobs that have ended by now.
    fn settle(&mut self) {
        let now = Instant::now();
        let ended: Vec<Digest> = self
            .jobs
            .iter()
            .filter(|(_, job)| job.ends_at <= now)
            .map(|(digest, _)| digest.clone())
            .collect();
        for digest in ended {
            let Some(job) = self.jobs.remove(&digest) else { continue };
            let Some(manifest) = self.manifests.get_mut(&digest) else { continue };
            if job.is_conversion {
                let config = manifest.config.clone();
                self.stored.insert(digest.clone(), StoredImage { digest, size: LAYER, config });
            } else {
                manifest.is_fetched = true;
            }
        }
    }

    /// Ends all jobs, as they die with the daemon that ran them.
    pub(super) fn drop_jobs(&mut self) {
        self.settle();
        self.jobs.clear();
        self.asked.clear();
    }

    fn resolved(&self, digest: &Digest) -> Option<Resolved> {
        let manifest = self.manifests.get(digest)?;
        let present = if manifest.is_fetched { LAYER } else { Bytes(0) };
        let layer = Layer { digest: digest.clone(), size: LAYER, present };
        Some(Resolved { digest: digest.clone(), layers: vec![layer] })
    }
}

/// Makes a simulated fault transient: otherwise it would be taken for a final answer of the registry.
fn passing(mut error: HostError) -> HostError {
    if std::error::Error::source(&error).is_some() {
        error.kind = HostErrorKind::Transient;
    }
    error
}

impl State {
    /// Returns the space that complete images take.
    pub(super) fn image_space(&self) -> Bytes {
        Bytes(self.stored.values().map(|image| image.size.0).sum())
    }
}

impl Images for World {
    async fn list(&self) -> Result<Vec<Digest>, HostError> {
        self.verb("list", "images", |state| {
            state.settle();
            Ok(state.stored.keys().cloned().collect())
        })
        .await
    }

    async fn inspect(&self, digest: &Digest) -> Result<Option<StoredImage>, HostError> {
        self.verb("inspect image", digest.as_str(), |state| {
            state.settle();
            Ok(state.stored.get(digest).cloned())
        })
        .await
    }

    async fn manifest(&self, digest: &Digest) -> Result<Option<Resolved>, HostError> {
        self.verb("read manifest", digest.as_str(), |state| {
            state.settle();
            Ok(state.resolved(digest))
        })
        .await
    }

    async fn known(&self) -> Result<Vec<Digest>, HostError> {
        Images::list(self).await
    }

    async fn remove(
        &self,
        digest: &Digest,
        is_referenced: Box<dyn FnOnce() -> bool + Send>,
    ) -> Result<(), HostError> {
        self.verb("remove image", digest.as_str(), |state| {
            if is_referenced() {
                return Ok(());
            }
            state.stored.remove(digest);
            state.manifests.remove(digest);
            Ok(())
        })
        .await
    }
}

impl ImageJobs for World {
    async fn resolve(
        &self,
        owner: &Uid,
        reference: &ImageRef,
        _: Platform,
        number: u64,
    ) -> Result<Option<Resolved>, HostError> {
        let question = (reference.to_string(), number);
        if self.lock().asked.get(owner) != Some(&question) {
            self.lock().asked.insert(owner.clone(), question);
            self.announce_in(owner, ANSWER);
            return Ok(None);
        }
        self.lock().asked.remove(owner);
        self.verb("resolve", &reference.to_string(), |state| {
            let missing = || HostError::new(HostErrorKind::Missing, "resolve", reference.to_string());
            let found = match &reference.digest {
                Some(digest) => state.registry.values().find(|image| image.digest == *digest).cloned(),
                None => state.registry.get(&reference.to_string()).cloned(),
            };
            let SimRegistryImage { digest, config } = found.ok_or_else(missing)?;
            state.manifests.entry(digest.clone()).or_insert(Manifest { config, is_fetched: false });
            state.resolved(&digest).ok_or_else(missing).map(Some)
        })
        .await
        .map_err(passing)
    }

    async fn job(&self, _: &Uid, digest: &Digest) -> Option<Job> {
        let mut state = self.lock();
        state.settle();
        let job = state.jobs.get(digest)?;
        Some(if job.is_conversion { Job::Converting } else { Job::Fetching })
    }

    async fn fetch(&self, owner: &Uid, _: &ImageRef, digest: &Digest) -> Result<(), HostError> {
        self.verb("fetch", digest.as_str(), |_| Ok(())).await.map_err(passing)?;
        self.begin(digest, false, owner);
        Ok(())
    }

    async fn convert(&self, owner: &Uid, digest: &Digest) -> Result<(), HostError> {
        self.verb("convert", digest.as_str(), |state| {
            let manifest = state.manifests.get(digest);
            let is_fetched = manifest.is_some_and(|manifest| manifest.is_fetched);
            let missing = || HostError::new(HostErrorKind::Transient, "convert", digest.as_str());
            is_fetched.then_some(()).ok_or_else(missing)
        })
        .await
        .map_err(passing)?;
        self.begin(digest, true, owner);
        Ok(())
    }

    async fn forget(&self, owner: &Uid) -> Result<(), HostError> {
        self.lock().asked.remove(owner);
        Ok(())
    }

    async fn is_busy(&self, owner: &Uid) -> bool {
        self.lock().asked.contains_key(owner)
    }

    async fn owners(&self) -> Result<Vec<Uid>, HostError> {
        Ok(self.lock().asked.keys().cloned().collect())
    }
}
