//! Permits by registry: each host has its own few, so that one that is slow holds up only its own.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::Semaphore;

/// Hosts with permits in use; the others are forgotten.
#[derive(Debug)]
pub(super) struct Shares {
    each: usize,
    hosts: Mutex<BTreeMap<String, Weak<Semaphore>>>,
}

impl Shares {
    pub(super) fn of(each: usize) -> Self {
        Self { each, hosts: Mutex::default() }
    }

    pub(super) fn of_host(&self, host: &str) -> Arc<Semaphore> {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        hosts.retain(|_, share| share.strong_count() > 0);
        let known = hosts.get(host).and_then(Weak::upgrade);
        known.unwrap_or_else(|| {
            let share = Arc::new(Semaphore::new(self.each));
            hosts.insert(host.to_owned(), Arc::downgrade(&share));
            share
        })
    }
}
