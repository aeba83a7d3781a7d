//! Compressions in progress: started, cancelled, and their failures kept until they are reported.
//!
//! There is one at a time: it has several threads, and nothing waits for it. The state is in memory only:
//! after a crash the file is unchanged, and the compression starts again. Cancelling a queued compression
//! does not wait for those before it, so whatever needs that memory does not wait either.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stead_controllers::host::{HostError, HostErrorKind};
use stead_schemas::compression::Compression;
use stead_schemas::names::Uid;
use tokio::sync::{Notify, Semaphore, watch};

use super::directory::MemoryDir;
use crate::guest_channel::Changed;

/// The compressions of this daemon. Clones share the state.
#[derive(Clone)]
pub(crate) struct Compressor {
    jobs: Arc<Mutex<BTreeMap<Uid, Job>>>,
    permit: Arc<Semaphore>,
    changed: Changed,
}

enum Job {
    InProgress { stop: Stop, is_over: watch::Receiver<bool> },
    Failed(HostError),
}

/// Cancels one compression: polled while it works, and awaited while it is queued.
#[derive(Clone)]
struct Stop {
    is_set: Arc<AtomicBool>,
    waiting: Arc<Notify>,
}

impl Stop {
    fn new() -> Self {
        Self { is_set: Arc::default(), waiting: Arc::default() }
    }

    fn set(&self) {
        self.is_set.store(true, Ordering::Relaxed);
        // The notification is kept for a compression that begins to wait just now.
        self.waiting.notify_one();
    }

    fn is_set(&self) -> bool {
        self.is_set.load(Ordering::Relaxed)
    }
}

impl Compressor {
    pub(crate) fn new(changed: Changed) -> Self {
        Self { jobs: Arc::default(), permit: Arc::new(Semaphore::new(1)), changed }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Uid, Job>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_in_progress(&self, owner: &Uid) -> bool {
        matches!(self.lock().get(owner), Some(Job::InProgress { .. }))
    }

    /// Starts a compression unless it is in progress. The failure of the last attempt is returned first,
    /// once.
    pub(crate) fn begin(&self, owner: &Uid, memory: MemoryDir, how: Compression) -> Result<(), HostError> {
        let mut jobs = self.lock();
        match jobs.remove(owner) {
            Some(Job::Failed(error)) => return Err(error),
            Some(running @ Job::InProgress { .. }) => {
                jobs.insert(owner.clone(), running);
                return Ok(());
            }
            None => {}
        }
        let (stop, (over, is_over)) = (Stop::new(), watch::channel(false));
        jobs.insert(owner.clone(), Job::InProgress { stop: stop.clone(), is_over });
        drop(jobs);
        let (compressor, owner) = (self.clone(), owner.clone());
        tokio::spawn(async move {
            let done = compressor.work(memory, how, stop.clone()).await;
            let is_stopped = stop.is_set();
            let mut jobs = compressor.lock();
            jobs.remove(&owner);
            if let Err(error) = done
                && !is_stopped
            {
                jobs.insert(owner.clone(), Job::Failed(error));
            }
            drop(jobs);
            // Nothing may be waiting for it.
            let _ = over.send(true);
            (compressor.changed)(&owner);
        });
        Ok(())
    }

    async fn work(&self, memory: MemoryDir, how: Compression, stop: Stop) -> Result<(), HostError> {
        let failed = |why: String| {
            HostError::new(HostErrorKind::Transient, "compress the memory in", memory.name()).because(why)
        };
        let _permit = tokio::select! {
            biased;
            () = stop.waiting.notified() => return Err(failed("it was ended before it began".to_owned())),
            permit = self.permit.acquire() => permit.map_err(|error| failed(error.to_string()))?,
        };
        let thread_memory = memory.clone();
        let compressed = tokio::task::spawn_blocking(move || thread_memory.compress(how, &stop.is_set)).await;
        compressed.map_err(|error| failed(error.to_string()))?
    }

    /// Cancels the compression of an owner without any effect, and forgets its failure.
    pub(crate) async fn end(&self, owner: &Uid) {
        let in_progress = match self.lock().get(owner) {
            Some(Job::InProgress { stop, is_over }) => {
                stop.set();
                Some(is_over.clone())
            }
            Some(Job::Failed(_)) | None => None,
        };
        if let Some(mut is_over) = in_progress {
            // A sender that is gone means the same.
            drop(is_over.wait_for(|&is_over| is_over).await);
        }
        if !self.is_in_progress(owner) {
            self.lock().remove(owner);
        }
    }
}

#[cfg(test)]
mod tests {
    use stead_schemas::compression::Algorithm;

    use super::*;

    #[tokio::test]
    async fn a_queued_compression_is_cancelled_without_waiting_for_those_before_it() {
        let dir = tempfile::tempdir().expect("scratch");
        let ended = Arc::new(Mutex::new(Vec::new()));
        let seen_ends = ended.clone();
        let changed = move |owner: &Uid| seen_ends.lock().expect("whole").push(owner.clone());
        let compressor = Compressor::new(Arc::new(changed));
        // As long as this permit is held, another compression is in progress.
        let permit = compressor.permit.acquire().await.expect("open");
        let owners = ["a", "b"].map(|first| format!("{first}{:023}", 0).parse::<Uid>().expect("valid"));
        for owner in &owners {
            let how = Compression { algorithm: Algorithm::Zstd, level: 1 };
            compressor.begin(owner, MemoryDir::new(dir.path(), owner), how).expect("begun");
        }
        compressor.end(&owners[1]).await;
        assert!(!compressor.is_in_progress(&owners[1]) && compressor.is_in_progress(&owners[0]));
        assert_eq!(*ended.lock().expect("whole"), [owners[1].clone()]);
        // The first one gets the permit, and its failure (there is no memory) is returned by the next call.
        drop(permit);
        while compressor.is_in_progress(&owners[0]) {
            tokio::task::yield_now().await;
        }
        let how = Compression { algorithm: Algorithm::Zstd, level: 1 };
        assert!(compressor.begin(&owners[0], MemoryDir::new(dir.path(), &owners[0]), how).is_err());
    }
}
