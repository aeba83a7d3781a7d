//! Names of DNS as text.

use std::net::Ipv4Addr;

use hickory_proto::rr::Name;
use stead_schemas::egress::HostName;

/// Returns the name as that of a host, or `None` if it cannot be one: it has other bytes than letters, digits, hyphens
/// and underscores, or ends in a number, as addresses do.
pub(crate) fn host_of(name: &Name) -> Option<HostName> {
    let mut host = String::with_capacity(name.len());
    for label in name.iter() {
        // A dot within a label would make two of it.
        if label.contains(&b'.') || !label.is_ascii() {
            return None;
        }
        if !host.is_empty() {
            host.push('.');
        }
        host.extend(label.iter().copied().map(char::from));
    }
    host.parse().ok()
}

/// Returns the name of a host, or `None` if the library does not take it.
pub(crate) fn name_of(host: &HostName) -> Option<Name> {
    let mut name = Name::from_labels(host.labels().map(str::as_bytes)).ok()?;
    name.set_fqdn(true);
    Some(name)
}

/// The labels of names by which hosts of IPv4 are found by their addresses.
const REVERSE_ENDING: &str = ".in-addr.arpa";
/// Number of bytes of an address, each a label of such a name.
const ADDRESS_BYTES: usize = 4;

/// Returns the address that a host name stands for in the tree of addresses, or `None` if it stands for none, or for
/// a whole network.
pub(crate) fn reversed_address(host: &str) -> Option<Ipv4Addr> {
    let labels = host.strip_suffix(REVERSE_ENDING)?.split('.');
    let bytes: Vec<u8> = labels.map(canonical_byte).collect::<Option<_>>()?;
    let [d, c, b, a]: [u8; ADDRESS_BYTES] = bytes.try_into().ok()?;
    Some(Ipv4Addr::new(a, b, c, d))
}

/// Parses a byte without leading zeros.
fn canonical_byte(label: &str) -> Option<u8> {
    let byte: u8 = label.parse().ok()?;
    (byte.to_string() == label).then_some(byte)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn host(text: &str) -> Option<String> {
        host_of(&Name::from_ascii(text).expect("a name")).map(String::from)
    }

    #[test]
    fn a_host_is_spelled_in_lower_case_without_the_last_dot() {
        assert_eq!(host("API.Example.COM.").as_deref(), Some("api.example.com"));
        assert_eq!(host("web.").as_deref(), Some("web"));
        assert_eq!(host("_x.a-b.example.").as_deref(), Some("_x.a-b.example"));
    }

    #[test]
    fn every_host_has_a_name() {
        for text in ["api.example.com", "_a.my_host.example.com", "a--b.example", &"a.".repeat(126)] {
            let host: HostName = text.parse().expect("a host");
            assert_eq!(name_of(&host).as_ref().and_then(host_of), Some(host));
        }
    }

    #[test]
    fn a_name_that_is_no_host_has_no_spelling() {
        for name in [".", "1.2.3.4.", "2130706433.", "0x7f.1.", "a.0x7f.", "127.1.", "*.example.com."] {
            assert_eq!(host(name), None, "{name}");
        }
        for label in
            [&b"a b"[..], b"a.b", b"a\0b", b"\xff", "\u{fc}".as_bytes(), b"a/b", b"a@b", b"a:1", b"-a"]
        {
            let name = Name::from_labels([label, b"example", b"com"]).expect("short");
            assert_eq!(host_of(&name), None, "{label:?}");
        }
    }

    #[test]
    fn a_reversed_address_is_read_only_in_its_one_form() {
        let read = |text: &str| reversed_address(text);
        assert_eq!(read("7.0.100.10.in-addr.arpa"), Some(Ipv4Addr::new(10, 100, 0, 7)));
        for text in [
            "in-addr.arpa",
            "10.in-addr.arpa",
            "07.0.100.10.in-addr.arpa",
            "256.0.0.1.in-addr.arpa",
            "1.7.0.100.10.in-addr.arpa",
            "7.0.100.10.ip6.arpa",
        ] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_address_is_read_back_from_its_name(bits: u32) {
            let address = Ipv4Addr::from(bits);
            let [a, b, c, d] = address.octets();
            prop_assert_eq!(reversed_address(&format!("{d}.{c}.{b}.{a}.in-addr.arpa")), Some(address));
        }

        #[test]
        fn a_host_has_only_letters_digits_hyphens_and_underscores(labels in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..20), 1..5)) {
            let name = Name::from_labels(labels.iter().map(Vec::as_slice)).expect("short");
            if let Some(host) = host_of(&name) {
                let host = String::from(host);
                prop_assert!(host.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_.".contains(&byte)));
                prop_assert_eq!(host.split('.').count(), labels.len());
            }
        }
    }
}
