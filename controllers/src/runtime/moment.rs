//! The present time of a pass, and the comparison of stored times with it while clocks may be set.
//!
//! Guarantees: an interval that is measured from a stored time never ends early because the clock was set
//! forward. It never lasts longer than its length because the clock was set back, counted from the last time
//! that the clock was set or that the daemon started.
//! Assumes: the clock behind [`Clock::elapsed`] is never set.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use stead_schemas::limits::{CLOCK_DRIFT_DIVISOR, CLOCK_STEP_MIN};

use super::clock::Clock;

/// A reading of the wall clock, with what is known of its steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    at: Timestamp,
    /// Time at which this daemon began to watch the clock.
    watched_since: Timestamp,
    /// Time of the last noticed step of the clock, by the clock as it is now.
    set_at: Option<Timestamp>,
}

impl Moment {
    /// Returns the wall time, for times that are stored, shown, or agreed with people.
    #[must_use]
    pub fn at(self) -> Timestamp {
        self.at
    }

    /// Returns the time from which an interval counts that began at a stored time. The result is never after
    /// the present: a stored time in the future was written before the clock was set back. Time before the
    /// last step of the clock does not count.
    #[must_use]
    pub fn since(self, stored: Timestamp) -> Timestamp {
        match self.set_at {
            Some(set_at) if stored > self.at => set_at,
            Some(set_at) => stored.max(set_at),
            None if stored > self.at => self.watched_since,
            None => stored,
        }
    }

    /// Returns the time since the stored time, as [`Self::since`] counts it.
    #[must_use]
    pub fn elapsed(self, stored: Timestamp) -> Duration {
        self.at.duration_since(self.since(stored)).try_into().unwrap_or_default()
    }

    /// Returns the end of an interval of this length that began at a stored time.
    #[must_use]
    pub fn end(self, stored: Timestamp, length: Duration) -> Timestamp {
        after(self.since(stored), length)
    }

    /// Returns the time after this delay from now.
    #[must_use]
    pub fn after(self, delay: Duration) -> Timestamp {
        after(self.at, delay)
    }
}

/// A conversion to the reading of a clock that was never set.
impl From<Timestamp> for Moment {
    fn from(at: Timestamp) -> Self {
        Self { at, watched_since: at, set_at: None }
    }
}

/// Returns `at + delay`, or the last representable time.
#[must_use]
pub fn after(at: Timestamp, delay: Duration) -> Timestamp {
    let delay = SignedDuration::try_from(delay).unwrap_or(SignedDuration::MAX);
    at.saturating_add(delay).unwrap_or(Timestamp::MAX)
}

/// A wall clock that detects its own steps.
#[derive(Clone)]
pub(crate) struct WatchedClock {
    clock: Arc<dyn Clock>,
    watch: Arc<Mutex<Watch>>,
}

struct Watch {
    since: Timestamp,
    set_at: Option<Timestamp>,
    last: Reading,
}

/// A reading of the wall clock, between two readings of the clock that is never set. The thread may be held
/// up between them.
struct Reading {
    before: Duration,
    at: Timestamp,
    after: Duration,
}

impl Reading {
    fn take(clock: &dyn Clock) -> Self {
        let before = clock.elapsed();
        let at = clock.now();
        Self { before, at, after: clock.elapsed() }
    }
}

impl WatchedClock {
    pub(crate) fn new(clock: Arc<dyn Clock>) -> Self {
        let last = Reading::take(&*clock);
        let watch = Watch { since: last.at, set_at: None, last };
        Self { clock, watch: Arc::new(Mutex::new(watch)) }
    }

    /// Reads the clock. A step since the last reading counts as made now, and so never as made too early.
    pub(crate) fn read(&self) -> Moment {
        // A poisoned lock is harmless: the fields are written one by one and each is valid.
        let mut watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        // The clock is read under the lock: two readings in the wrong order would look like a step.
        let reading = Reading::take(&*self.clock);
        let at = reading.at;
        if is_step(&watch.last, &reading) {
            tracing::warn!(from = %watch.last.at, to = %at, "the wall clock was set");
            watch.set_at = Some(at);
        }
        watch.last = reading;
        Moment { at, watched_since: watch.since, set_at: watch.set_at }
    }
}

/// True if the wall clock advanced by another time than passed. A clock that is slewed was not set.
fn is_step(earlier: &Reading, later: &Reading) -> bool {
    let signed = |duration| SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX);
    let (least, most) =
        (later.before.saturating_sub(earlier.after), later.after.saturating_sub(earlier.before));
    let tolerance = signed(CLOCK_STEP_MIN + most / CLOCK_DRIFT_DIVISOR);
    let shown = later.at.duration_since(earlier.at);
    shown < signed(least).saturating_sub(tolerance) || shown > signed(most).saturating_add(tolerance)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicI64, Ordering};

    use super::*;

    /// The wall seconds and the elapsed seconds of a test clock.
    #[derive(Default)]
    struct Hands(AtomicI64, AtomicI64);

    impl Clock for Hands {
        fn now(&self) -> Timestamp {
            at(self.0.load(Ordering::Relaxed))
        }

        fn elapsed(&self) -> Duration {
            Duration::from_secs(self.1.load(Ordering::Relaxed).unsigned_abs())
        }
    }

    impl Hands {
        fn advance(&self, shown: i64, passed: i64) {
            self.0.fetch_add(shown, Ordering::Relaxed);
            self.1.fetch_add(passed, Ordering::Relaxed);
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).expect("in range")
    }

    fn watched() -> (Arc<Hands>, WatchedClock) {
        let hands = Arc::new(Hands::default());
        hands.advance(10_000, 50);
        (hands.clone(), WatchedClock::new(hands))
    }

    #[test]
    fn without_a_step_only_the_future_is_not_believed() {
        let (hands, clock) = watched();
        hands.advance(100, 100);
        let now = clock.read();
        assert_eq!((now.at(), now.since(at(7)), now.since(at(10_050))), (at(10_100), at(7), at(10_050)));
        // The time was stored before the daemon started, by a clock that was fast.
        assert_eq!(now.since(at(13_600)), at(10_000));
        assert_eq!(now.end(at(13_600), Duration::from_secs(30)), at(10_030));
    }

    #[test]
    fn an_interval_begins_again_with_a_step_in_either_direction() {
        for step in [-3600, -3, 3, 300] {
            let (hands, clock) = watched();
            hands.advance(100 + step, 100);
            let set_at = clock.read().at();
            hands.advance(7, 7);
            let now = clock.read();
            // The times were stored by the clock before the step, and by the clock as it is now.
            for stored in [at(10_090), at(10_000), now.at() + Duration::from_secs(9_000)] {
                let counts = now.since(stored);
                assert!(counts >= set_at && counts <= now.at(), "{step}: {stored} counts as {counts}");
            }
            assert_eq!(now.since(now.at()), now.at(), "{step}");
            assert_eq!(now.elapsed(set_at), Duration::from_secs(7), "{step}");
        }
    }

    #[test]
    fn a_clock_that_is_slewed_was_not_set() {
        let (hands, clock) = watched();
        for _ in 0..10 {
            // The slew is half a second in a thousand, which is the most that a kernel applies.
            hands.advance(20_010, 20_000);
        }
        assert_eq!(clock.read().since(at(1)), at(1));
        // A clock whose host slept for a moment was not set; after a minute of sleep it was.
        hands.advance(1, 0);
        assert_eq!(clock.read().since(at(1)), at(1));
        hands.advance(60, 0);
        assert_ne!(clock.read().since(at(1)), at(1));
    }
}
