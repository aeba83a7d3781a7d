//! The pace at which new connections are taken.
//!
//! Guarantees: clients that connect at once are taken in portions with a rest after each. So a request on another
//! connection waits for the first steps of one portion, and not of thousands of connections.
//! Never: delays connections that come one after another.

use std::time::Duration;

use tokio::time::{Instant, sleep};

/// Number of connections in a portion.
const PORTION: u32 = 16;
/// Time in which a portion is too fast: 8,000 connections per second, which is more than two processors serve.
const PORTION_TIME: Duration = Duration::from_millis(2);
/// Rest after such a portion: the runtime's clock is not finer.
const REST: Duration = Duration::from_millis(1);

/// The connections of the present portion.
#[derive(Debug)]
pub(super) struct Arrivals {
    taken: u32,
    since: Instant,
}

impl Arrivals {
    pub(super) fn new() -> Self {
        Self { taken: 0, since: Instant::now() }
    }

    /// Waits until another connection may be taken.
    pub(super) async fn next(&mut self) {
        if self.taken == PORTION {
            if self.since.elapsed() < PORTION_TIME {
                sleep(REST).await;
            }
            *self = Self::new();
        }
        self.taken += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the time for 1,600 connections that come one `apart` from another.
    async fn time_of(apart: Duration) -> Duration {
        let (mut arrivals, begin) = (Arrivals::new(), Instant::now());
        for _ in 0..1600 {
            arrivals.next().await;
            sleep(apart).await;
        }
        begin.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn a_crowd_that_connects_at_once_is_taken_in_portions_and_others_are_not_delayed() {
        assert_eq!(time_of(Duration::ZERO).await, REST * 99);
        assert_eq!(time_of(REST).await, REST * 1600);
    }
}
