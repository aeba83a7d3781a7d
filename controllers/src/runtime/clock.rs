//! Sources of time and identity that are given from outside, so that a seed determines a run.
//!
//! Waiting uses `tokio::time` (virtual in tests); the wall clock and new ids come from these two ports.

use std::time::Duration;

use jiff::Timestamp;
use stead_schemas::names::Uid;

/// The wall clock. It is only for times that are stored and shown, never for waiting.
pub trait Clock: Send + Sync + 'static {
    fn now(&self) -> Timestamp;
    /// Returns the time since an arbitrary start, by a clock that is never set. Steps of the wall clock are
    /// detected with it.
    fn elapsed(&self) -> Duration;
}

/// A source of new object ids.
pub trait Ids: Send + Sync + 'static {
    fn next(&self) -> Uid;
}

/// A clock that follows `tokio::time`: it is virtual where that is paused.
#[cfg(any(test, feature = "sim"))]
#[derive(Debug, Clone)]
pub struct TokioClock {
    start: tokio::time::Instant,
    epoch: Timestamp,
}

#[cfg(any(test, feature = "sim"))]
impl TokioClock {
    /// Creates a clock that shows `epoch` now.
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

/// A source of ids in order: `a00...0`, `a00...1`.
#[cfg(any(test, feature = "sim"))]
#[derive(Debug, Default)]
pub struct SequentialIds(std::sync::atomic::AtomicU64);

#[cfg(any(test, feature = "sim"))]
impl SequentialIds {
    /// Creates a source that begins at another number than 0, for sources whose ids must differ.
    #[must_use]
    pub fn starting_at(number: u64) -> Self {
        Self(number.into())
    }
}

#[cfg(any(test, feature = "sim"))]
impl Ids for SequentialIds {
    fn next(&self) -> Uid {
        let number = self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        // The varying digits come first: `Uid::short`, which is part of host names, must differ too.
        let digits: String = number.to_string().chars().rev().collect();
        format!("a{digits:0<23}").parse().expect("a letter and 23 digits are an id")
    }
}
