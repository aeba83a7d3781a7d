//! Hosts that the proxy resolves: the addresses of a host that it may dial for a guest.
//!
//! Guarantees: every returned address passed the filter at this moment, so the proxy dials what was checked and never
//! resolves a second time.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use stead_schemas::egress::HostName;

use super::answer::Key;
use super::guard::address_of;
use super::host::name_of;
use super::limits::LOCAL_TTL_SECS;
use super::report::Reason;
use super::resolver::{Asked, Checked, Resolver};
use super::rules::{Decision, Guest};

/// The addresses of a host, at least one, and the time for which they are valid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    pub addresses: Vec<IpAddr>,
    pub ttl: Duration,
}

/// The reason why a host has no addresses to dial.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    #[error("the address is that of no guest")]
    NotAGuest,
    #[error("the policy does not allow the name: {}", .0.as_str())]
    NotAllowed(Reason),
    #[error("the host does not exist")]
    NoSuchHost,
    #[error("the host has no IPv4 address")]
    NoAddress,
    #[error("the host has only addresses that must not be reached, such as {0}")]
    Denied(IpAddr),
    #[error("too many questions wait for an upstream resolver")]
    TooManyWaiting,
    #[error("no upstream resolver answered")]
    Unanswered,
}

impl Resolver {
    /// Returns the IPv4 addresses of a host that a guest may reach.
    ///
    /// # Errors
    /// Fails if the guest may not use the host, the host has no such address, or nobody answers in time.
    pub async fn resolve(self: &Arc<Self>, guest: IpAddr, host: &HostName) -> Result<Resolved, ResolveError> {
        self.counters().resolutions.add_one();
        let rights = self.guest(guest).ok_or(ResolveError::NotAGuest)?;
        let name = name_of(host).ok_or(ResolveError::NotAllowed(Reason::NotAHost))?;
        let key = Key { name, record_type: RecordType::A };
        match self.decide(guest, &rights, &key) {
            Decision::Forward => self.resolve_outside(guest, &rights, key).await,
            Decision::Answer(data) => self.local(guest, data.ip_addr()),
            Decision::Empty => Err(ResolveError::NoAddress),
            Decision::NoSuchName(reason) | Decision::Refuse(reason) => Err(ResolveError::NotAllowed(reason)),
        }
    }

    /// Checks an address of the caller's tables: a name by which it is known gives no right to dial it.
    fn local(&self, guest: IpAddr, address: Option<IpAddr>) -> Result<Resolved, ResolveError> {
        let address = address.ok_or(ResolveError::NoAddress)?;
        if !self.may_reach(guest, address) {
            return Err(ResolveError::Denied(address));
        }
        Ok(Resolved { addresses: vec![address], ttl: Duration::from_secs(LOCAL_TTL_SECS.into()) })
    }

    async fn resolve_outside(
        self: &Arc<Self>,
        guest: IpAddr,
        rights: &Guest,
        key: Key,
    ) -> Result<Resolved, ResolveError> {
        let asked = Asked { guest, is_mediated: matches!(rights, Guest::Mediated(_)), key };
        let (answer, left) = match self.cached(&asked.key) {
            Some(cached) => cached,
            None => {
                let share = self.share(&asked).ok_or(ResolveError::TooManyWaiting)?;
                self.ask(&asked, share).await
            }
        };
        let Checked { code, records, denied } = self.check(&asked, &answer, left);
        let addresses: Vec<IpAddr> = records.iter().filter_map(address_of).collect();
        match (code, denied) {
            (_, Some(address)) => Err(ResolveError::Denied(address)),
            (ResponseCode::NoError, None) if addresses.is_empty() => Err(ResolveError::NoAddress),
            (ResponseCode::NoError, None) => Ok(Resolved { addresses, ttl: left }),
            (ResponseCode::NXDomain, None) => Err(ResolveError::NoSuchHost),
            _ => Err(ResolveError::Unanswered),
        }
    }
}
