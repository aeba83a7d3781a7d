//! Delays of refusals: a client that is refused without pause gets its answers later.
//!
//! Guarantees: a client that repeats wrong requests as fast as it can costs little, and delays no other. Only
//! refusals are delayed, never an answer with success. The table is bounded.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::peers::client_of;

/// Time per refusal that a client gets without a delay, on average: 200 refusals per second.
const REFUSAL_EACH: Duration = Duration::from_millis(5);
/// Time in advance that a client may use at once: 400 refusals. Programs that try names one after another stay below.
const BURST: Duration = Duration::from_secs(2);
/// Longest delay of one refusal. A client with many connections cannot make itself wait longer.
const DELAY_MAX: Duration = Duration::from_secs(1);
/// Number of clients that have an entry of their own. Further clients share one entry.
const CLIENTS_MAX: usize = 4096;
/// Entry that clients share when the table is full.
const OTHERS: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);

/// The time by which each client has used up its refusals.
#[derive(Debug, Default)]
pub(super) struct Refusals(Mutex<BTreeMap<IpAddr, Instant>>);

impl Refusals {
    /// Counts a refusal of this client. Returns the time by which its answer is delayed.
    pub(super) fn count(&self, client: IpAddr, now: Instant) -> Duration {
        let mut used = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut client = client_of(client);
        if used.len() >= CLIENTS_MAX && !used.contains_key(&client) {
            used.retain(|_, until| *until > now);
            if used.len() >= CLIENTS_MAX {
                client = OTHERS;
            }
        }
        let until = used.entry(client).or_insert(now);
        *until = (*until).max(now).min(now + BURST + DELAY_MAX) + REFUSAL_EACH;
        until.saturating_duration_since(now + BURST).min(DELAY_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(number: u32) -> IpAddr {
        IpAddr::V4(number.into())
    }

    #[test]
    fn a_client_that_is_refused_without_pause_is_delayed_and_no_other() {
        let (refusals, start) = (Refusals::default(), Instant::now());
        assert!((0..400).all(|_| refusals.count(address(1), start).is_zero()), "a burst");
        let delays: Vec<_> = (0..1000).map(|_| refusals.count(address(1), start)).collect();
        assert!(delays.is_sorted() && !delays[0].is_zero());
        assert_eq!(delays[999], DELAY_MAX);
        assert!(refusals.count(address(2), start).is_zero());
        // However many there were, the delays are over soon after the last one.
        assert!(refusals.count(address(1), start + DELAY_MAX + BURST).is_zero());
    }

    #[test]
    fn a_client_that_stays_below_the_rate_is_never_delayed() {
        let (refusals, start) = (Refusals::default(), Instant::now());
        let at = |number: u32| start + REFUSAL_EACH * number;
        assert!((0..5000).all(|number| refusals.count(address(1), at(number)).is_zero()));
    }

    #[test]
    fn a_full_table_forgets_who_is_not_delayed_and_then_shares_an_entry() {
        let (refusals, start) = (Refusals::default(), Instant::now());
        let most = u32::try_from(CLIENTS_MAX).expect("small");
        for number in 0..2 * most {
            refusals.count(address(number), start);
        }
        assert!(refusals.0.lock().expect("not poisoned").len() <= CLIENTS_MAX + 1);
        assert!(!refusals.count(address(3 * most), start).is_zero(), "the shared entry is used up");
        refusals.count(address(3 * most), start + BURST * 10);
        assert_eq!(refusals.0.lock().expect("not poisoned").len(), 1);
    }
}
