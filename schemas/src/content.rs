//! The content below the root disk of an instance, and the content that it waits for.

use crate::instance::{Instance, InstanceSpec};
use crate::meta::Object;
use crate::names::Digest;

impl Object<Instance> {
    /// Returns the content below the root disk, or `None` until it is known.
    #[must_use]
    pub fn content(&self) -> Option<&Digest> {
        let InstanceSpec { image_version, origin, pull, allocated, .. } = &self.spec;
        let pinned =
            self.status.image_digest.as_ref().filter(|_| self.status.image_version == *image_version);
        let origin = origin.as_ref().and_then(|origin| origin.image_digest.as_ref());
        let next = self.status.next_image.as_ref().filter(|next| next.is_of(&allocated.image, *pull));
        pinned.or(origin).or(next.map(|next| &next.digest))
    }

    /// Returns the content of the image that waits for the next start, once it is known.
    #[must_use]
    pub fn next_content(&self) -> Option<&Digest> {
        let next = self.spec.pending.image.as_ref()?;
        let pinned = self.status.next_image.as_ref().filter(|pinned| pinned.is_of(&next.image, next.pull));
        pinned.map(|pinned| &pinned.digest)
    }

    /// True if the program that runs should be started again now, for the changes that wait.
    #[must_use]
    pub fn is_restart_due(&self) -> bool {
        let pending = &self.spec.pending;
        pending.restarts && (pending.image.is_none() || self.next_content().is_some())
    }
}
