//! Content that is not to be collected although nothing stored refers to it yet.
//!
//! Between the moment content appears and the commit that makes an object refer to it, a hold keeps it.
//! Removal asks, under the same lock, for holds and for references in the store: so a hold that is given
//! back after the commit leaves no moment in which neither is seen.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stead_schemas::names::Digest;

#[derive(Debug, Default)]
pub(super) struct Holds {
    counts: Mutex<BTreeMap<Digest, usize>>,
    /// Locked while something is removed, which takes as long as the disk does.
    removal: Mutex<()>,
}

/// What is held, while nothing can be held anew.
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

    /// Keeps new holds from being taken; those that are given back meanwhile count until the next time.
    pub(super) fn freeze(&self) -> Held<'_> {
        let removal = self.removal.lock().unwrap_or_else(PoisonError::into_inner);
        Held { digests: self.digests(), _removal: removal }
    }

    /// Waits while something is removed: for blocking threads only.
    pub(super) fn hold(self: &Arc<Self>, digest: &Digest) -> Hold {
        let _removal = self.removal.lock().unwrap_or_else(PoisonError::into_inner);
        *self.counts().entry(digest.clone()).or_default() += 1;
        Hold { holds: self.clone(), digest: digest.clone() }
    }
}

/// Keeps a manifest's or a blob's content until it is dropped.
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
