//! The addresses of this host, as the kernel knows them at this moment.
//!
//! Guarantees: an address that was added a moment ago is known, because the kernel is asked each time; nothing is sent.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

/// The port to which the socket is connected, that of the discard service. Any port would do.
const PORT: u16 = 9;

/// Returns `true` if the kernel delivers the address to this host itself: it then uses the address as the source, or
/// an address of loopback for all of loopback. An address without a route is not of this host, and cannot be connected to anyway.
#[must_use]
pub fn is_own_address(address: IpAddr) -> bool {
    let address = address.to_canonical();
    let any: IpAddr = match address {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    // Connecting a datagram socket sends nothing.
    let source = UdpSocket::bind((any, 0)).and_then(|socket| {
        socket.connect((address, PORT))?;
        socket.local_addr()
    });
    source.is_ok_and(|source| source.ip() == address || source.ip().is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_addresses_of_this_host_are_known_as_such() {
        for own in ["127.0.0.1", "127.255.0.1", "::ffff:127.0.0.1"] {
            assert!(is_own_address(own.parse().expect("an address")), "{own}");
        }
        for other in ["1.1.1.1", "203.0.113.7", "224.0.0.1"] {
            assert!(!is_own_address(other.parse().expect("an address")), "{other}");
        }
    }
}
