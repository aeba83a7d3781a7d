//! Detection of connections over which no data moves, and of heads that do not arrive.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use stead_schemas::limits::EGRESS_HEAD_TIMEOUT;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

/// The state of the requests of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// No byte of the next head has arrived.
    Idle,
    /// Bytes of a head have arrived since this time.
    Reading(Instant),
    /// A request is being answered, or the connection carries no HTTP/1.
    Busy,
}

#[derive(Debug)]
struct State {
    /// The time of the latest byte in either direction.
    moved: Instant,
    phase: Phase,
}

/// The progress of a connection; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Progress {
    state: Arc<Mutex<State>>,
    changed: Arc<Notify>,
}

impl Progress {
    /// Begins with a connection whose first head is awaited.
    pub(crate) fn new() -> Self {
        let now = Instant::now();
        let state = State { moved: now, phase: Phase::Reading(now) };
        Self { state: Arc::new(Mutex::new(state)), changed: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that the guest sent bytes.
    pub(crate) fn note_read(&self) {
        let now = Instant::now();
        let mut state = self.lock();
        state.moved = now;
        if state.phase == Phase::Idle {
            state.phase = Phase::Reading(now);
            drop(state);
            self.changed.notify_one();
        }
    }

    /// Notes that the guest took bytes.
    pub(crate) fn note_write(&self) {
        self.lock().moved = Instant::now();
    }

    /// Notes that a head has arrived, or that no head is awaited.
    pub(crate) fn set_busy(&self) {
        self.lock().phase = Phase::Busy;
    }

    /// Notes that the next head may arrive.
    pub(crate) fn set_idle(&self) {
        self.lock().phase = Phase::Idle;
    }

    /// Waits until no byte was transferred for this long.
    pub(crate) async fn stalled(&self, limit: Duration) {
        loop {
            let end = self.lock().moved + limit;
            if Instant::now() >= end {
                return;
            }
            sleep_until(end).await;
        }
    }

    /// Waits until a head has not arrived within [`EGRESS_HEAD_TIMEOUT`] of its first byte.
    pub(crate) async fn head_late(&self) {
        loop {
            let phase = self.lock().phase;
            let Phase::Reading(since) = phase else {
                self.changed.notified().await;
                continue;
            };
            sleep_until(since + EGRESS_HEAD_TIMEOUT).await;
            if self.lock().phase == phase {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{sleep, timeout};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_stalled_only_when_nothing_moves() {
        let progress = Progress::new();
        for _ in 0..4 {
            assert!(timeout(SECOND * 8, progress.stalled(SECOND * 10)).await.is_err());
            progress.note_write();
        }
        assert!(timeout(SECOND * 11, progress.stalled(SECOND * 10)).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_is_late_however_often_a_byte_of_it_arrives() {
        let progress = Progress::new();
        progress.set_busy();
        assert!(timeout(EGRESS_HEAD_TIMEOUT * 2, progress.head_late()).await.is_err(), "no head is awaited");
        progress.set_idle();
        assert!(timeout(EGRESS_HEAD_TIMEOUT * 2, progress.head_late()).await.is_err(), "no byte has arrived");
        let began = Instant::now();
        let drips = async {
            loop {
                progress.note_read();
                sleep(SECOND).await;
            }
        };
        tokio::select! {
            () = progress.head_late() => {}
            () = drips => {}
        }
        let elapsed = began.elapsed();
        assert!(elapsed >= EGRESS_HEAD_TIMEOUT && elapsed <= EGRESS_HEAD_TIMEOUT + SECOND, "{elapsed:?}");
    }
}
