//! Content that is not to be collected although nothing stored refers to it yet.
//!
//! Between the moment content appears and the commit that makes an object refer to it, a hold keeps it.
//! Removal asks, under the same lock, for holds and for references in the store: so a hold that is given
//! back after the commit leaves no moment in which neither is seen.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stead_schemas::names::Digest;

#[derive(Debug, Default)]
pub(super) struct Holds(Mutex<BTreeMap<Digest, usize>>);

/// Held digests, while nothing can be added.
pub(super) type Held<'a> = MutexGuard<'a, BTreeMap<Digest, usize>>;

impl Holds {
    pub(super) fn lock(&self) -> Held<'_> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while something is removed.
    pub(super) fn hold(self: &Arc<Self>, digest: &Digest) -> Hold {
        *self.lock().entry(digest.clone()).or_default() += 1;
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
        let mut held = self.holds.lock();
        if let Some(count) = held.get_mut(&self.digest) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.digest);
            }
        }
    }
}
