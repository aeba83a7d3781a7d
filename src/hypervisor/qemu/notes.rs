//! Lines for people that a guest says: few enough that they do not wash the daemon's own out of the log.

use std::time::Duration;

use stead_schemas::names::Uid;
use tokio::time::Instant;

use crate::hypervisor::Noted;

/// Number of lines that a guest may say at once: a boot that goes wrong, a kernel that complains.
const BURST: u32 = 32;
/// Time after which it may say one more.
const REFILL: Duration = Duration::from_secs(10);

pub(super) struct Notes {
    noted: Noted,
    left: u32,
    refilled: Instant,
}

impl Notes {
    pub(super) fn new(noted: Noted) -> Self {
        Self { noted, left: BURST, refilled: Instant::now() }
    }

    /// Passes a line on, or drops it.
    pub(super) fn take(&mut self, owner: &Uid, line: &str) {
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
    async fn a_guest_says_as_much_as_people_read() {
        let said = Arc::new(AtomicU32::new(0));
        let counter = said.clone();
        let mut notes = Notes::new(Arc::new(move |_, _| _ = counter.fetch_add(1, Ordering::Relaxed)));
        let owner = format!("t{:023}", 0).parse().expect("valid");
        (0..1000).for_each(|_| notes.take(&owner, "a line"));
        assert_eq!(said.load(Ordering::Relaxed), BURST);
        tokio::time::advance(REFILL).await;
        (0..1000).for_each(|_| notes.take(&owner, "a line"));
        assert_eq!(said.load(Ordering::Relaxed), BURST + 1);
    }
}
