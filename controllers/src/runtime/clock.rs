//! Time and identity from outside, so that one seed is one run.
//!
//! Waiting is `tokio::time`'s (virtual in tests); the wall clock and new ids are these two ports.

use std::time::Duration;

use jiff::Timestamp;
use stead_schemas::names::Uid;

/// The wall clock; only for what is stored and shown, never for waiting.
pub trait Clock: Send + Sync + 'static {
    fn now(&self) -> Timestamp;
    /// Time since some start, by a clock that nobody sets: steps of the wall clock are noticed by it.
    fn elapsed(&self) -> Duration;
}

/// A source of new object ids.
pub trait Ids: Send + Sync + 'static {
    fn next(&self) -> Uid;
}

/// A clock that goes with `tokio::time`: virtual where that is paused.
#[cfg(any(test, feature = "sim"))]
#[derive(Debug, Clone)]
pub struct TokioClock {
    start: tokio::time::Instant,
    epoch: Timestamp,
}

#[cfg(any(test, feature = "sim"))]
impl TokioClock {
    /// Says `epoch` now.
    #[must_use]
    pub fn starting_at(epoch: Timestamp) -> Self {
        Self { start: tokio::time::Instant::now(), epoch }
    }
}

#[cfg(any(test, feature = "sim"))]
impl Clock for TokioClock {
    fn now(&self) -> Timestamp {
        self.epoch + self.start.elapsed()
    }

    fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }
}

/// Ids in order: `a00...0`, `a00...1`.
#[cfg(any(test, feature = "sim"))]
#[derive(Debug, Default)]
pub struct SequentialIds(std::sync::atomic::AtomicU64);

#[cfg(any(test, feature = "sim"))]
impl SequentialIds {
    /// Begins at a number other than 0: for sources that must not meet.
    #[must_use]
    pub fn starting_at(number: u64) -> Self {
        Self(number.into())
    }
}

#[cfg(any(test, feature = "sim"))]
impl Ids for SequentialIds {
    fn next(&self) -> Uid {
        let number = self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        // Digits first: `Uid::short`, of which host names are made, must differ too.
        let digits: String = number.to_string().chars().rev().collect();
        format!("a{digits:0<23}").parse().expect("a letter and 23 digits are an id")
    }
}
