//! Shares of a limited resource: each guest may have a fixed number of something, and all of them together too.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The shares that are taken.
#[derive(Debug)]
pub(crate) struct Shares {
    per_guest_max: usize,
    all_max: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    /// Guests have at least one share, so that there are no more of them than shares.
    by_guest: HashMap<IpAddr, usize>,
    all: usize,
}

/// A share, taken as long as this lives.
#[derive(Debug)]
pub(crate) struct Share {
    shares: Arc<Shares>,
    guest: IpAddr,
}

impl Shares {
    pub(crate) fn new(per_guest_max: usize, all_max: usize) -> Arc<Self> {
        Arc::new(Self { per_guest_max, all_max, taken: Mutex::default() })
    }

    /// Takes a share; returns `None` when the guest, or all of them, have as many as they may.
    pub(crate) fn take(self: &Arc<Self>, guest: IpAddr) -> Option<Share> {
        let mut taken = self.lock();
        let has = taken.by_guest.get(&guest).copied().unwrap_or(0);
        if has >= self.per_guest_max || taken.all >= self.all_max {
            return None;
        }
        taken.by_guest.insert(guest, has + 1);
        taken.all += 1;
        Some(Share { shares: self.clone(), guest })
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut taken = self.shares.lock();
        taken.all -= 1;
        match taken.by_guest.get_mut(&self.guest) {
            Some(has) if *has > 1 => *has -= 1,
            _ => drop(taken.by_guest.remove(&self.guest)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn guest(number: u8) -> IpAddr {
        Ipv4Addr::new(10, 100, 0, number).into()
    }

    #[test]
    fn a_guest_has_no_more_than_its_share_and_all_have_no_more_than_there_is() {
        let shares = Shares::new(2, 3);
        let first = shares.take(guest(1)).expect("the first");
        let second = shares.take(guest(1)).expect("the second");
        assert!(shares.take(guest(1)).is_none());
        let third = shares.take(guest(2)).expect("of another guest");
        assert!(shares.take(guest(3)).is_none(), "there are three");
        drop(first);
        let again = shares.take(guest(3)).expect("one is free again");
        drop((second, third, again));
        let taken = shares.lock();
        assert!(taken.by_guest.is_empty() && taken.all == 0);
    }
}
