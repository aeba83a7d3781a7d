//! The delay queue of a runner: the keys and their due times.
//!
//! Guarantees: a key is in the queue once. Of two requests the earlier due time wins. While a key runs, later
//! requests collapse to one, which is due after the run. Keys that are due at the same time are taken in the
//! order of their requests.
//! Never: returns a key twice without a `done` in between (asserted).

use std::collections::BTreeMap;

use stead_schemas::names::Uid;
use tokio::time::Instant;

#[derive(Debug, Default)]
pub(super) struct Queue {
    slots: BTreeMap<Uid, Slot>,
    /// The keys by due time, then by the order of the requests.
    due: BTreeMap<(Instant, u64), Uid>,
    requests: u64,
}

#[derive(Debug)]
enum Slot {
    /// The key's position in `due`.
    Waiting((Instant, u64)),
    /// The earliest request since the run began.
    Running(Option<Instant>),
}

impl Queue {
    pub(super) fn schedule(&mut self, uid: &Uid, due: Instant) {
        match self.slots.get_mut(uid) {
            Some(Slot::Running(again)) => *again = Some(again.map_or(due, |earlier| earlier.min(due))),
            Some(Slot::Waiting((earlier, _))) if *earlier <= due => {}
            Some(Slot::Waiting(position)) => {
                let key = self.due.remove(position).expect("a waiting key has its place");
                self.requests += 1;
                *position = (due, self.requests);
                self.due.insert(*position, key);
            }
            None => {
                self.requests += 1;
                let position = (due, self.requests);
                self.slots.insert(uid.clone(), Slot::Waiting(position));
                self.due.insert(position, uid.clone());
            }
        }
    }

    /// Returns true if the key runs or is due at some time.
    pub(super) fn has(&self, uid: &Uid) -> bool {
        self.slots.contains_key(uid)
    }

    /// Takes the key that has been due longest. It counts as running until [`Queue::done`].
    pub(super) fn pop(&mut self, now: Instant) -> Option<Uid> {
        let first = self.due.first_entry().filter(|first| first.key().0 <= now)?;
        let uid = first.remove();
        let slot = self.slots.get_mut(&uid).expect("a key in `due` has its slot");
        assert!(matches!(slot, Slot::Waiting(_)), "one run per key at a time: {uid} is running");
        *slot = Slot::Running(None);
        Some(uid)
    }

    /// Ends the run of this key and schedules the requests that were made meanwhile.
    pub(super) fn done(&mut self, uid: &Uid) {
        let slot = self.slots.remove(uid);
        let Some(Slot::Running(again)) = slot else { panic!("{uid} ended and was not running") };
        if let Some(due) = again {
            self.schedule(uid, due);
        }
    }

    /// Ends the run of a key whose object no longer exists, and drops the requests that were made meanwhile.
    pub(super) fn gone(&mut self, uid: &Uid) {
        let slot = self.slots.remove(uid);
        assert!(matches!(slot, Some(Slot::Running(_))), "{uid} ended and was not running");
    }

    /// Returns the due time of the next key.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.due.first_key_value().map(|(&(due, _), _)| due)
    }
}
