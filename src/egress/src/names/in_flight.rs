//! Questions to upstream resolvers that are under way. Equal questions wait for one answer.
//!
//! Guarantees: of equal questions only one is sent at a time; it goes on when nobody waits for it any more, so
//! that another one may; it is forgotten when its answer is there, even after a panic. Bounded by its callers: each
//! question holds a share of its guest until it ends.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};

use super::answer::{Answer, Key};

/// An answer that several questions wait for.
pub(crate) type SharedAnswer = Shared<BoxFuture<'static, Arc<Answer>>>;

/// The questions that are under way.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    running: Mutex<HashMap<Key, SharedAnswer>>,
}

/// Forgets a question when it ends.
struct Removal {
    in_flight: Arc<InFlight>,
    key: Key,
}

impl InFlight {
    /// Joins the wait for the answer to an equal question, or asks by `ask`. The flag is `true` if this question is
    /// the one that is sent.
    pub(crate) fn join(
        self: &Arc<Self>,
        key: &Key,
        ask: impl Future<Output = Arc<Answer>> + Send + 'static,
    ) -> (SharedAnswer, bool) {
        // The lock is held until the question is in the table, so that it is not removed before it is there.
        let mut running = self.lock();
        if let Some(answer) = running.get(key) {
            return (answer.clone(), false);
        }
        // The removal is made when the task runs: a runtime that is shutting down drops the task here and now, while
        // the lock is held.
        let (in_flight, removed) = (self.clone(), key.clone());
        let task = tokio::spawn(async move {
            let _removal = Removal { in_flight, key: removed };
            ask.await
        });
        let answer = task.map(|ended| ended.unwrap_or_else(|_| Arc::new(Answer::failure()))).boxed().shared();
        running.insert(key.clone(), answer.clone());
        (answer, true)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, SharedAnswer>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Removal {
    fn drop(&mut self) {
        self.in_flight.lock().remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use hickory_proto::rr::{Name, RecordType};
    use tokio::sync::Notify;

    use super::*;
    use crate::names::answer::Found;

    fn key(text: &str) -> Key {
        Key { name: Name::from_ascii(text).expect("a name"), record_type: RecordType::A }
    }

    fn answer() -> Arc<Answer> {
        Arc::new(Answer::negative(Found::Empty, None))
    }

    #[tokio::test]
    async fn equal_questions_are_sent_once() {
        let (in_flight, gate, sent) =
            (Arc::new(InFlight::default()), Arc::new(Notify::new()), Arc::new(AtomicUsize::new(0)));
        let ask = || {
            let (gate, sent) = (gate.clone(), sent.clone());
            async move {
                sent.fetch_add(1, Ordering::Relaxed);
                gate.notified().await;
                answer()
            }
        };
        let (first, is_first) = in_flight.join(&key("a.example."), ask());
        let (second, is_second_first) = in_flight.join(&key("A.Example."), ask());
        assert!(is_first && !is_second_first);
        gate.notify_one();
        assert_eq!((first.await, second.await), (answer(), answer()));
        assert_eq!(sent.load(Ordering::Relaxed), 1);
        assert!(in_flight.lock().is_empty());
    }

    #[tokio::test]
    async fn a_question_goes_on_when_the_first_who_asked_is_gone() {
        let (in_flight, gate) = (Arc::new(InFlight::default()), Arc::new(Notify::new()));
        let opened = gate.clone();
        let first = in_flight.join(&key("a.example."), async move {
            opened.notified().await;
            answer()
        });
        drop(first);
        let (second, is_first) = in_flight.join(&key("a.example."), pending());
        gate.notify_one();
        assert_eq!((second.await, is_first), (answer(), false));
    }

    #[tokio::test]
    async fn a_question_that_panics_is_a_failure_and_can_be_asked_again() {
        let in_flight = Arc::new(InFlight::default());
        let key = key("a.example.");
        let (panicked, _) = in_flight.join(&key, async { panic!("of this test") });
        assert_eq!(panicked.await, Arc::new(Answer::failure()));
        let (again, is_first) = in_flight.join(&key, async { answer() });
        assert_eq!((again.await, is_first), (answer(), true));
    }
}
