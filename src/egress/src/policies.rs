//! The table of policies by the address of the guest.
//!
//! Guarantees: a connection reads the policy of its own instance in one step, and never the policy of an
//! instance that gets the same address later; every connection learns of a change and of the removal.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use stead_schemas::egress::Policy;
use stead_schemas::limits::{
    EGRESS_CONNECTIONS_PER_GUEST_MAX, EGRESS_HANDSHAKES_PER_GUEST_MAX, EGRESS_HANDSHAKES_PER_SECOND_MAX,
};
use stead_schemas::names::Uid;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;

use crate::audit::AuditLog;
use crate::authority::{Authority, AuthorityError};
use crate::bucket::Bucket;
use crate::mask::Mask;

/// Time after which a guest may make one more handshake.
const HANDSHAKE_TIME: Duration =
    Duration::from_nanos(1_000_000_000 / EGRESS_HANDSHAKES_PER_SECOND_MAX as u64);

/// A policy in the form that connections use.
#[derive(Debug)]
pub(crate) struct Active {
    pub(crate) policy: Policy,
    pub(crate) authority: Arc<Authority>,
    pub(crate) mask: Mask,
}

/// An instance in the table.
#[derive(Debug)]
struct Entry {
    owner: Uid,
    /// The policy; `None` after the removal.
    active: watch::Sender<Option<Arc<Active>>>,
    log: AuditLog,
    connections: Arc<Semaphore>,
    handshakes: Arc<Semaphore>,
    rate: Mutex<Bucket>,
}

/// The table; it is shared by all listeners.
#[derive(Debug, Default)]
pub struct Policies(RwLock<BTreeMap<IpAddr, Arc<Entry>>>);

impl Policies {
    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<IpAddr, Arc<Entry>>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, BTreeMap<IpAddr, Arc<Entry>>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the policy of an instance; `open` opens the audit log of an instance that has none yet, under any
    /// address. When this returns, new requests use the policy, and connections that it does not allow are being cut.
    ///
    /// # Errors
    /// Fails for an authority that cannot be used; the instance then keeps the policy that it has.
    pub fn put(&self, policy: Policy, open: impl FnOnce() -> AuditLog) -> Result<(), AuthorityError> {
        let address = policy.address.to_canonical();
        let mut all = self.write();
        let entry = all.get(&address).filter(|entry| entry.owner == policy.owner).cloned();
        let before = entry.as_ref().and_then(|entry| entry.active.borrow().clone());
        let authority = match before.map(|active| active.authority.clone()) {
            Some(authority) if authority.is_from(&policy.authority) => authority,
            _ => Arc::new(Authority::read(&policy.authority)?),
        };
        let owner = policy.owner.clone();
        let active = Some(Arc::new(Active { mask: Mask::new(&policy), policy, authority }));
        match entry {
            Some(entry) => drop(entry.active.send_replace(active)),
            None => {
                let log = all.values().find(|entry| entry.owner == owner).map(|entry| entry.log.clone());
                let entry = Entry {
                    owner: owner.clone(),
                    active: watch::Sender::new(active),
                    log: log.unwrap_or_else(open),
                    connections: Arc::new(Semaphore::new(EGRESS_CONNECTIONS_PER_GUEST_MAX)),
                    handshakes: Arc::new(Semaphore::new(EGRESS_HANDSHAKES_PER_GUEST_MAX)),
                    rate: Mutex::new(Bucket::full(Instant::now().into_std())),
                };
                if let Some(other) = all.insert(address, Arc::new(entry)) {
                    other.active.send_replace(None);
                }
            }
        }
        // An instance has one address.
        all.retain(|other, entry| {
            let is_kept = *other == address || entry.owner != owner;
            if !is_kept {
                entry.active.send_replace(None);
            }
            is_kept
        });
        Ok(())
    }

    /// Removes the policy of an instance, if it has one; its connections are cut.
    pub fn remove(&self, owner: &Uid) {
        self.write().retain(|_, entry| {
            if entry.owner == *owner {
                entry.active.send_replace(None);
            }
            entry.owner != *owner
        });
    }

    /// Returns the fingerprint of the policy of an instance, if it has one.
    #[must_use]
    pub fn fingerprint(&self, owner: &Uid) -> Option<String> {
        let all = self.read();
        let entry = all.values().find(|entry| entry.owner == *owner)?;
        entry.active.borrow().as_ref().map(|active| active.policy.fingerprint.clone())
    }

    /// Lists the instances with the fingerprints of their policies.
    #[must_use]
    pub fn list(&self) -> Vec<(Uid, String)> {
        let all = self.read();
        let fingerprint = |entry: &Entry| Some(entry.active.borrow().as_ref()?.policy.fingerprint.clone());
        all.values().filter_map(|entry| Some((entry.owner.clone(), fingerprint(entry)?))).collect()
    }

    /// Returns `true` if an instance has a policy, and thus an audit log.
    #[must_use]
    pub fn contains(&self, owner: &Uid) -> bool {
        self.read().values().any(|entry| entry.owner == *owner)
    }

    /// Returns the policy of the guest with this address.
    pub(crate) fn active(&self, address: IpAddr) -> Option<Arc<Active>> {
        self.read().get(&address.to_canonical())?.active.borrow().clone()
    }

    /// Returns the audit log of the guest with this address.
    pub(crate) fn log(&self, address: IpAddr) -> Option<AuditLog> {
        Some(self.read().get(&address.to_canonical())?.log.clone())
    }

    /// Returns the access of a new connection from this address to its policy.
    pub(crate) fn find(&self, address: IpAddr) -> Option<Lease> {
        let entry = self.read().get(&address.to_canonical())?.clone();
        Some(Lease { active: entry.active.subscribe(), entry })
    }
}

/// The access of one connection to the policy of its instance.
#[derive(Debug, Clone)]
pub(crate) struct Lease {
    active: watch::Receiver<Option<Arc<Active>>>,
    entry: Arc<Entry>,
}

impl Lease {
    /// Returns the policy as it is now, or `None` after its removal.
    pub(crate) fn current(&self) -> Option<Arc<Active>> {
        self.active.borrow().clone()
    }

    /// Waits until the policy is removed or no longer fulfils the condition.
    pub(crate) async fn until_not(&self, is_fulfilled: impl Fn(&Active) -> bool + Send) {
        let mut active = self.active.clone();
        loop {
            // The policy may have changed since the caller read it.
            let holds = active.borrow_and_update().as_ref().is_some_and(|active| is_fulfilled(active));
            if !holds || active.changed().await.is_err() {
                return;
            }
        }
    }

    pub(crate) fn log(&self) -> &AuditLog {
        &self.entry.log
    }

    /// Takes a permit for a connection; returns `None` when the guest has as many as it may.
    pub(crate) fn connection(&self) -> Option<OwnedSemaphorePermit> {
        self.entry.connections.clone().try_acquire_owned().ok()
    }

    /// Takes a permit for the first bytes of a new connection; returns `None` also when there were too many new
    /// connections in the last second.
    pub(crate) fn new_handshake(&self) -> Option<OwnedSemaphorePermit> {
        let permit = self.handshake()?;
        let mut rate = self.entry.rate.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now().into_std();
        rate.take(now, HANDSHAKE_TIME, EGRESS_HANDSHAKES_PER_SECOND_MAX).then_some(permit)
    }

    /// Takes a permit for the first bytes within a connection.
    pub(crate) fn handshake(&self) -> Option<OwnedSemaphorePermit> {
        self.entry.handshakes.clone().try_acquire_owned().ok()
    }
}

#[cfg(test)]
mod tests {
    use stead_schemas::egress::EgressMode;

    use super::*;
    use crate::authority::generate;

    fn uid(letter: char) -> Uid {
        format!("{letter}{:023}", 0).parse().expect("a uid")
    }

    fn policy(owner: char, address: &str, fingerprint: &str) -> Policy {
        Policy {
            owner: uid(owner),
            address: address.parse().expect("an address"),
            mode: EgressMode::All,
            is_observing: false,
            allow_hosts: None,
            credentials: BTreeMap::new(),
            authority: generate().expect("made"),
            fingerprint: fingerprint.to_owned(),
        }
    }

    fn log() -> AuditLog {
        AuditLog::new().0
    }

    fn address(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn fingerprint(lease: &Lease) -> Option<String> {
        lease.current().map(|active| active.policy.fingerprint.clone())
    }

    #[tokio::test]
    async fn a_connection_sees_changes_of_its_own_instance_only() {
        let policies = Policies::default();
        policies.put(policy('a', "10.0.0.2", "1"), log).expect("set");
        let lease = policies.find(address("::ffff:10.0.0.2")).expect("found");
        policies.put(policy('a', "10.0.0.2", "2"), log).expect("set");
        assert_eq!(fingerprint(&lease), Some("2".to_owned()));
        lease.until_not(|active| active.policy.fingerprint == "1").await;
        // Another instance gets the address.
        policies.put(policy('b', "10.0.0.2", "3"), log).expect("set");
        assert_eq!(fingerprint(&lease), None);
        lease.until_not(|_| true).await;
        let other = policies.find(address("10.0.0.2")).expect("found");
        assert_eq!(fingerprint(&other), Some("3".to_owned()));
        assert_eq!(policies.list(), [(uid('b'), "3".to_owned())]);
    }

    #[tokio::test]
    async fn an_instance_has_one_address_and_leaves_nothing_when_it_is_removed() {
        let policies = Policies::default();
        policies.put(policy('a', "10.0.0.2", "1"), log).expect("set");
        policies.put(policy('a', "10.0.0.3", "2"), log).expect("set");
        assert!(policies.find(address("10.0.0.2")).is_none());
        let lease = policies.find(address("10.0.0.3")).expect("found");
        policies.remove(&uid('a'));
        assert!(fingerprint(&lease).is_none() && policies.list().is_empty());
        policies.remove(&uid('a'));
    }

    #[tokio::test]
    async fn an_authority_that_cannot_be_used_leaves_the_policy_as_it_is() {
        let policies = Policies::default();
        policies.put(policy('a', "10.0.0.2", "1"), log).expect("set");
        let mut wrong = policy('a', "10.0.0.2", "2");
        wrong.authority.certificate = "nothing".to_owned();
        policies.put(wrong, log).expect_err("it has no certificate");
        assert_eq!(policies.list(), [(uid('a'), "1".to_owned())]);
    }

    #[tokio::test]
    async fn permits_of_a_guest_are_bounded_and_come_back() {
        let policies = Policies::default();
        policies.put(policy('a', "10.0.0.2", "1"), log).expect("set");
        policies.put(policy('b', "10.0.0.3", "1"), log).expect("set");
        let lease = policies.find(address("10.0.0.2")).expect("found");
        let mut held: Vec<_> = std::iter::from_fn(|| lease.connection()).collect();
        assert_eq!(held.len(), EGRESS_CONNECTIONS_PER_GUEST_MAX);
        assert!(policies.find(address("10.0.0.3")).expect("found").connection().is_some());
        held.pop();
        assert!(lease.connection().is_some());
        assert_eq!(
            std::iter::from_fn(|| lease.handshake()).collect::<Vec<_>>().len(),
            EGRESS_HANDSHAKES_PER_GUEST_MAX
        );
    }

    #[tokio::test(start_paused = true)]
    async fn new_connections_of_a_guest_have_a_rate_of_their_own() {
        let policies = Policies::default();
        policies.put(policy('a', "10.0.0.2", "1"), log).expect("set");
        policies.put(policy('b', "10.0.0.3", "1"), log).expect("set");
        let lease = policies.find(address("10.0.0.2")).expect("found");
        let count = |lease: &Lease| std::iter::from_fn(|| lease.new_handshake().map(drop)).count();
        let most = usize::try_from(EGRESS_HANDSHAKES_PER_SECOND_MAX).expect("small");
        assert_eq!(count(&lease), most);
        // The rate is kept over a change of the policy, and is no other guest's.
        policies.put(policy('a', "10.0.0.2", "2"), log).expect("set");
        assert_eq!(count(&policies.find(address("10.0.0.2")).expect("found")), 0);
        assert_eq!(count(&policies.find(address("10.0.0.3")).expect("found")), most);
        tokio::time::advance(Duration::from_millis(500)).await;
        assert_eq!(count(&lease), most / 2);
        assert!(lease.handshake().is_some(), "a tunnel within a connection is no new connection");
    }

    #[tokio::test]
    async fn an_instance_keeps_its_log_when_its_address_changes() {
        let policies = Policies::default();
        policies.put(policy('a', "10.0.0.2", "1"), log).expect("set");
        assert!(policies.contains(&uid('a')) && !policies.contains(&uid('b')));
        policies.put(policy('a', "10.0.0.3", "2"), || unreachable!("it has a log")).expect("set");
        assert!(policies.log(address("10.0.0.3")).is_some() && policies.log(address("10.0.0.2")).is_none());
        assert!(policies.active(address("10.0.0.3")).is_some());
    }
}
