//! A token bucket: at most so many events at once, and so many each second for long.

use std::time::{Duration, Instant};

/// A bucket of tokens: the time at which it is full. Each token that is taken moves this time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bucket {
    full_at: Instant,
}

impl Bucket {
    /// Creates a full bucket.
    pub(crate) fn full(now: Instant) -> Self {
        Self { full_at: now }
    }

    pub(crate) fn is_full(&self, now: Instant) -> bool {
        self.full_at <= now
    }

    /// Takes a token of a bucket that has at most `burst` tokens, and one more after each `token_time`. Returns `false`
    /// if there is none.
    pub(crate) fn take(&mut self, now: Instant, token_time: Duration, burst: u32) -> bool {
        let full_at = self.full_at.max(now) + token_time;
        let has_token = full_at.duration_since(now) <= token_time * burst;
        if has_token {
            self.full_at = full_at;
        }
        has_token
    }
}
