//! Waiters for changes of objects: each is woken only by changes of its own object.
//!
//! Guarantees: work per event does not grow with the number of waiters for other objects.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use stead_controllers::store::Store;
use stead_schemas::names::Uid;
use tokio::sync::watch;

use super::pace::{Pace, Participant};

/// The waiters by the object that they wait for.
#[derive(Debug, Default)]
pub(super) struct Waiters(Mutex<BTreeMap<Uid, Crowd>>);

/// The waiters for one object.
#[derive(Debug)]
struct Crowd {
    news: watch::Sender<()>,
    pace: Arc<Pace>,
}

/// A waiter; no change after its creation is missed.
pub(super) struct Waiter {
    waiters: Arc<Waiters>,
    uid: Uid,
    news: watch::Receiver<()>,
    participant: Participant,
}

impl Waiters {
    /// Makes the waiters of a store, and spawns a task that notifies them and ends with them.
    pub(super) fn of(store: &Store) -> Arc<Self> {
        let waiters = Arc::<Self>::default();
        tokio::spawn(report(store.clone(), Arc::downgrade(&waiters)));
        waiters
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Uid, Crowd>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wait(self: &Arc<Self>, uid: &Uid) -> Waiter {
        let mut all = self.lock();
        let crowd = all
            .entry(uid.clone())
            .or_insert_with(|| Crowd { news: watch::Sender::new(()), pace: Arc::default() });
        let (news, participant) = (crowd.news.subscribe(), crowd.pace.join());
        Waiter { waiters: self.clone(), uid: uid.clone(), news, participant }
    }
}

impl Waiter {
    /// Marks all changes so far as seen: the object is read after this.
    pub(super) fn mark_seen(&mut self) {
        self.news.mark_unchanged();
    }

    /// Waits until the object has changed since the last `mark_seen`. One of many waiters rests before.
    pub(super) async fn news(&mut self) {
        self.participant.rest().await;
        // This fails only without a sender, which stays as long as there is a receiver.
        let _ = self.news.changed().await;
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let mut all = self.waiters.lock();
        // The receiver of this waiter is still counted.
        if all.get(&self.uid).is_some_and(|crowd| crowd.news.receiver_count() <= 1) {
            all.remove(&self.uid);
        }
    }
}

/// Passes on the events of the store.
async fn report(store: Store, waiters: Weak<Waiters>) {
    loop {
        if let Ok(mut watch) = store.watch(None, store.revision()) {
            // Events before this watch may have been missed, so all waiters are woken.
            let Some(all) = waiters.upgrade() else { return };
            all.lock().values().for_each(|crowd| crowd.news.send_replace(()));
            drop(all);
            while let Ok(event) = watch.next().await {
                let Some(all) = waiters.upgrade() else { return };
                if let Some(crowd) = all.lock().get(&event.uid) {
                    crowd.news.send_replace(());
                }
            }
        }
        // The watch fell behind the ring and begins anew.
        tokio::task::yield_now().await;
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn uid(first: char) -> Uid {
        format!("{first}{:023}", 0).parse().expect("valid")
    }

    #[test]
    fn a_waiter_is_notified_of_its_own_object_only_and_leaves_nothing_behind() {
        let waiters = Arc::<Waiters>::default();
        let (mut one, mut other) = (waiters.wait(&uid('a')), waiters.wait(&uid('b')));
        let also = waiters.wait(&uid('a'));
        one.mark_seen();
        waiters.lock().get(&uid('a')).expect("waited for").news.send_replace(());
        assert!(one.news().now_or_never().is_some());
        assert!(other.news().now_or_never().is_none());
        one.mark_seen();
        assert!(one.news().now_or_never().is_none());
        drop(one);
        assert_eq!(waiters.lock().len(), 2);
        drop((also, other));
        assert!(waiters.lock().is_empty());
    }
}
