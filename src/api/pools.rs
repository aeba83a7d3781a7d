//! Bounds of concurrent requests, one pool for each way in which a request takes time.
//!
//! Guarantees: requests of one pool never block those of another, and requests by tokens of one subject
//! never take more than half of a pool.

use std::sync::Arc;

use stead_schemas::names::Uid;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::ApiError;
use crate::peers::{Share, Shares};

/// Largest number of sessions of one subject at one instance: half of what its agent serves concurrently.
const SESSIONS_OF_INSTANCE_MAX: usize = 128;

/// The pools, named by what a request waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pool {
    /// The request waits for the rest of its own body.
    Bodies,
    /// The request needs only this process and its store.
    Short,
    /// The request waits for a state that may come late, as `GET /instances/{id}/wait` does.
    Waits,
    /// The request waits for work of the host or a guest.
    Verbs,
    /// The request streams to a client a response without an end of its own.
    Streams,
    /// A session of exec or cp, which outlives its request.
    Sessions,
}

/// The permits of one pool.
#[derive(Debug)]
struct Permits {
    all: Arc<Semaphore>,
    shares: Arc<Shares<Arc<str>>>,
}

impl Permits {
    fn of(most: usize) -> Self {
        Self { all: Arc::new(Semaphore::new(most)), shares: Shares::new(most.div_ceil(2)) }
    }
}

/// A permit, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Permit {
    _permit: OwnedSemaphorePermit,
    _share: Share<Arc<str>>,
}

/// The permits of all pools.
#[derive(Debug)]
pub(super) struct Pools {
    bodies: Permits,
    short: Permits,
    waits: Permits,
    verbs: Permits,
    streams: Permits,
    sessions: Permits,
    sessions_of_instance: Arc<Shares<(Arc<str>, Uid)>>,
}

impl Pools {
    /// Makes the pools: `most` permits each, and so many sessions.
    pub(super) fn new(most: usize, sessions: usize) -> Self {
        let pool = || Permits::of(most);
        Self {
            bodies: pool(),
            short: pool(),
            waits: pool(),
            verbs: pool(),
            streams: pool(),
            sessions: Permits::of(sessions),
            sessions_of_instance: Shares::new(SESSIONS_OF_INSTANCE_MAX),
        }
    }

    /// Takes a permit for a request by a token of this subject.
    pub(super) fn take(&self, pool: Pool, subject: &Arc<str>) -> Result<Permit, ApiError> {
        let (permits, what) = match pool {
            Pool::Bodies => (&self.bodies, "requests are being sent"),
            Pool::Short => (&self.short, "requests are being answered"),
            Pool::Waits => (&self.waits, "requests wait for a state"),
            Pool::Verbs => (&self.verbs, "verbs are carried out"),
            Pool::Streams => (&self.streams, "watches and logs are followed"),
            Pool::Sessions => (&self.sessions, "sessions of exec and cp are open"),
        };
        let own = || ApiError::overloaded(&format!("too many {what} at once for {subject:?}"));
        let share = permits.shares.take(subject).ok_or_else(own)?;
        let all = |_| ApiError::overloaded(&format!("too many {what} at once"));
        let permit = permits.all.clone().try_acquire_owned().map_err(all)?;
        Ok(Permit { _permit: permit, _share: share })
    }
}

/// A permit for a session at an instance, given back when it is dropped.
#[derive(Debug)]
pub(super) struct SessionPermit {
    _permit: Permit,
    _share: Share<(Arc<str>, Uid)>,
}

impl Pools {
    /// Takes a permit for a session, by a token of this subject, at this instance.
    pub(super) fn session(&self, instance: &Uid, subject: &Arc<str>) -> Result<SessionPermit, ApiError> {
        let own =
            || ApiError::overloaded(&format!("too many sessions at this instance at once for {subject:?}"));
        let share = self.sessions_of_instance.take(&(subject.clone(), instance.clone())).ok_or_else(own)?;
        Ok(SessionPermit { _permit: self.take(Pool::Sessions, subject)?, _share: share })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_subject_leaves_half_of_each_pool_to_the_others() {
        let pools = Pools::new(4, 2);
        let (greedy, other): (Arc<str>, Arc<str>) = ("greedy".into(), "other".into());
        let mut held = Vec::new();
        while let Ok(permit) = pools.take(Pool::Waits, &greedy) {
            held.push(permit);
        }
        assert_eq!(held.len(), 2);
        held.push(pools.take(Pool::Sessions, &greedy).expect("another pool"));
        assert!(pools.take(Pool::Sessions, &greedy).is_err());
        held.push(pools.take(Pool::Sessions, &other).expect("left for others"));
        held.push(pools.take(Pool::Waits, &other).expect("left for others"));
        held.push(pools.take(Pool::Waits, &other).expect("left for others"));
        assert!(pools.take(Pool::Waits, &"third".into()).is_err(), "all are taken");
        held.clear();
        pools.take(Pool::Waits, &greedy).expect("given back");
    }
}
