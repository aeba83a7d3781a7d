//! The image reconciler: it resolves a reference, fetches the layers, and builds the root file system.
//!
//! Guarantees: the digest of a reference is recorded before any of its content is fetched, and changes in one
//! status write. Content that any image or instance refers to is never removed. A failed pull is retried with
//! backoff, and at once if `spec.pull` is raised. Content that the registry does not have, or refuses, is
//! requested again after an hour, or when the image is posted again.
//! Assumes: requests, fetches and conversions run behind the port, so that a pass is short.
//! Never: keeps credentials, or a count of references.
//! Cancel/crash: blobs and root file systems are complete or absent. A job that died with the daemon is
//! started again by the next pass.
//!
//! ```text
//! reference --resolve--> digest --Fetch--> layers --Convert--> root file system (Ready)
//!                  deleted, or unused content: --Remove--> nothing      failed: waits, and is tried again
//! ```

pub mod admission;
mod observe;
mod plan;
mod status;
#[cfg(test)]
mod tests;

use std::time::Duration;

use stead_schemas::image::{Image, ImageStatus};
use stead_schemas::meta::{Kind, Object};
use stead_schemas::names::{Digest, ImageRef, Uid};
use stead_schemas::references::{Ref, Role};

use crate::host::{Host, HostError, HostErrorKind, ImageJobs, Images};
use crate::runtime::{Desired, Moment, PassEnd, Plan, Reconciler};
use crate::store::{Event, Store};

pub use observe::Observed;

/// Returns the images that resolve to this content and are not being deleted.
#[must_use]
pub fn meaning(store: &Store, digest: &Digest) -> Vec<Uid> {
    store.uids_referring::<Image>(&Ref::to_content(digest))
}

/// Returns the id of the passes that collect content which nothing refers to.
pub(crate) fn collector() -> Option<Uid> {
    COLLECTOR.parse().ok()
}

/// Returns the collecting pass if a change left content behind that no object refers to any more. An image
/// that is being deleted removes its content itself.
pub(crate) fn freed(store: &Store, event: &Event) -> Vec<Uid> {
    let is_left = |reference: &Ref| reference.role == Role::Content && !store.is_referred_to(reference);
    let is_removed_by_its_image = event.kind == Image::NAME
        && store.get::<Image>(&event.uid).is_none_or(|image| image.meta.is_deleting());
    if is_removed_by_its_image || !event.dropped.iter().any(is_left) {
        return Vec::new();
    }
    collector().into_iter().collect()
}

/// Time before the registry is asked again for an image that it does not have, that it refuses, or that is
/// invalid.
const REST: Duration = Duration::from_secs(3600);
/// The collector's id. It has the form of an id, but no object has it.
const COLLECTOR: &str = "collector000000000000000";

/// Capabilities of the image reconciler.
#[derive(Debug)]
pub struct ImageReconciler<H> {
    pub host: H,
    pub store: Store,
}

/// A single step on the image directory.
#[derive(Debug, Clone, PartialEq, Eq, strum::IntoStaticStr, strum::VariantNames)]
pub enum Action {
    Fetch {
        owner: Uid,
        reference: ImageRef,
        digest: Digest,
    },
    Convert {
        owner: Uid,
        digest: Digest,
    },
    /// Ends the work for an image that is deleted, and drops the data that is kept in memory for it.
    Forget {
        owner: Uid,
    },
    Remove {
        digest: Digest,
    },
}

impl<H: Host> Reconciler for ImageReconciler<H> {
    type Kind = Image;
    type Observed = Observed;
    type Action = Action;

    /// False, because only content on disk is success: work in the background may still fail.
    const WAITS_ARE_PROGRESS: bool = false;
    async fn observe(&self, uid: &Uid, object: Option<&Object<Image>>) -> Result<Observed, HostError> {
        observe::observe(self, uid, object).await
    }

    fn plan(desired: &Desired<'_, Image>, seen: &Observed, _: Moment) -> Plan<Action> {
        plan::plan(desired, seen)
    }

    async fn act(&self, action: &Action) -> Result<(), HostError> {
        match action {
            Action::Fetch { owner, reference, digest } => {
                self.host.image_jobs().fetch(owner, reference, digest).await
            }
            Action::Convert { owner, digest } => self.host.image_jobs().convert(owner, digest).await,
            Action::Forget { owner } => self.host.image_jobs().forget(owner).await.map_err(observe::local),
            Action::Remove { digest } => {
                let (store, content) = (self.store.clone(), digest.clone());
                // The references are checked again: an import or a tag may have come since the observation.
                let is_referenced = move || store.is_referred_to(&Ref::to_content(&content));
                self.host.images().remove(digest, Box::new(is_referenced)).await.map_err(observe::local)
            }
        }
    }

    fn status(object: &Object<Image>, seen: Option<&Observed>, end: &PassEnd) -> ImageStatus {
        status::status(object, seen, end)
    }

    /// Delays the retry after an answer of a registry, because the registry would give the same answer.
    fn retry_after(kind: HostErrorKind) -> Option<Duration> {
        match kind {
            HostErrorKind::Missing
            | HostErrorKind::Denied
            | HostErrorKind::Permanent
            | HostErrorKind::Unsupported => Some(REST),
            _ => None,
        }
    }

    /// Returns the owners of running work. If there is content that nothing refers to, an id that belongs to
    /// no image is added: its pass collects and does nothing else.
    async fn owned(&self) -> Result<Vec<Uid>, HostError> {
        let mut owners = self.host.image_jobs().owners().await?;
        if !observe::unreferenced(self).await?.is_empty() {
            owners.extend(collector());
        }
        Ok(owners)
    }
}
