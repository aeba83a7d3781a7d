//! The image below the root disk of an instance: the content that is pinned, and a change of it that waits.
//!
//! Guarantees: content that was pinned for a root disk stays the lower layer of that disk. Each change of the image
//! comes with another root disk and another `InstanceSpec::image_version`.

use serde::{Deserialize, Serialize};

use crate::names::{Digest, ImageRef, Platform, Uid};

/// An image that an instance starts with later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NextImage {
    pub reference: ImageRef,
    pub platform: Platform,
    /// Minimum pull of the content, as `InstanceSpec::pull`.
    pub pull: u64,
    /// The image object.
    pub image: Uid,
}

/// The content that an image meant when it was first ready for an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinnedImage {
    pub image: Uid,
    pub pull: u64,
    pub digest: Digest,
}

impl PinnedImage {
    /// True if this is content of the image object, of a pull that is new enough.
    #[must_use]
    pub fn is_of(&self, image: &Uid, pull: u64) -> bool {
        self.image == *image && self.pull == pull
    }
}
