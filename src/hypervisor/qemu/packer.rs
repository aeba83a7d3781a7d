//! Compressions under way: begun, ended early, and their failures kept until somebody asks.
//!
//! One at a time: it has several threads, and nobody waits for it. In memory only: after a crash the
//! file is as it was, and the compression is begun again.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stead_controllers::host::{HostError, HostErrorKind};
use stead_schemas::compression::Compression;
use stead_schemas::names::Uid;
use tokio::sync::{Semaphore, watch};

use super::memory::MemoryDir;
use crate::hypervisor::Changed;

/// All of them; clones share it.
#[derive(Clone)]
pub(super) struct Packer {
    jobs: Arc<Mutex<BTreeMap<Uid, Job>>>,
    turn: Arc<Semaphore>,
    changed: Changed,
}

enum Job {
    Going { stop: Arc<AtomicBool>, is_over: watch::Receiver<bool> },
    Failed(HostError),
}

impl Packer {
    pub(super) fn new(changed: Changed) -> Self {
        Self { jobs: Arc::default(), turn: Arc::new(Semaphore::new(1)), changed }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Uid, Job>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_going(&self, owner: &Uid) -> bool {
        matches!(self.lock().get(owner), Some(Job::Going { .. }))
    }

    /// Begins, unless it goes on already; the failure of the last one is told first, once.
    pub(super) fn begin(&self, owner: &Uid, memory: MemoryDir, how: Compression) -> Result<(), HostError> {
        let mut jobs = self.lock();
        match jobs.remove(owner) {
            Some(Job::Failed(error)) => return Err(error),
            Some(going @ Job::Going { .. }) => {
                jobs.insert(owner.clone(), going);
                return Ok(());
            }
            None => {}
        }
        let (stop, (over, is_over)) = (Arc::new(AtomicBool::new(false)), watch::channel(false));
        jobs.insert(owner.clone(), Job::Going { stop: stop.clone(), is_over });
        drop(jobs);
        let (packer, owner) = (self.clone(), owner.clone());
        tokio::spawn(async move {
            let done = packer.work(memory, how, stop.clone()).await;
            let is_stopped = stop.load(Ordering::Relaxed);
            let mut jobs = packer.lock();
            jobs.remove(&owner);
            if let Err(error) = done
                && !is_stopped
            {
                jobs.insert(owner.clone(), Job::Failed(error));
            }
            drop(jobs);
            // Nobody need wait for it.
            let _ = over.send(true);
            (packer.changed)(&owner);
        });
        Ok(())
    }

    async fn work(
        &self,
        memory: MemoryDir,
        how: Compression,
        stop: Arc<AtomicBool>,
    ) -> Result<(), HostError> {
        let failed = |why: String| {
            HostError::new(HostErrorKind::Transient, "compress the memory in", memory.name()).because(why)
        };
        let _turn = self.turn.acquire().await.map_err(|error| failed(error.to_string()))?;
        let of_thread = memory.clone();
        let packed = tokio::task::spawn_blocking(move || of_thread.pack(how, &stop)).await;
        packed.map_err(|error| failed(error.to_string()))?
    }

    /// Ends what goes on for an owner, undone, and forgets how it failed.
    pub(super) async fn end(&self, owner: &Uid) {
        let going = match self.lock().get(owner) {
            Some(Job::Going { stop, is_over }) => {
                stop.store(true, Ordering::Relaxed);
                Some(is_over.clone())
            }
            Some(Job::Failed(_)) | None => None,
        };
        if let Some(mut is_over) = going {
            // Its sender going away means the same.
            drop(is_over.wait_for(|&is_over| is_over).await);
        }
        if !self.is_going(owner) {
            self.lock().remove(owner);
        }
    }
}
