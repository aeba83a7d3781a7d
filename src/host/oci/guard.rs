//! Addresses that the daemon may connect to for images.
//!
//! A client names the registry, and a registry names its token service and its redirect targets, while the daemon
//! connects from inside the host's network. So the daemon connects only to public addresses and to those listed in
//! the configuration (`registry_allow`). The check is made on the addresses used to connect, not on names, so that a
//! name cannot resolve to another address a moment later.

use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use ipnet::IpNet;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use stead_egress::is_own_address;
use stead_schemas::addresses::{AddressClass, classify};

/// An entry of `registry_allow`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Allowed {
    /// The addresses of a network, such as `10.1.0.0/16` or `127.0.0.1`.
    Network(IpNet),
    /// A name, at one port or at all ports, with whatever addresses it has.
    Host { name: String, port: Option<u16> },
}

impl FromStr for Allowed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(network) = text.parse::<IpNet>() {
            return Ok(Self::Network(network.trunc()));
        }
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Self::Network(address.into()));
        }
        let refused = || format!("{text:?} is neither a network (10.0.0.0/8) nor a host (name or name:port)");
        let (name, port) = match text.rsplit_once(':') {
            Some((name, port)) => (name, Some(port.parse().map_err(|_| refused())?)),
            None => (text, None),
        };
        // An address with a port is treated like a name: it is compared as text.
        let is_name = !name.is_empty()
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'));
        if is_name { Ok(Self::Host { name: name.to_ascii_lowercase(), port }) } else { Err(refused()) }
    }
}

/// The rule for hosts that may be connected to.
#[derive(Debug)]
pub(super) struct Guard {
    allowed: Vec<Allowed>,
}

/// The reason for a refused address. The message does not contain the address, because it may belong to a network
/// that the client must not explore.
#[derive(Debug, thiserror::Error)]
#[error(
    "its address is of this host or of a private network, and the daemon's configuration (registry_allow) \
     does not list it"
)]
pub(super) struct Forbidden;

impl Guard {
    pub(super) fn new(allowed: Vec<Allowed>) -> Self {
        Self { allowed }
    }

    /// Returns `true` if the configuration lists this name at this port, whatever its addresses are.
    pub(super) fn lists(&self, host: &str, port: u16) -> bool {
        self.allowed.iter().any(|entry| match entry {
            Allowed::Host { name, port: at } => {
                name.eq_ignore_ascii_case(host) && at.is_none_or(|at| at == port)
            }
            Allowed::Network(_) => false,
        })
    }

    pub(super) fn check(&self, address: IpAddr) -> Result<(), Forbidden> {
        let address = address.to_canonical();
        let is_listed = self.allowed.iter().any(|entry| match entry {
            Allowed::Network(network) => network.contains(&address),
            Allowed::Host { .. } => false,
        });
        let is_public = classify(address) == AddressClass::Public;
        if is_listed || (is_public && !is_own_address(address)) { Ok(()) } else { Err(Forbidden) }
    }
}

/// A resolver that returns only addresses that may be connected to.
pub(super) struct Resolver {
    pub(super) guard: Arc<Guard>,
    /// True for the resolver of names that the configuration lists, which returns all their addresses.
    pub(super) is_for_listed: bool,
}

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let (guard, is_for_listed) = (self.guard.clone(), self.is_for_listed);
        Box::pin(async move {
            let found: Vec<_> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            let had_any = !found.is_empty();
            let taken: Vec<_> = found
                .into_iter()
                .filter(|address| is_for_listed || guard.check(address.ip()).is_ok())
                .collect();
            if taken.is_empty() && had_any {
                return Err(Forbidden.into());
            }
            let addresses: Addrs = Box::new(taken.into_iter());
            Ok(addresses)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(allowed: &[&str]) -> Guard {
        Guard::new(allowed.iter().map(|entry| entry.parse().expect("an entry")).collect())
    }

    #[test]
    fn only_public_addresses_pass_whatever_way_they_are_written() {
        let guard = guard(&[]);
        let local = [
            "127.0.0.1",
            "127.9.9.9",
            "0.0.0.0",
            "10.0.0.1",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "168.63.129.16",
            "192.0.2.1",
            "203.0.113.1",
            "100.64.0.1",
            "100.127.255.255",
            "169.254.169.254",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "198.18.0.1",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "::127.0.0.1",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
            "fec0::1",
            "ff02::1",
            "64:ff9b::7f00:1",
            "64:ff9b::a9fe:a9fe",
            "2002:7f00:1::",
            "2002:a00:1::",
            "2001::1",
            "2001:db8::1",
        ];
        for address in local {
            assert!(guard.check(address.parse().expect("an address")).is_err(), "{address}");
        }
        for address in ["1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "64:ff9b::101:101"] {
            assert!(guard.check(address.parse().expect("an address")).is_ok(), "{address}");
        }
    }

    #[test]
    fn what_the_configuration_lists_passes_and_no_more() {
        let guard = guard(&["127.0.0.0/8", "fd00::/8", "10.1.2.3", "Registry.LAN:5000", "any.lan"]);
        for (address, passes) in [
            ("127.0.0.1", true),
            ("::ffff:127.0.0.1", true),
            ("::1", false),
            ("fd12::1", true),
            ("10.1.2.3", true),
            ("10.1.2.4", false),
        ] {
            assert_eq!(guard.check(address.parse().expect("an address")).is_ok(), passes, "{address}");
        }
        assert!(guard.lists("registry.lan", 5000) && !guard.lists("registry.lan", 22));
        assert!(guard.lists("any.lan", 22) && !guard.lists("many.lan", 22));
    }

    #[test]
    fn entries_that_mean_nothing_are_refused() {
        for text in ["", "10.0.0.0/33", "host:", "host:port", ":5000", "http://host", "a b"] {
            text.parse::<Allowed>().expect_err(text);
        }
    }
}
