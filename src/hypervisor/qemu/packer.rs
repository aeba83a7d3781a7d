//! Compressions under way: begun, ended early, and their failures kept until somebody asks.
//!
//! One at a time: it has several threads, and nobody waits for it. In memory only: after a crash the
//! file is as it was, and the compression is begun again. One that is ended does not wait for those before
//! it, so nobody who needs the memory does.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stead_controllers::host::{HostError, HostErrorKind};
use stead_schemas::compression::Compression;
use stead_schemas::names::Uid;
use tokio::sync::{Notify, Semaphore, watch};

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
    Going { stop: Stop, is_over: watch::Receiver<bool> },
    Failed(HostError),
}

/// Ends one compression: looked at while it works, and waited for before that.
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
        // Kept for one that begins to wait just now.
        self.waiting.notify_one();
    }

    fn is_set(&self) -> bool {
        self.is_set.load(Ordering::Relaxed)
    }
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
        let (stop, (over, is_over)) = (Stop::new(), watch::channel(false));
        jobs.insert(owner.clone(), Job::Going { stop: stop.clone(), is_over });
        drop(jobs);
        let (packer, owner) = (self.clone(), owner.clone());
        tokio::spawn(async move {
            let done = packer.work(memory, how, stop.clone()).await;
            let is_stopped = stop.is_set();
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

    async fn work(&self, memory: MemoryDir, how: Compression, stop: Stop) -> Result<(), HostError> {
        let failed = |why: String| {
            HostError::new(HostErrorKind::Transient, "compress the memory in", memory.name()).because(why)
        };
        let _turn = tokio::select! {
            biased;
            () = stop.waiting.notified() => return Err(failed("it was ended before it began".to_owned())),
            turn = self.turn.acquire() => turn.map_err(|error| failed(error.to_string()))?,
        };
        let of_thread = memory.clone();
        let packed = tokio::task::spawn_blocking(move || of_thread.pack(how, &stop.is_set)).await;
        packed.map_err(|error| failed(error.to_string()))?
    }

    /// Ends what goes on for an owner, undone, and forgets how it failed.
    pub(super) async fn end(&self, owner: &Uid) {
        let going = match self.lock().get(owner) {
            Some(Job::Going { stop, is_over }) => {
                stop.set();
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

#[cfg(test)]
mod tests {
    use stead_schemas::compression::Algorithm;

    use super::*;

    #[tokio::test]
    async fn one_that_is_queued_is_ended_without_waiting_for_those_before_it() {
        let dir = tempfile::tempdir().expect("scratch");
        let ended = Arc::new(Mutex::new(Vec::new()));
        let of_packer = ended.clone();
        let changed = move |owner: &Uid| of_packer.lock().expect("whole").push(owner.clone());
        let packer = Packer::new(Arc::new(changed));
        // As long as this is held another compression goes on.
        let going = packer.turn.acquire().await.expect("open");
        let owners = ["a", "b"].map(|first| format!("{first}{:023}", 0).parse::<Uid>().expect("valid"));
        for owner in &owners {
            let how = Compression { algorithm: Algorithm::Zstd, level: 1 };
            packer.begin(owner, MemoryDir::new(dir.path(), owner), how).expect("begun");
        }
        packer.end(&owners[1]).await;
        assert!(!packer.is_going(&owners[1]) && packer.is_going(&owners[0]));
        assert_eq!(*ended.lock().expect("whole"), [owners[1].clone()]);
        // That there is no memory is told to the next who asks, and only by the one that got its turn.
        drop(going);
        while packer.is_going(&owners[0]) {
            tokio::task::yield_now().await;
        }
        let how = Compression { algorithm: Algorithm::Zstd, level: 1 };
        assert!(packer.begin(&owners[0], MemoryDir::new(dir.path(), &owners[0]), how).is_err());
    }
}
