//! Whether a guest still answers: asked on its control channel all the while, by PID 1 or the agent.
//!
//! Judged by questions without an answer and by time together: a host that schedules a guest late, or
//! a daemon that stood still itself, makes nobody unresponsive.
//! Assumes: whoever knows that the VM does not run says so by [`Heartbeat::forgive`].

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Time between two questions. A guest wakes for each: more of them would cost idle hosts their rest.
pub(super) const INTERVAL: Duration = Duration::from_secs(10);
/// How long a guest may owe an answer.
pub(super) const SILENCE_MAX: Duration = Duration::from_secs(30);
/// How many questions it may owe one to, the last of which was put just now.
const UNANSWERED_MAX: u32 = 3;

#[derive(Debug, Default)]
pub(super) struct Heartbeat(Mutex<Debt>);

#[derive(Debug, Default)]
struct Debt {
    questions: u32,
    /// When the first of them was put.
    since: Option<Instant>,
}

impl Debt {
    fn is_overdue(&self, now: Instant) -> bool {
        self.questions > UNANSWERED_MAX && self.since.is_some_and(|since| now - since >= SILENCE_MAX)
    }
}

impl Heartbeat {
    /// A question was put, at this time; whether the guest is unresponsive only now.
    pub(super) fn asked(&self, now: Instant) -> bool {
        let mut debt = self.lock();
        let was_overdue = debt.is_overdue(now);
        debt.questions = debt.questions.saturating_add(1);
        debt.since.get_or_insert(now);
        !was_overdue && debt.is_overdue(now)
    }

    /// The guest said something; whether it was unresponsive until now.
    pub(super) fn heard(&self, now: Instant) -> bool {
        std::mem::take(&mut *self.lock()).is_overdue(now)
    }

    /// The VM did not run, so the guest owes nothing.
    pub(super) fn forgive(&self) {
        *self.lock() = Debt::default();
    }

    pub(super) fn is_unresponsive(&self) -> bool {
        self.lock().is_overdue(Instant::now())
    }

    fn lock(&self) -> MutexGuard<'_, Debt> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_guest_is_unresponsive_after_questions_and_time_and_until_it_speaks_or_is_forgiven() {
        let (heartbeat, start) = (Heartbeat::default(), Instant::now());
        let at = |intervals: u32| start + INTERVAL * intervals;
        assert!((0..3).all(|turn| !heartbeat.asked(at(turn))));
        assert!(heartbeat.asked(at(3)), "the fourth, after thirty seconds");
        assert!(!heartbeat.asked(at(4)), "known by then");
        assert!(heartbeat.heard(at(4)) && !heartbeat.heard(at(4)));
        // Many questions in a short time, and one question a long time ago, are nothing.
        assert!((0..50).all(|_| !heartbeat.asked(at(5))));
        heartbeat.forgive();
        assert!(!heartbeat.asked(at(5)) && !heartbeat.asked(at(500)));
    }
}
