//! The heartbeat of a guest: its control channel is polled all the time, and PID 1 or the agent answers.
//!
//! A guest is unresponsive after a number of polls without an answer and a time together. So neither a host
//! that schedules a guest late nor a daemon that was stopped itself makes a guest unresponsive.
//! Assumes: the caller that knows that the VM does not run calls [`Heartbeat::forgive`].

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Time between two polls. Each of them wakes the guest, so more would use the processor of idle hosts.
pub(crate) const INTERVAL: Duration = Duration::from_secs(10);
/// Time for which a guest may leave polls unanswered.
pub(crate) const SILENCE_MAX: Duration = Duration::from_secs(30);
/// Number of polls that may be unanswered, not counting the poll that was just sent.
const UNANSWERED_MAX: u32 = 3;

#[derive(Debug, Default)]
pub(crate) struct Heartbeat(Mutex<Debt>);

#[derive(Debug, Default)]
struct Debt {
    polls: u32,
    /// Time at which the first unanswered poll was sent.
    since: Option<Instant>,
}

impl Debt {
    fn is_overdue(&self, now: Instant) -> bool {
        self.polls > UNANSWERED_MAX && self.since.is_some_and(|since| now - since >= SILENCE_MAX)
    }
}

impl Heartbeat {
    /// Counts a poll that was sent at this time. Returns true when the guest becomes unresponsive by it.
    pub(crate) fn asked(&self, now: Instant) -> bool {
        let mut debt = self.lock();
        let was_overdue = debt.is_overdue(now);
        debt.polls = debt.polls.saturating_add(1);
        debt.since.get_or_insert(now);
        !was_overdue && debt.is_overdue(now)
    }

    /// Counts a message of the guest. Returns true when the guest was unresponsive until now.
    pub(crate) fn answered(&self, now: Instant) -> bool {
        std::mem::take(&mut *self.lock()).is_overdue(now)
    }

    /// Forgets all unanswered polls, because the VM did not run.
    pub(crate) fn forgive(&self) {
        *self.lock() = Debt::default();
    }

    pub(crate) fn is_unresponsive(&self) -> bool {
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
    async fn a_guest_is_unresponsive_after_polls_and_time_until_it_answers_or_is_forgiven() {
        let (heartbeat, start) = (Heartbeat::default(), Instant::now());
        let at = |intervals: u32| start + INTERVAL * intervals;
        assert!((0..3).all(|poll| !heartbeat.asked(at(poll))));
        assert!(heartbeat.asked(at(3)), "the fourth, after thirty seconds");
        assert!(!heartbeat.asked(at(4)), "known by then");
        assert!(heartbeat.answered(at(4)) && !heartbeat.answered(at(4)));
        // Neither many polls in a short time nor one poll a long time ago make a guest unresponsive.
        assert!((0..50).all(|_| !heartbeat.asked(at(5))));
        heartbeat.forgive();
        assert!(!heartbeat.asked(at(5)) && !heartbeat.asked(at(500)));
    }
}
