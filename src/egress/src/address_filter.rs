//! The filter of addresses that guests may reach through this process.
//!
//! Guarantees: an address of this host passes only if the configuration opens it, whether it is public or not, and the
//! sockets of this process pass never. The proxy checks each address before it connects to it, and the resolver
//! each address that it returns.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use stead_schemas::addresses::{AddressClass, AddressRules, addresses_in};

use crate::names;
use crate::own_address::is_own_address;

/// The filter.
#[derive(Debug, Clone, Default)]
pub struct AddressFilter {
    rules: AddressRules,
    /// The sockets at which this process serves guests.
    listeners: BTreeSet<SocketAddr>,
}

impl AddressFilter {
    /// Creates the filter of a process that serves guests at these sockets.
    #[must_use]
    pub fn new(rules: AddressRules, listeners: impl IntoIterator<Item = SocketAddr>) -> Self {
        let canonical = |at: SocketAddr| SocketAddr::new(at.ip().to_canonical(), at.port());
        Self { rules, listeners: listeners.into_iter().map(canonical).collect() }
    }

    /// Checks whether guests may reach an address.
    ///
    /// # Errors
    /// Returns the class for which the address is refused.
    pub fn check(&self, address: IpAddr) -> Result<(), AddressClass> {
        self.rules.check(address)?;
        let is_own = || addresses_in(address).into_iter().any(is_own_address);
        if self.rules.opens(address) || !is_own() { Ok(()) } else { Err(AddressClass::Own) }
    }

    /// Returns `true` if this process itself serves guests at the address and the port.
    #[must_use]
    pub fn is_listener(&self, address: IpAddr, port: u16) -> bool {
        addresses_in(address).into_iter().any(|one| self.listeners.contains(&SocketAddr::new(one, port)))
    }
}

/// The filter is the same for every guest.
impl names::Addresses for AddressFilter {
    fn may_reach(&self, _: IpAddr, address: IpAddr) -> bool {
        self.check(address).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn filter(allow: &[&str], own: &[&str]) -> AddressFilter {
        let allow = allow.iter().map(|net| net.parse().expect("a network")).collect();
        let own = own.iter().copied().map(address).collect();
        let listeners = ["10.100.0.1:18080", "127.0.0.1:18080"].map(|at| at.parse().expect("a socket"));
        AddressFilter::new(AddressRules { allow, own }, listeners)
    }

    #[test]
    fn rows_16_to_19_addresses_of_this_host_and_of_its_networks_are_refused() {
        let filter = filter(&[], &["203.0.113.9"]);
        for refused in [
            "127.0.0.1",
            "127.1.2.3",
            "0.0.0.0",
            "::1",
            "::ffff:127.0.0.1",
            "64:ff9b::7f00:1",
            "10.100.0.1",
            "169.254.169.254",
            "fd00:ec2::254",
            "100.100.100.200",
            "192.0.0.192",
            "203.0.113.9",
            "64:ff9b::cb00:7109",
        ] {
            assert!(filter.check(address(refused)).is_err(), "{refused}");
        }
        for allowed in ["1.1.1.1", "203.0.113.8"] {
            assert_eq!(filter.check(address(allowed)), Ok(()), "{allowed}");
        }
    }

    #[test]
    fn row_16_the_address_of_an_interface_of_this_host_is_own_unless_it_is_opened() {
        // The address that this machine would use towards the outside, a public one on some hosts, or to itself where it
        // has no route.
        let source = |to: &str| {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
            socket.connect(to)?;
            socket.local_addr()
        };
        let uplink =
            source("203.0.113.7:9").or_else(|_| source("127.0.0.1:9")).expect("loopback has a route");
        assert!(is_own_address(uplink.ip()));
        assert!(filter(&[], &[]).check(uplink.ip()).is_err(), "{uplink}");
        let network = format!("{}/32", uplink.ip());
        assert_eq!(filter(&[&network], &[]).check(uplink.ip()), Ok(()));
    }

    #[test]
    fn an_opened_network_stays_open_and_no_more() {
        let filter = filter(&["127.0.0.2/32"], &[]);
        assert_eq!(filter.check(address("127.0.0.2")), Ok(()));
        assert_eq!(filter.check(address("::ffff:127.0.0.2")), Ok(()));
        assert_eq!(filter.check(address("127.0.0.3")), Err(AddressClass::Loopback));
    }

    #[test]
    fn row_17_the_sockets_of_the_process_are_refused_even_in_an_opened_network() {
        let filter = filter(&["127.0.0.0/8", "10.0.0.0/8"], &[]);
        for own in ["127.0.0.1", "10.100.0.1", "::ffff:10.100.0.1", "64:ff9b::a64:1"] {
            assert!(filter.is_listener(address(own), 18080), "{own}");
            assert!(!filter.is_listener(address(own), 18081), "{own}");
        }
        assert!(!filter.is_listener(address("127.0.0.2"), 18080));
    }
}
