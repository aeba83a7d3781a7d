//! Delays after a failure: the one table from an error's kind to its delay.
//!
//! | kind                         | delay                                     |
//! |------------------------------|-------------------------------------------|
//! | Transient, Conflict, Missing | 100 ms, doubling to 30 s                  |
//! | Exhausted, Denied            | 1 s, doubling to 5 min                    |
//! | Unsupported, Permanent       | 5 min (a change of the spec comes sooner) |
//!
//! Guarantees: delays are capped, shortened by up to a quarter by a seeded source (so that keys that failed
//! together are not retried together), and restart after progress.
//! The state is kept at run time only: after a restart the delays begin again, which costs an attempt and not
//! correctness.

use std::collections::BTreeMap;
use std::time::Duration;

use backoff::backoff::Backoff;
use backoff::{ExponentialBackoff, ExponentialBackoffBuilder};
use stead_schemas::names::Uid;

use crate::host::HostErrorKind;

/// A family of delays: the first delay, and the cap that doubling reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pace {
    /// Steps succeed but do not finish within one pass.
    Acting,
    Quick,
    Slow,
    Rare,
}

impl Pace {
    fn of(kind: HostErrorKind) -> Self {
        match kind {
            HostErrorKind::Transient | HostErrorKind::Conflict | HostErrorKind::Missing => Self::Quick,
            HostErrorKind::Exhausted | HostErrorKind::Denied => Self::Slow,
            HostErrorKind::Unsupported | HostErrorKind::Permanent => Self::Rare,
        }
    }

    fn bounds(self) -> (Duration, Duration) {
        match self {
            Self::Acting => (Duration::from_millis(10), Duration::from_secs(5)),
            Self::Quick => (Duration::from_millis(100), Duration::from_secs(30)),
            Self::Slow => (Duration::from_secs(1), Duration::from_secs(300)),
            Self::Rare => (Duration::from_secs(300), Duration::from_secs(300)),
        }
    }

    fn start(self) -> ExponentialBackoff {
        let (first, cap) = self.bounds();
        ExponentialBackoffBuilder::new()
            .with_initial_interval(first)
            .with_max_interval(cap)
            .with_multiplier(2.0)
            // The crate draws from the thread's generator; our jitter is seeded and applied below.
            .with_randomization_factor(0.0)
            .with_max_elapsed_time(None)
            .build()
    }
}

#[derive(Debug)]
struct Retry {
    failures: u32,
    pace: Pace,
    backoff: ExponentialBackoff,
}

/// The keys that have delays, because they failed or did not finish.
#[derive(Debug)]
pub(super) struct Retries {
    keys: BTreeMap<Uid, Retry>,
    jitter: Jitter,
}

impl Retries {
    pub(super) fn new(seed: u64) -> Self {
        Self { keys: BTreeMap::new(), jitter: Jitter(seed) }
    }

    /// Returns the number of failures in a row.
    pub(super) fn failures(&self, uid: &Uid) -> u32 {
        self.keys.get(uid).map_or(0, |retry| retry.failures)
    }

    /// Counts a failure and returns the delay before the next attempt.
    pub(super) fn failed(&mut self, uid: &Uid, kind: HostErrorKind) -> Duration {
        let failures = self.failures(uid).saturating_add(1);
        self.delay(uid, Pace::of(kind), failures)
    }

    /// Returns the delay after a pass that took steps and did not finish. It is progress, but a plan without
    /// an end must not spin.
    pub(super) fn acting(&mut self, uid: &Uid) -> Duration {
        self.delay(uid, Pace::Acting, 0)
    }

    /// Clears the delays of a key that succeeded.
    pub(super) fn reset(&mut self, uid: &Uid) {
        self.keys.remove(uid);
    }

    fn delay(&mut self, uid: &Uid, pace: Pace, failures: u32) -> Duration {
        let fresh = || Retry { failures, pace, backoff: pace.start() };
        let retry = self.keys.entry(uid.clone()).or_insert_with(fresh);
        if retry.pace != pace {
            *retry = fresh();
        }
        retry.failures = failures;
        let delay = retry.backoff.next_backoff().expect("a backoff without an end always has a next");
        delay - self.jitter.up_to(delay / 4)
    }
}

/// A SplitMix64 generator: a few lines are enough to spread delays, and the same seed gives the same run.
#[derive(Debug)]
struct Jitter(u64);

impl Jitter {
    fn up_to(&mut self, max: Duration) -> Duration {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^= bits >> 31;
        let fraction = u32::try_from(bits >> 48).expect("16 bits fit 32");
        max * fraction / (1 << 16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uid() -> Uid {
        "abcdefghijklmnopqrstuvwx".parse().expect("valid")
    }

    #[test]
    fn delays_double_to_their_cap_and_start_anew_after_progress() {
        let mut retries = Retries::new(7);
        let mut cap = Duration::from_millis(100);
        for failures in 1..=20 {
            let delay = retries.failed(&uid(), HostErrorKind::Transient);
            assert!(delay <= cap && delay >= cap * 3 / 4, "failure {failures}: {delay:?} of {cap:?}");
            assert_eq!(retries.failures(&uid()), failures);
            cap = (cap * 2).min(Duration::from_secs(30));
        }
        retries.reset(&uid());
        assert_eq!(retries.failures(&uid()), 0);
        assert!(retries.failed(&uid(), HostErrorKind::Missing) <= Duration::from_millis(100));
    }

    #[test]
    fn the_kind_decides_the_pace_and_a_change_of_pace_keeps_the_count() {
        let mut retries = Retries::new(7);
        retries.failed(&uid(), HostErrorKind::Conflict);
        let slow = retries.failed(&uid(), HostErrorKind::Exhausted);
        assert!(slow >= Duration::from_millis(750) && slow <= Duration::from_secs(1));
        assert!(retries.failed(&uid(), HostErrorKind::Permanent) >= Duration::from_secs(225));
        assert_eq!(retries.failures(&uid()), 3);
        retries.acting(&uid());
        assert_eq!(retries.failures(&uid()), 0, "steps that went well are progress");
    }

    #[test]
    fn the_same_seed_gives_the_same_delays_and_another_seed_others() {
        let run = |seed| {
            let mut retries = Retries::new(seed);
            (0..8).map(|_| retries.failed(&uid(), HostErrorKind::Denied)).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }
}
