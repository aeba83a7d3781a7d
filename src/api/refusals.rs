//! Delays of refusals: a client that is refused without pause gets its answers later.
//!
//! Guarantees: a client that repeats wrong requests as fast as it can costs little, and delays no other. Only
//! refusals are delayed, never an answer with success. The table is bounded.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::client::Origin;

/// Time per refusal that a client gets without a delay, on average: 200 refusals per second.
const REFUSAL_EACH: Duration = Duration::from_millis(5);
/// Time in advance that a client may use at once: 400 refusals. Programs that try names one after another stay below.
const BURST: Duration = Duration::from_secs(2);
/// Longest delay of one refusal. A client with many connections cannot make itself wait longer.
const DELAY_MAX: Duration = Duration::from_secs(1);
/// Number of refusals of one client that are delayed at the same time. Further ones are sent at once and close their
/// connection: a delayed refusal keeps its connection busy, and busy connections make no room for others.
const DELAYED_MAX: usize = 16;
/// Number of clients that have an entry of their own. Further clients share one entry.
const CLIENTS_MAX: usize = 4096;
/// Entry that clients share when the table is full.
const OTHERS: Origin = Origin::Network(IpAddr::V6(Ipv6Addr::UNSPECIFIED));

/// The refusals of all clients.
#[derive(Debug, Default)]
pub(super) struct Refusals(Mutex<BTreeMap<Origin, Client>>);

#[derive(Debug)]
struct Client {
    /// Time by which the client has used up its refusals.
    until: Instant,
    /// Number of its refusals that are being delayed.
    delayed: usize,
}

/// The way in which a refusal is sent.
#[derive(Debug)]
pub(super) enum Sending {
    AtOnce,
    /// The refusal is sent after this time. The value is kept until then.
    After(Duration, Delayed),
    /// The refusal is sent at once and ends its connection.
    Closing,
}

/// A refusal that is being delayed.
#[derive(Debug)]
pub(super) struct Delayed {
    refusals: Arc<Refusals>,
    client: Origin,
}

impl Drop for Delayed {
    fn drop(&mut self) {
        if let Some(client) = self.refusals.lock().get_mut(&self.client) {
            client.delayed = client.delayed.saturating_sub(1);
        }
    }
}

impl Refusals {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Origin, Client>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a refusal of this client. Returns the way in which it is sent.
    pub(super) fn count(self: &Arc<Self>, client: Origin, now: Instant) -> Sending {
        let mut clients = self.lock();
        let mut origin = client;
        if clients.len() >= CLIENTS_MAX && !clients.contains_key(&origin) {
            clients.retain(|_, client| client.until > now || client.delayed > 0);
            if clients.len() >= CLIENTS_MAX {
                origin = OTHERS;
            }
        }
        let client = clients.entry(origin).or_insert(Client { until: now, delayed: 0 });
        client.until = client.until.max(now).min(now + BURST + DELAY_MAX) + REFUSAL_EACH;
        let delay = client.until.saturating_duration_since(now + BURST).min(DELAY_MAX);
        if delay.is_zero() {
            return Sending::AtOnce;
        }
        if client.delayed >= DELAYED_MAX {
            return Sending::Closing;
        }
        client.delayed += 1;
        Sending::After(delay, Delayed { refusals: self.clone(), client: origin })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(number: u32) -> Origin {
        Origin::Network(IpAddr::V4(number.into()))
    }

    fn is_at_once(sending: &Sending) -> bool {
        matches!(sending, Sending::AtOnce)
    }

    #[test]
    fn a_client_that_is_refused_without_pause_is_delayed_and_no_other() {
        let (refusals, start) = (Arc::<Refusals>::default(), Instant::now());
        assert!((0..400).all(|_| is_at_once(&refusals.count(address(1), start))), "a burst");
        let delays: Vec<_> = (0..1000)
            .map(|_| match refusals.count(address(1), start) {
                Sending::After(delay, _) => delay,
                other => panic!("{other:?}"),
            })
            .collect();
        assert!(delays.is_sorted() && !delays[0].is_zero());
        assert_eq!(delays[999], DELAY_MAX);
        assert!(is_at_once(&refusals.count(address(2), start)));
        // However many there were, the delays are over soon after the last one.
        assert!(is_at_once(&refusals.count(address(1), start + DELAY_MAX + BURST)));
    }

    #[test]
    fn few_refusals_of_a_client_are_delayed_at_the_same_time_and_further_ones_close_their_connections() {
        let (refusals, start) = (Arc::<Refusals>::default(), Instant::now());
        let mut held: Vec<_> = (0..1000).map(|_| refusals.count(address(1), start)).collect();
        let delayed = |held: &[Sending]| held.iter().filter(|one| matches!(one, Sending::After(..))).count();
        assert_eq!(delayed(&held), DELAYED_MAX);
        assert!(matches!(held.last(), Some(Sending::Closing)));
        held.clear();
        assert!(matches!(refusals.count(address(1), start), Sending::After(..)), "permits come back");
    }

    #[test]
    fn a_client_that_stays_below_the_rate_is_never_delayed() {
        let (refusals, start) = (Arc::<Refusals>::default(), Instant::now());
        let at = |number: u32| start + REFUSAL_EACH * number;
        assert!((0..5000).all(|number| is_at_once(&refusals.count(address(1), at(number)))));
    }

    #[test]
    fn a_full_table_forgets_who_is_not_delayed_and_then_shares_an_entry() {
        let (refusals, start) = (Arc::<Refusals>::default(), Instant::now());
        let most = u32::try_from(CLIENTS_MAX).expect("small");
        for number in 0..2 * most {
            refusals.count(address(number), start);
        }
        assert!(refusals.lock().len() <= CLIENTS_MAX + 1);
        assert!(!is_at_once(&refusals.count(address(3 * most), start)), "the shared entry is used up");
        refusals.count(address(3 * most), start + BURST * 10);
        assert_eq!(refusals.lock().len(), 1);
    }
}
