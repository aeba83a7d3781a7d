//! The image reconciler: a reference is resolved, its layers fetched, its root file system built.
//!
//! Guarantees: the digest a reference means is recorded before anything of it is fetched, and moves
//! in one status write; content that any image or instance refers to is never removed; a failed
//! pull is tried again with backoff, and at once when `spec.pull` is raised.
//! Assumes: fetching and converting go on behind the port, so that a pass is short.
//! Never: keeps credentials, or a count of references.
//! Cancel/crash: blobs and root file systems are whole or absent; a job that died with the daemon
//! is begun again by the next pass.

pub mod admission;
mod observe;
mod plan;
mod status;
#[cfg(test)]
mod tests;

use jiff::Timestamp;
use stead_schemas::image::{Image, ImageStatus};
use stead_schemas::meta::Object;
use stead_schemas::names::{Digest, ImageRef, Uid};

use crate::host::{HostError, Images};
use crate::runtime::{Desired, PassEnd, Plan, Reconciler};
use crate::store::Store;

pub use observe::Observed;

/// Capabilities of the image reconciler.
#[derive(Debug)]
pub struct ImageReconciler<I> {
    pub images: I,
    pub store: Store,
}

/// One step on the image directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    Fetch { owner: Uid, reference: ImageRef, digest: Digest },
    Convert { digest: Digest },
    Remove { digest: Digest },
}

impl<I: Images> Reconciler for ImageReconciler<I> {
    type Kind = Image;
    type Observed = Observed;
    type Action = Action;

    const ACTIONS: &'static [&'static str] = &["Fetch", "Convert", "Remove"];

    async fn observe(&self, uid: &Uid, object: Option<&Object<Image>>) -> Result<Observed, HostError> {
        observe::observe(self, uid, object).await
    }

    fn plan(desired: &Desired<'_, Image>, seen: &Observed, now: Timestamp) -> Plan<Action> {
        plan::plan(desired, seen, now)
    }

    fn action_name(action: &Action) -> &'static str {
        match action {
            Action::Fetch { .. } => "Fetch",
            Action::Convert { .. } => "Convert",
            Action::Remove { .. } => "Remove",
        }
    }

    async fn act(&self, action: &Action) -> Result<(), HostError> {
        match action {
            Action::Fetch { owner, reference, digest } => self.images.fetch(owner, reference, digest).await,
            Action::Convert { digest } => self.images.convert(digest).await,
            Action::Remove { digest } => self.images.remove(digest).await,
        }
    }

    fn status(object: &Object<Image>, seen: Option<&Observed>, end: &PassEnd) -> ImageStatus {
        status::status(object, seen, end)
    }

    /// Content is keyed by digest, not by object: what nothing refers to is found by every pass of
    /// an image that goes away, so there are no orphans by uid.
    async fn owned(&self) -> Result<Vec<Uid>, HostError> {
        Ok(Vec::new())
    }
}
