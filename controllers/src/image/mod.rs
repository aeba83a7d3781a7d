//! The image reconciler: a reference is resolved, its layers fetched, its root file system built.
//!
//! Guarantees: the digest a reference means is recorded before anything of it is fetched, and moves
//! in one status write; content that any image or instance refers to is never removed; a failed
//! pull is tried again with backoff, and at once when `spec.pull` is raised. What the registry does not
//! have, or does not give, is asked for again after an hour, or when it is posted again.
//! Assumes: asking, fetching and converting go on behind the port, so that a pass is short.
//! Never: keeps credentials, or a count of references.
//! Cancel/crash: blobs and root file systems are whole or absent; a job that died with the daemon
//! is begun again by the next pass.

pub mod admission;
mod observe;
mod plan;
mod status;
#[cfg(test)]
mod tests;

use std::time::Duration;

use stead_schemas::image::{Image, ImageStatus};
use stead_schemas::meta::Object;
use stead_schemas::names::{Digest, ImageRef, Uid};
use stead_schemas::references::Ref;

use crate::host::{Host, HostError, HostErrorKind, Images};
use crate::runtime::{Desired, Moment, PassEnd, Plan, Reconciler};
use crate::store::Store;

pub use observe::Observed;

/// Images that mean this content and are not being deleted.
#[must_use]
pub fn meaning(store: &Store, digest: &Digest) -> Vec<Uid> {
    store.uids_referring::<Image>(&Ref::to_content(digest))
}

/// The id of the passes that collect content which nothing points at.
pub(crate) fn collector() -> Option<Uid> {
    COLLECTOR.parse().ok()
}

/// Rest of an image that the registry does not have or give, or that is none.
const REST: Duration = Duration::from_secs(3600);
/// In the form of an id; no object has it.
const COLLECTOR: &str = "collector000000000000000";

/// Capabilities of the image reconciler.
#[derive(Debug)]
pub struct ImageReconciler<H> {
    pub host: H,
    pub store: Store,
}

/// One step on the image directory.
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
    /// Ends the work for an image that is deleted, and drops what is kept in memory for it.
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

    /// Only content that is here is success: while something goes on in the background it may yet fail.
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
                self.host.images().fetch(owner, reference, digest).await
            }
            Action::Convert { owner, digest } => self.host.images().convert(owner, digest).await,
            Action::Forget { owner } => self.host.images().forget(owner).await.map_err(observe::local),
            Action::Remove { digest } => {
                let (store, content) = (self.store.clone(), digest.clone());
                // Asked again: an import or a tag may have come since it was observed.
                let is_referenced = move || store.is_referred_to(&Ref::to_content(&content));
                self.host.images().remove(digest, Box::new(is_referenced)).await.map_err(observe::local)
            }
        }
    }

    fn status(object: &Object<Image>, seen: Option<&Observed>, end: &PassEnd) -> ImageStatus {
        status::status(object, seen, end)
    }

    /// An answer of a registry rests: asked again and again, it says the same.
    fn retry_after(kind: HostErrorKind) -> Option<Duration> {
        match kind {
            HostErrorKind::Missing
            | HostErrorKind::Denied
            | HostErrorKind::Permanent
            | HostErrorKind::Unsupported => Some(REST),
            _ => None,
        }
    }

    /// Owners of what goes on, and, when there is content that nothing refers to, an id that is no image's:
    /// a pass of it collects and does nothing else.
    async fn owned(&self) -> Result<Vec<Uid>, HostError> {
        let mut owners = self.host.images().owners().await?;
        if !observe::unreferenced(self).await?.is_empty() {
            owners.extend(collector());
        }
        Ok(owners)
    }
}
