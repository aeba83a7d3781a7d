//! The host's wall clock and random ids.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use cuid2::CuidConstructor;
use jiff::Timestamp;
use stead_controllers::runtime::{Clock, Ids};
use stead_schemas::limits::UID_BYTES;
use stead_schemas::names::Uid;

/// The host's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    fn elapsed(&self) -> Duration {
        static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);
        BEGAN.elapsed()
    }
}

/// The source of random ids: CUID2, as on the wire.
#[derive(Debug, Clone, Copy, Default)]
pub struct CuidIds;

impl Ids for CuidIds {
    fn next(&self) -> Uid {
        let length = u16::try_from(UID_BYTES).expect("an id is short");
        let id = CuidConstructor::new().with_length(length).create_id();
        id.parse().expect("a CUID2 is a letter and lower-case letters and digits, of the asked length")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn ids_are_well_formed_and_differ() {
        let ids: BTreeSet<_> = (0..1000).map(|_| CuidIds.next()).collect();
        assert_eq!(ids.len(), 1000);
    }
}
