//! Shares of a limited resource: each key may take up to a fixed number.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A table of how many shares each key has.
#[derive(Debug)]
pub(crate) struct Shares<K: Ord> {
    most: usize,
    taken: Mutex<BTreeMap<K, usize>>,
}

/// A share, taken as long as this lives.
#[derive(Debug)]
pub(crate) struct Share<K: Ord> {
    shares: Arc<Shares<K>>,
    of: K,
}

impl<K: Ord + Clone> Shares<K> {
    pub(crate) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, taken: Mutex::default() })
    }

    /// Takes a share; returns `None` when this key has as many as it may.
    pub(crate) fn take(self: &Arc<Self>, of: &K) -> Option<Share<K>> {
        let mut taken = self.lock();
        let has = taken.get(of).copied().unwrap_or(0);
        if has >= self.most {
            return None;
        }
        taken.insert(of.clone(), has + 1);
        Some(Share { shares: self.clone(), of: of.clone() })
    }
}

impl<K: Ord> Shares<K> {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<K, usize>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
impl<K: Ord> Shares<K> {
    pub(crate) fn has_any(&self, of: &K) -> bool {
        self.lock().contains_key(of)
    }
}

impl<K: Ord> Drop for Share<K> {
    fn drop(&mut self) {
        let mut taken = self.shares.lock();
        match taken.get_mut(&self.of) {
            Some(has) if *has > 1 => *has -= 1,
            _ => drop(taken.remove(&self.of)),
        }
    }
}

/// Returns the client that an address stands for: an IPv6 network of 64 bits belongs to one client, which
/// has all addresses in it.
pub(crate) fn client_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_one_has_its_share_and_what_is_given_back_can_be_taken_again() {
        let shares = Shares::new(2);
        let first = shares.take(&"a").expect("the first");
        let second = shares.take(&"a").expect("the second");
        assert!(shares.take(&"a").is_none());
        drop(shares.take(&"b").expect("somebody else's"));
        drop(first);
        let again = shares.take(&"a").expect("free again");
        drop((second, again));
        assert!(shares.lock().is_empty());
    }

    #[test]
    fn an_ipv6_network_is_one_client() {
        let client = |text: &str| client_of(text.parse().expect("valid"));
        assert_eq!(client("2001:db8:0:1::1"), client("2001:db8:0:1:ffff::9"));
        assert_ne!(client("2001:db8:0:1::1"), client("2001:db8:0:2::1"));
        assert_eq!(client("::ffff:10.0.0.1"), client("10.0.0.1"));
        assert_ne!(client("10.0.0.1"), client("10.0.0.2"));
    }
}
