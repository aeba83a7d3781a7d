//! Holds on content that must not be collected, although no stored object refers to it yet.
//!
//! A hold keeps content from the moment it appears until the commit that makes an object refer to it. Removal checks
//! for holds and for references in the store under the same lock. So there is no moment at which neither is seen, if
//! the hold is released after the commit.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stead_schemas::names::Digest;

#[derive(Debug, Default)]
pub(super) struct Holds {
    counts: Mutex<BTreeMap<Digest, usize>>,
    /// Lock held during a removal, which takes as long as the disk does.
    removal: Mutex<()>,
}

/// The held content, while no new hold can be taken.
pub(super) struct Held<'a> {
    digests: BTreeSet<Digest>,
    _removal: MutexGuard<'a, ()>,
}

impl Held<'_> {
    pub(super) fn contains(&self, digest: &Digest) -> bool {
        self.digests.contains(digest)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Digest> {
        self.digests.iter()
    }
}

impl Holds {
    fn counts(&self) -> MutexGuard<'_, BTreeMap<Digest, usize>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn digests(&self) -> BTreeSet<Digest> {
        self.counts().keys().cloned().collect()
    }

    /// Blocks new holds. A hold released meanwhile counts until the next removal.
    pub(super) fn freeze(&self) -> Held<'_> {
        let removal = self.removal.lock().unwrap_or_else(PoisonError::into_inner);
        Held { digests: self.digests(), _removal: removal }
    }

    /// Takes a hold. Waits while a removal runs, so only blocking threads may call it.
    pub(super) fn hold(self: &Arc<Self>, digest: &Digest) -> Hold {
        let _removal = self.removal.lock().unwrap_or_else(PoisonError::into_inner);
        *self.counts().entry(digest.clone()).or_default() += 1;
        Hold { holds: self.clone(), digest: digest.clone() }
    }
}

/// A guard that keeps the content of a manifest or blob until it is dropped.
#[derive(Debug)]
pub struct Hold {
    holds: Arc<Holds>,
    digest: Digest,
}

impl Hold {
    #[must_use]
    pub fn digest(&self) -> &Digest {
        &self.digest
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut held = self.holds.counts();
        if let Some(count) = held.get_mut(&self.digest) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.digest);
            }
        }
    }
}
