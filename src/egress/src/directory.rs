//! The guests of the resolver: those that have a policy.
//!
//! Guarantees: a name is answered to a guest, and resolved for its connections, by the policy that it has at this moment;
//! an address without a policy is answered nothing.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use stead_schemas::egress::HostName;
use stead_schemas::network::Cidr;

use crate::names::{AllowedHosts, Directory, Guest, Reason, ResolveError, Resolver};
use crate::policies::{Active, Policies};
use crate::upstream::{Addresses, Names, NamesError};

/// The guests with policies.
#[derive(Debug)]
pub(crate) struct Guests {
    pub(crate) policies: Arc<Policies>,
    /// Subnet of the guests.
    pub(crate) subnet: Cidr,
}

impl AllowedHosts for Active {
    fn allows(&self, host: &HostName) -> bool {
        AllowedHosts::allows(&self.policy, host)
    }
}

impl Directory for Guests {
    fn guest(&self, address: IpAddr) -> Option<Guest> {
        Some(Guest::Mediated(self.policies.active(address)?))
    }

    /// Returns nothing: the process does not know the names of instances.
    fn instance_address(&self, _: IpAddr, _: &str) -> Option<Ipv4Addr> {
        None
    }

    fn instance_name(&self, _: IpAddr, _: Ipv4Addr) -> Option<String> {
        None
    }

    fn is_in_subnet(&self, address: Ipv4Addr) -> bool {
        self.subnet.contains(address)
    }
}

/// The resolver as the proxy uses it.
#[derive(Debug)]
pub(crate) struct ResolvedNames(pub(crate) Arc<Resolver>);

impl Names for ResolvedNames {
    fn resolve<'a>(&'a self, guest: IpAddr, name: &'a HostName) -> Addresses<'a> {
        Box::pin(async move {
            let resolved = self.0.resolve(guest, name).await;
            resolved.map(|resolved| resolved.addresses).map_err(error_of)
        })
    }
}

fn error_of(error: ResolveError) -> NamesError {
    match error {
        ResolveError::NotAllowed(Reason::HostNotAllowed) => NamesError::NotAllowed,
        ResolveError::NotAllowed(_) | ResolveError::NoSuchHost | ResolveError::NoAddress => {
            NamesError::NotFound
        }
        ResolveError::Denied(_) => NamesError::Denied,
        ResolveError::NotAGuest | ResolveError::TooManyWaiting | ResolveError::Unanswered => {
            NamesError::Failed
        }
    }
}
