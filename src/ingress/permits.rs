//! Permits of requests to instances: a total number, and shares of it for one instance, for the rules of one
//! ingress, and for one client.

use std::net::IpAddr;
use std::sync::Arc;

use stead_schemas::limits::{
    INGRESS_EXCHANGES_MAX, INGRESS_EXCHANGES_PER_CLIENT_MAX, INGRESS_EXCHANGES_PER_OWNER_MAX,
    INGRESS_EXCHANGES_PER_TARGET_MAX,
};
use stead_schemas::names::Uid;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::peers::{Share, Shares, client_of};

#[derive(Debug)]
pub(super) struct Permits {
    all: Arc<Semaphore>,
    targets: Arc<Shares<Uid>>,
    owners: Arc<Shares<Uid>>,
    clients: Arc<Shares<IpAddr>>,
}

/// A permit, held as long as the value lives.
#[derive(Debug)]
pub(super) struct Permit {
    _all: OwnedSemaphorePermit,
    _target: Share<Uid>,
    _owner: Share<Uid>,
    _client: Share<IpAddr>,
}

impl Default for Permits {
    fn default() -> Self {
        Self {
            all: Arc::new(Semaphore::new(INGRESS_EXCHANGES_MAX)),
            targets: Shares::new(INGRESS_EXCHANGES_PER_TARGET_MAX),
            owners: Shares::new(INGRESS_EXCHANGES_PER_OWNER_MAX),
            clients: Shares::new(INGRESS_EXCHANGES_PER_CLIENT_MAX),
        }
    }
}

impl Permits {
    /// Takes a permit; returns `None` when there are too many requests, in total or of one of these.
    pub(super) fn take(&self, target: &Uid, owner: &Uid, client: IpAddr) -> Option<Permit> {
        Some(Permit {
            _client: self.clients.take(&client_of(client))?,
            _target: self.targets.take(target)?,
            _owner: self.owners.take(owner)?,
            _all: self.all.clone().try_acquire_owned().ok()?,
        })
    }
}

#[cfg(test)]
impl Permits {
    pub(super) fn is_taken(&self, target: &Uid) -> bool {
        self.targets.has_any(target)
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn uid(number: usize) -> Uid {
        format!("t{number:023}").parse().expect("valid")
    }

    fn client(number: usize) -> IpAddr {
        Ipv4Addr::from(u32::try_from(number).expect("small")).into()
    }

    /// Takes permits until one is refused; `ask` returns the keys of each request by its number.
    fn held(permits: &Permits, ask: impl Fn(usize) -> (Uid, Uid, IpAddr)) -> Vec<Permit> {
        let one = |number| {
            let (target, owner, client) = ask(number);
            permits.take(&target, &owner, client)
        };
        (0..2 * INGRESS_EXCHANGES_MAX).map_while(one).collect()
    }

    #[test]
    fn nobody_has_more_than_a_share_and_all_together_no_more_than_there_is() {
        let permits = Permits::default();
        let client_held = held(&permits, |number| (uid(number), uid(number), client(1)));
        assert_eq!(client_held.len(), INGRESS_EXCHANGES_PER_CLIENT_MAX);
        drop(client_held);
        let target_held = held(&permits, |number| (uid(0), uid(number), client(number)));
        assert_eq!(target_held.len(), INGRESS_EXCHANGES_PER_TARGET_MAX);
        drop(target_held);
        let owner_held = held(&permits, |number| (uid(number), uid(0), client(number)));
        assert_eq!(owner_held.len(), INGRESS_EXCHANGES_PER_OWNER_MAX);
        drop(owner_held);
        let all = held(&permits, |number| (uid(number), uid(number), client(number)));
        assert_eq!(all.len(), INGRESS_EXCHANGES_MAX);
        assert!(permits.is_taken(&uid(1)));
        drop(all);
        assert!(!permits.is_taken(&uid(1)));
        assert!(permits.take(&uid(0), &uid(0), client(1)).is_some());
    }
}
