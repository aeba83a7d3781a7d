//! Bounds of what goes on at once, one for each way in which a request takes its time.
//!
//! Guarantees: requests of one pool never keep those of another out.

use tokio::sync::{Semaphore, SemaphorePermit};

use super::ApiError;

/// What a request waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pool {
    /// The rest of its own body.
    Bodies,
    /// Nothing but this process and its store.
    Short,
    /// A state that may come late, as `GET /instances/{id}/wait` does.
    Waits,
    /// What the host or a guest does for it.
    Verbs,
}

/// The permits of all pools.
#[derive(Debug)]
pub(super) struct Pools {
    bodies: Semaphore,
    short: Semaphore,
    waits: Semaphore,
    verbs: Semaphore,
}

impl Pools {
    /// Each of so many permits.
    pub(super) fn new(most: usize) -> Self {
        let pool = || Semaphore::new(most);
        Self { bodies: pool(), short: pool(), waits: pool(), verbs: pool() }
    }

    pub(super) fn take(&self, pool: Pool) -> Result<SemaphorePermit<'_>, ApiError> {
        let (semaphore, message) = match pool {
            Pool::Bodies => (&self.bodies, "too many requests are being sent at once"),
            Pool::Short => (&self.short, "too many requests at once"),
            Pool::Waits => (&self.waits, "too many requests wait for a state at once"),
            Pool::Verbs => (&self.verbs, "too many verbs are carried out at once"),
        };
        semaphore.try_acquire().map_err(|_| ApiError::overloaded(message))
    }
}
