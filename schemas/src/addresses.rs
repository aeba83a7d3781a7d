//! Classes of addresses, and those that guests may reach through this host.
//!
//! Guarantees: an address is judged by every address that it contains: IPv4 in IPv6, NAT64, 6to4 and Teredo
//! are decoded.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// The class of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum AddressClass {
    Public,
    Unspecified,
    Loopback,
    Private,
    /// Shared by carriers (100.64.0.0/10).
    Shared,
    LinkLocal,
    /// A service of a cloud that gives secrets to the host.
    Metadata,
    Benchmarking,
    Documentation,
    Multicast,
    Reserved,
    /// An address of this host.
    Own,
}

/// Addresses of the services of clouds, which answer every program of the host.
const METADATA_V4: [[u8; 4]; 4] =
    [[169, 254, 169, 254], [100, 100, 100, 200], [192, 0, 0, 192], [168, 63, 129, 16]];
const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);

/// Returns the class of an address. An address that contains another which is not public has the class of
/// that one.
#[must_use]
pub fn classify(address: IpAddr) -> AddressClass {
    match address.to_canonical() {
        IpAddr::V4(address) => classify_v4(address),
        IpAddr::V6(address) => classify_v6(address),
    }
}

fn classify_v4(address: Ipv4Addr) -> AddressClass {
    let octets = address.octets();
    if METADATA_V4.contains(&octets) {
        return AddressClass::Metadata;
    }
    match octets {
        [0, 0, 0, 0] => AddressClass::Unspecified,
        [127, ..] => AddressClass::Loopback,
        [10, ..] | [172, 16..=31, ..] | [192, 168, ..] => AddressClass::Private,
        [100, 64..=127, ..] => AddressClass::Shared,
        [169, 254, ..] => AddressClass::LinkLocal,
        [198, 18 | 19, ..] => AddressClass::Benchmarking,
        [192, 0, 2, _] | [198, 51, 100, _] | [203, 0, 113, _] => AddressClass::Documentation,
        [224..=239, ..] => AddressClass::Multicast,
        // "This network", protocol assignments, the anycast relay of 6to4, and the reserved rest with broadcast.
        [0, ..] | [192, 0, 0, _] | [192, 88, 99, _] | [240..=255, ..] => AddressClass::Reserved,
        _ => AddressClass::Public,
    }
}

fn classify_v6(address: Ipv6Addr) -> AddressClass {
    if address == METADATA_V6 {
        return AddressClass::Metadata;
    }
    let embedded = embedded_v4(address);
    if let Some(class) = embedded.into_iter().map(classify_v4).find(|class| *class != AddressClass::Public) {
        return class;
    }
    match address.segments() {
        [0, 0, 0, 0, 0, 0, 0, 0] => AddressClass::Unspecified,
        [0, 0, 0, 0, 0, 0, 0, 1] => AddressClass::Loopback,
        [0x64, 0xff9b, 0, 0, 0, 0, _, _] => AddressClass::Public,
        [0xfc00..=0xfdff, ..] => AddressClass::Private,
        [0xfe80..=0xfebf, ..] => AddressClass::LinkLocal,
        // Site-local addresses, which are deprecated.
        [0xfec0..=0xfeff, ..] => AddressClass::Private,
        [0xff00..=0xffff, ..] => AddressClass::Multicast,
        [0x2001, 2, 0, ..] => AddressClass::Benchmarking,
        [0x2001, 0xdb8, ..] | [0x3fff, 0..=0xfff, ..] => AddressClass::Documentation,
        // Teredo and 6to4 with public addresses.
        [0x2001, 0, ..] | [0x2002, ..] => AddressClass::Public,
        // ORCHID and other protocol assignments.
        [0x2001, 1..=0x1ff, ..] => AddressClass::Reserved,
        [0x2000..=0x3fff, ..] => AddressClass::Public,
        _ => AddressClass::Reserved,
    }
}

/// Returns an address in its canonical form, and the IPv4 addresses that it leads to by a translation mechanism.
#[must_use]
pub fn addresses_in(address: IpAddr) -> Vec<IpAddr> {
    let address = address.to_canonical();
    let contained = match address {
        IpAddr::V4(_) => Vec::new(),
        IpAddr::V6(address) => embedded_v4(address),
    };
    std::iter::once(address).chain(contained.into_iter().map(IpAddr::from)).collect()
}

/// Returns the IPv4 addresses that an IPv6 address of a translation mechanism contains.
fn embedded_v4(address: Ipv6Addr) -> Vec<Ipv4Addr> {
    let join = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        Ipv4Addr::new(a, b, c, d)
    };
    match address.segments() {
        // NAT64.
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => vec![join(high, low)],
        // 6to4.
        [0x2002, high, low, ..] => vec![join(high, low)],
        // Teredo: the server, and the client with all bits inverted.
        [0x2001, 0, high, low, _, _, client_high, client_low] => {
            vec![join(high, low), join(!client_high, !client_low)]
        }
        _ => Vec::new(),
    }
}

/// The rules for addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AddressRules {
    /// Networks that the configuration opens to guests, whatever their class is.
    pub allow: Vec<IpNet>,
    /// Addresses of this host, public ones included.
    pub own: BTreeSet<IpAddr>,
}

impl AddressRules {
    /// Returns `true` if the configuration opens a network with this address.
    #[must_use]
    pub fn opens(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.allow.iter().any(|network| network.contains(&address))
    }

    /// Checks whether guests may reach an address.
    ///
    /// # Errors
    /// Returns the class for which the address is refused.
    pub fn check(&self, address: IpAddr) -> Result<(), AddressClass> {
        if self.opens(address) {
            return Ok(());
        }
        if addresses_in(address).iter().any(|one| self.own.contains(one)) {
            return Err(AddressClass::Own);
        }
        match classify(address) {
            // Addresses of documentation lead nowhere, and tests use them.
            AddressClass::Public | AddressClass::Documentation => Ok(()),
            class => Err(class),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().expect(text)
    }

    #[test]
    fn addresses_have_the_class_of_what_they_lead_to() {
        use AddressClass::{
            Benchmarking, Documentation, LinkLocal, Loopback, Metadata, Multicast, Private, Public, Reserved,
            Shared, Unspecified,
        };
        for (text, class) in [
            ("1.1.1.1", Public),
            ("172.32.0.1", Public),
            ("100.128.0.1", Public),
            ("203.0.113.7", Documentation),
            ("198.51.100.7", Documentation),
            ("192.0.2.7", Documentation),
            ("192.0.3.7", Public),
            ("2606:4700::1111", Public),
            ("2001:db8::1", Documentation),
            ("3fff:fff::1", Documentation),
            ("3fff:1000::1", Public),
            ("64:ff9b::101:101", Public),
            ("2002:101:101::", Public),
            ("0.0.0.0", Unspecified),
            ("::", Unspecified),
            ("127.0.0.1", Loopback),
            ("127.255.255.254", Loopback),
            ("::1", Loopback),
            ("::ffff:127.0.0.1", Loopback),
            ("64:ff9b::7f00:1", Loopback),
            ("2002:7f00:1::", Loopback),
            ("2001:0:7f00:1::", Loopback),
            ("2001:0:101:101::80ff:fffe", Loopback),
            ("10.0.0.1", Private),
            ("172.16.0.1", Private),
            ("172.31.255.255", Private),
            ("192.168.1.1", Private),
            ("fc00::1", Private),
            ("fdff::1", Private),
            ("fec0::1", Private),
            ("::ffff:10.0.0.1", Private),
            ("64:ff9b::a00:1", Private),
            ("2002:a00:1::", Private),
            ("100.64.0.1", Shared),
            ("100.127.255.255", Shared),
            ("169.254.1.1", LinkLocal),
            ("fe80::1", LinkLocal),
            ("169.254.169.254", Metadata),
            ("::ffff:169.254.169.254", Metadata),
            ("64:ff9b::a9fe:a9fe", Metadata),
            ("fd00:ec2::254", Metadata),
            ("100.100.100.200", Metadata),
            ("192.0.0.192", Metadata),
            ("168.63.129.16", Metadata),
            ("198.18.0.1", Benchmarking),
            ("2001:2::1", Benchmarking),
            ("224.0.0.1", Multicast),
            ("ff02::1", Multicast),
            ("0.1.2.3", Reserved),
            ("192.0.0.1", Reserved),
            ("192.88.99.1", Reserved),
            ("240.0.0.1", Reserved),
            ("255.255.255.255", Reserved),
            ("::127.0.0.1", Reserved),
            ("64:ff9b:1::1", Reserved),
            ("2001:10::1", Reserved),
            ("4000::1", Reserved),
        ] {
            assert_eq!(classify(address(text)), class, "{text}");
        }
    }

    #[test]
    fn the_addresses_of_this_host_are_refused_however_they_are_written() {
        let rules =
            AddressRules { allow: Vec::new(), own: BTreeSet::from([address("1.2.3.4"), address("2600::9")]) };
        for text in ["1.2.3.4", "::ffff:1.2.3.4", "64:ff9b::102:304", "2002:102:304::", "2600::9"] {
            assert_eq!(rules.check(address(text)), Err(AddressClass::Own), "{text}");
        }
        assert_eq!(rules.check(address("1.2.3.5")), Ok(()));
        assert_eq!(rules.check(address("203.0.113.7")), Ok(()));
    }

    #[test]
    fn the_configuration_opens_networks_and_no_more() {
        let allow = ["127.0.0.0/8", "fd12::/16", "1.2.3.4/32"].map(|net| net.parse().expect("a network"));
        let rules = AddressRules { allow: allow.to_vec(), own: BTreeSet::from([address("1.2.3.4")]) };
        for text in ["127.0.0.1", "::ffff:127.0.0.1", "fd12::1", "1.2.3.4", "9.9.9.9"] {
            assert_eq!(rules.check(address(text)), Ok(()), "{text}");
        }
        for text in ["::1", "fd13::1", "10.0.0.1", "64:ff9b::7f00:1"] {
            assert!(rules.check(address(text)).is_err(), "{text}");
        }
    }
}
