//! Permits by key: each key has its own few, so that a slow user delays only its own key.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::Semaphore;

/// Keys with permits in use. Others are dropped.
#[derive(Debug)]
pub(super) struct Shares<K> {
    each: usize,
    known: Mutex<BTreeMap<K, Weak<Semaphore>>>,
}

impl<K: Ord> Shares<K> {
    pub(super) fn of(each: usize) -> Self {
        Self { each, known: Mutex::default() }
    }

    pub(super) fn share(&self, whose: K) -> Arc<Semaphore> {
        let mut all = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, share| share.strong_count() > 0);
        let known = all.get(&whose).and_then(Weak::upgrade);
        known.unwrap_or_else(|| {
            let share = Arc::new(Semaphore::new(self.each));
            all.insert(whose, Arc::downgrade(&share));
            share
        })
    }
}
