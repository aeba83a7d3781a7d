//! Turns: what holds, starts or resumes a VM waits until a capture of it is over.
//!
//! A capture is one step of another reconciler; the VM's own would see it paused and resume it in the
//! middle. Kept in memory only: after a crash nobody captures, and the VM is resumed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use stead_schemas::names::Uid;
use tokio::sync::OwnedMutexGuard;

type Turn = tokio::sync::Mutex<()>;

/// One turn for each VM; an entry lives as long as somebody has or awaits it.
#[derive(Debug, Default)]
pub(super) struct Turns(Mutex<BTreeMap<Uid, Weak<Turn>>>);

impl Turns {
    /// Waits for the turn, which ends with the value.
    pub(super) async fn take(&self, owner: &Uid) -> OwnedMutexGuard<()> {
        self.of(owner).lock_owned().await
    }

    fn of(&self, owner: &Uid) -> Arc<Turn> {
        let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        turns.retain(|_, turn| turn.strong_count() > 0);
        if let Some(turn) = turns.get(owner).and_then(Weak::upgrade) {
            return turn;
        }
        let turn = Arc::new(Turn::default());
        turns.insert(owner.clone(), Arc::downgrade(&turn));
        turn
    }
}
