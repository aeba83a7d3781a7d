//! A pace for requests that are woken by the same changes: the more of them wait, the longer each rests.
//!
//! Guarantees: however many requests wait and however often something changes, all of them together are woken a
//! bounded number of times per second. So a crowd of waiting clients does not delay the requests of others.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Rest of a request for each request that waits beside it. All together are woken 20,000 times per second at most,
/// which costs a tenth of a processor.
const REST_EACH: Duration = Duration::from_micros(50);
/// Shortest rest that is kept: the runtime's clock is not finer. Fewer than 20 requests are never delayed.
const REST_MIN: Duration = Duration::from_millis(1);

/// The requests that are woken by the same changes.
#[derive(Debug, Default)]
pub(super) struct Pace(AtomicU32);

/// A request among them.
#[derive(Debug)]
pub(super) struct Participant(Arc<Pace>);

impl Pace {
    pub(super) fn join(self: &Arc<Self>) -> Participant {
        self.0.fetch_add(1, Ordering::Relaxed);
        Participant(self.clone())
    }
}

impl Participant {
    /// True if no other request waits for the same changes.
    pub(super) fn is_last(&self) -> bool {
        self.0.0.load(Ordering::Relaxed) == 1
    }

    /// Rests after the changes so far were handled. Changes that come meanwhile are handled together.
    pub(super) async fn rest(&self) {
        let rest = REST_EACH * self.0.0.load(Ordering::Relaxed);
        if rest >= REST_MIN {
            tokio::time::sleep(rest).await;
        }
    }
}

impl Drop for Participant {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::watch;
    use tokio::task::JoinSet;

    use super::*;

    /// Lets requests wait for a value that changes every millisecond for a second. Returns how often they were woken.
    async fn woken(requests: usize) -> usize {
        let (pace, values) = (Arc::<Pace>::default(), watch::Sender::new(0));
        let mut tasks = JoinSet::new();
        for _ in 0..requests {
            let (participant, mut value) = (pace.join(), values.subscribe());
            tasks.spawn(async move {
                let mut times = 0;
                while *value.borrow_and_update() < 1000 {
                    participant.rest().await;
                    value.changed().await.expect("it goes on");
                    times += 1;
                }
                times
            });
        }
        for number in 1..=1000 {
            tokio::time::sleep(Duration::from_millis(1)).await;
            values.send_replace(number);
        }
        tasks.join_all().await.into_iter().sum()
    }

    #[tokio::test(start_paused = true)]
    async fn a_crowd_is_woken_no_more_often_than_a_few_are_and_a_single_request_each_time() {
        assert_eq!(woken(1).await, 1000);
        for crowd in [200, 1000] {
            let times = woken(crowd).await;
            assert!((crowd..25_000).contains(&times), "{crowd} were woken {times} times");
        }
    }
}
