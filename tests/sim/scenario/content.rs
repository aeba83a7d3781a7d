//! The content of images in a scenario, which never changes.

use stead_schemas::names::Digest;

use super::*;

/// Returns the content of an image by its index in `IMAGES`; the last image does not exist.
pub(super) fn digest(index: usize) -> Digest {
    format!("sha256:{}", ["a", "b", "c"][index].repeat(64)).parse().expect("valid")
}

impl Play {
    /// Checks that each instance has the content of the image that its spec names below its root disk.
    pub(super) fn content_is_that_of_the_image(&self) {
        for instance in self.daemon.store.list::<Instance>() {
            let index = IMAGES.iter().position(|word| reference(word) == instance.spec.image);
            let meant = index.map(digest).expect("an image of the scenario");
            let is_right = instance.content().is_none_or(|content| *content == meant);
            assert!(is_right, "not content of its image: {instance:?}\n{}", self.log.join("\n"));
        }
    }
}
