//! Locks of VMs: what pauses, starts or resumes a VM waits until a capture of that VM is over.
//!
//! A capture is one step of the snapshot reconciler. The VM's own reconciler would otherwise see the VM
//! paused, and resume it in the middle. Locks are in memory only: after a crash no capture is in
//! progress, and the VM is resumed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use stead_schemas::names::Uid;
use tokio::sync::OwnedMutexGuard;

type Lock = tokio::sync::Mutex<()>;

/// The locks of all VMs. An entry lives as long as its lock is held or awaited.
#[derive(Debug, Default)]
pub(crate) struct Locks(Mutex<BTreeMap<Uid, Weak<Lock>>>);

impl Locks {
    /// Waits for the lock, which is held until the guard is dropped.
    pub(crate) async fn take(&self, owner: &Uid) -> OwnedMutexGuard<()> {
        self.find(owner).lock_owned().await
    }

    fn find(&self, owner: &Uid) -> Arc<Lock> {
        let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        locks.retain(|_, lock| lock.strong_count() > 0);
        if let Some(lock) = locks.get(owner).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::new(Lock::default());
        locks.insert(owner.clone(), Arc::downgrade(&lock));
        lock
    }
}
