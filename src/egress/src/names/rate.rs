//! Rates of questions: a token bucket for each guest.
//!
//! Guarantees: a guest asks at most [`RATE_BURST`] questions at once and [`RATE_PER_SECOND`] for long; the table has
//! at most [`RATED_GUESTS_MAX`] guests, and a guest that has no room in it may not ask.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::limits::{RATE_BURST, RATE_PER_SECOND, RATED_GUESTS_MAX};
use crate::bucket::Bucket;

/// Time after which a bucket has one more token.
const TOKEN_TIME: Duration = Duration::from_nanos(1_000_000_000 / RATE_PER_SECOND as u64);

/// The buckets of all guests.
#[derive(Debug, Default)]
pub(crate) struct Rates {
    buckets: HashMap<IpAddr, Bucket>,
}

impl Rates {
    /// Takes a token of a guest; returns whether it had one.
    pub(crate) fn take(&mut self, guest: IpAddr, now: Instant) -> bool {
        if !self.buckets.contains_key(&guest) && !self.has_room(now) {
            return false;
        }
        self.buckets.entry(guest).or_insert(Bucket::full(now)).take(now, TOKEN_TIME, RATE_BURST)
    }

    /// Returns whether one more guest fits; forgets full buckets if necessary, which are as good as new ones.
    fn has_room(&mut self, now: Instant) -> bool {
        if self.buckets.len() >= RATED_GUESTS_MAX {
            self.buckets.retain(|_, bucket| !bucket.is_full(now));
        }
        self.buckets.len() < RATED_GUESTS_MAX
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn guest(number: usize) -> IpAddr {
        Ipv4Addr::from(u32::try_from(number).expect("small")).into()
    }

    /// Takes tokens until there is none.
    fn drain(rates: &mut Rates, now: Instant) -> u32 {
        let mut taken = 0;
        while rates.take(guest(1), now) {
            taken += 1;
        }
        taken
    }

    #[test]
    fn a_guest_has_a_burst_and_then_the_rate() {
        let (mut rates, now) = (Rates::default(), Instant::now());
        assert_eq!(drain(&mut rates, now), RATE_BURST);
        assert_eq!(drain(&mut rates, now + Duration::from_secs(1)), RATE_PER_SECOND);
        assert_eq!(drain(&mut rates, now + Duration::from_secs(2)), RATE_PER_SECOND);
        assert_eq!(drain(&mut rates, now + Duration::from_secs(3600)), RATE_BURST);
    }

    #[test]
    fn a_guest_that_goes_on_asking_still_gets_its_rate() {
        let (mut rates, now) = (Rates::default(), Instant::now());
        drain(&mut rates, now);
        let steps = (1..=1000).map(|step| now + Duration::from_millis(step));
        let allowed = steps.filter(|at| rates.take(guest(1), *at)).count();
        assert_eq!(allowed, RATE_PER_SECOND as usize);
    }

    #[test]
    fn guests_have_buckets_of_their_own() {
        let (mut rates, now) = (Rates::default(), Instant::now());
        drain(&mut rates, now);
        assert!(rates.take(guest(2), now));
    }

    #[test]
    fn the_table_is_bounded_and_forgets_only_full_buckets() {
        let (mut rates, now) = (Rates::default(), Instant::now());
        drain(&mut rates, now);
        for number in 2..=RATED_GUESTS_MAX {
            assert!(rates.take(guest(number), now), "{number}");
        }
        assert!(!rates.take(guest(0), now), "a full table takes nobody");
        let later = now + TOKEN_TIME;
        assert!(rates.take(guest(0), later), "the others are full again");
        assert_eq!(rates.buckets.len(), 2);
        assert!(rates.take(guest(1), later) && !rates.take(guest(1), later), "the drained bucket was kept");
    }
}
