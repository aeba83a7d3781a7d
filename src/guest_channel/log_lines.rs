//! Lines that a guest writes for people: so few that they do not push the daemon's own lines out of the
//! log.

use std::time::Duration;

use stead_schemas::names::Uid;
use tokio::time::Instant;

use super::Noted;

/// Number of lines that a guest may write at once: enough for a boot that goes wrong or a kernel that
/// complains.
const BURST: u32 = 32;
/// Time after which it may write one more line.
const REFILL: Duration = Duration::from_secs(10);

pub(crate) struct LogLines {
    noted: Noted,
    left: u32,
    refilled: Instant,
}

impl LogLines {
    pub(crate) fn new(noted: Noted) -> Self {
        Self { noted, left: BURST, refilled: Instant::now() }
    }

    /// Passes a line on, or drops it.
    pub(crate) fn take(&mut self, owner: &Uid, line: &str) {
        let since = self.refilled.elapsed();
        let more = u32::try_from(since.as_secs() / REFILL.as_secs()).unwrap_or(BURST);
        if more > 0 {
            self.left = self.left.saturating_add(more).min(BURST);
            self.refilled = Instant::now();
        }
        if let Some(left) = self.left.checked_sub(1) {
            self.left = left;
            (self.noted)(owner, line);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_guest_writes_a_bounded_number_of_lines() {
        let written = Arc::new(AtomicU32::new(0));
        let counter = written.clone();
        let mut lines = LogLines::new(Arc::new(move |_, _| _ = counter.fetch_add(1, Ordering::Relaxed)));
        let owner = format!("t{:023}", 0).parse().expect("valid");
        (0..1000).for_each(|_| lines.take(&owner, "a line"));
        assert_eq!(written.load(Ordering::Relaxed), BURST);
        tokio::time::advance(REFILL).await;
        (0..1000).for_each(|_| lines.take(&owner, "a line"));
        assert_eq!(written.load(Ordering::Relaxed), BURST + 1);
    }
}
