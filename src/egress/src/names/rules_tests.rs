//! Tests of the rules: a table of questions of mediated and of direct guests, and properties of arbitrary names.

use proptest::prelude::*;

use super::*;

const GUEST: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 100, 0, 7));
const WEB: Ipv4Addr = Ipv4Addr::new(10, 100, 0, 9);

/// Tables with two instances, `web` and `secret`; a guest may know the first one only.
struct Tables;

impl Directory for Tables {
    fn guest(&self, _: IpAddr) -> Option<Guest> {
        Some(Guest::Direct)
    }

    fn instance_address(&self, guest: IpAddr, name: &str) -> Option<Ipv4Addr> {
        (guest == GUEST && name == "web").then_some(WEB)
    }

    fn instance_name(&self, guest: IpAddr, address: Ipv4Addr) -> Option<String> {
        (guest == GUEST && address == WEB).then(|| "web".to_owned())
    }

    fn is_in_subnet(&self, address: Ipv4Addr) -> bool {
        address.octets()[..2] == [10, 100]
    }
}

/// Hosts that end in `example.com`.
struct Examples;

impl AllowedHosts for Examples {
    fn allows(&self, host: &HostName) -> bool {
        host.as_str().ends_with("example.com")
    }
}

struct All;

impl AllowedHosts for All {
    fn allows(&self, _: &HostName) -> bool {
        true
    }
}

/// A name of these labels; a question mark stands for a byte that no host has.
fn name(text: &str) -> Name {
    let labels = text.split('.').filter(|label| !label.is_empty());
    let mut name =
        Name::from_labels(labels.map(|label| label.replace('?', "\0").into_bytes())).expect("short");
    name.set_fqdn(true);
    name
}

fn decided(guest: &Guest, text: &str, record_type: RecordType) -> Decision {
    let asker = Asker { directory: &Tables, address: GUEST, guest };
    decide(&asker, &name(text), record_type)
}

fn listed() -> Guest {
    Guest::Mediated(Arc::new(Examples))
}

fn unlisted() -> Guest {
    Guest::Mediated(Arc::new(All))
}

fn address(address: Ipv4Addr) -> Decision {
    Decision::Answer(RData::A(A(address)))
}

#[test]
fn a_mediated_guest_gets_addresses_of_allowed_hosts_only() {
    assert_eq!(decided(&listed(), "api.Example.com.", RecordType::A), Decision::Forward);
    let refused = Decision::NoSuchName(Reason::HostNotAllowed);
    for record_type in [RecordType::A, RecordType::AAAA, RecordType::HTTPS, RecordType::SVCB] {
        assert_eq!(decided(&listed(), "evil.org.", record_type), refused);
    }
    assert_eq!(decided(&unlisted(), "evil.org.", RecordType::A), Decision::Forward);
}

#[test]
fn a_mediated_guest_gets_no_ipv6_address_and_no_key_of_encrypted_names() {
    for record_type in [RecordType::AAAA, RecordType::HTTPS, RecordType::SVCB] {
        assert_eq!(decided(&listed(), "api.example.com.", record_type), Decision::Empty);
    }
}

#[test]
fn types_by_which_tunnels_speak_are_refused_to_mediated_guests() {
    let types = [
        RecordType::TXT,
        RecordType::NULL,
        RecordType::ANY,
        RecordType::MX,
        RecordType::SRV,
        RecordType::NAPTR,
        RecordType::CNAME,
        RecordType::NS,
        RecordType::SOA,
        RecordType::PTR,
        RecordType::DNSKEY,
        RecordType::Unknown(65_399),
    ];
    for record_type in types {
        for name in ["api.example.com.", "evil.org.", "a?b.example.com.", "1.2.0.192.in-addr.arpa."] {
            let refused = Decision::Refuse(Reason::TypeNotAllowed);
            assert_eq!(decided(&listed(), name, record_type), refused, "{name} {record_type}");
        }
    }
}

#[test]
fn names_that_are_no_hosts_do_not_exist_for_mediated_guests() {
    for name in ["a?b.example.com.", "*.example.com.", "1.2.3.4.", "127.1.", "0x7f.1.", "2130706433.", "."] {
        let absent = Decision::NoSuchName(Reason::NotAHost);
        assert_eq!(decided(&unlisted(), name, RecordType::A), absent, "{name}");
    }
}

#[test]
fn names_above_the_limit_do_not_exist_for_mediated_guests() {
    let padded = |length: usize| {
        let mut name = format!("{}.", "a".repeat(40)).repeat(3);
        name.push_str(&"b".repeat(length - name.len() - ".example.com".len()));
        name.push_str(".example.com");
        assert_eq!(name.len(), length);
        format!("{name}.")
    };
    assert_eq!(decided(&listed(), &padded(MEDIATED_NAME_BYTES_MAX), RecordType::A), Decision::Forward);
    let too_long = decided(&listed(), &padded(MEDIATED_NAME_BYTES_MAX + 1), RecordType::A);
    assert_eq!(too_long, Decision::NoSuchName(Reason::NameTooLong));
}

#[test]
fn instances_are_known_by_their_full_name_and_by_one_label() {
    for guest in [listed(), unlisted(), Guest::Direct] {
        for name in ["web.stead.internal.", "WEB.Stead.Internal.", "web."] {
            assert_eq!(decided(&guest, name, RecordType::A), address(WEB), "{name}");
            assert_eq!(decided(&guest, name, RecordType::TXT), Decision::Empty, "{name}");
        }
        let unknown = Decision::NoSuchName(Reason::UnknownInstance);
        for name in ["secret.stead.internal.", "a.web.stead.internal.", "x.stead.internal."] {
            assert_eq!(decided(&guest, name, RecordType::A), unknown, "{name}");
        }
        assert_eq!(decided(&guest, "stead.internal.", RecordType::A), Decision::Empty);
    }
}

#[test]
fn a_single_label_that_is_no_instance_is_asked_for_by_direct_guests_only() {
    let single = Decision::NoSuchName(Reason::SingleLabel);
    assert_eq!(decided(&unlisted(), "secret.", RecordType::A), single);
    assert_eq!(decided(&Guest::Direct, "secret.", RecordType::A), Decision::Forward);
}

#[test]
fn names_of_guests_addresses_are_answered_here() {
    let web = PTR(Name::from_ascii("web.stead.internal.").expect("a name"));
    for guest in [listed(), Guest::Direct] {
        let decided = |name, record_type| decided(&guest, name, record_type);
        let name = Decision::Answer(RData::PTR(web.clone()));
        assert_eq!(decided("9.0.100.10.in-addr.arpa.", RecordType::PTR), name);
        assert_eq!(decided("9.0.100.10.in-addr.arpa.", RecordType::A), Decision::Empty);
        let unknown = Decision::NoSuchName(Reason::UnknownInstance);
        assert_eq!(decided("8.0.100.10.in-addr.arpa.", RecordType::PTR), unknown);
        let localhost = PTR(Name::from_ascii("localhost.").expect("a name"));
        assert_eq!(
            decided("1.0.0.127.in-addr.arpa.", RecordType::PTR),
            Decision::Answer(RData::PTR(localhost))
        );
    }
}

#[test]
fn localhost_is_the_guest_itself() {
    for name in ["localhost.", "a.LOCALHOST."] {
        assert_eq!(decided(&listed(), name, RecordType::A), address(Ipv4Addr::LOCALHOST));
        assert_eq!(decided(&listed(), name, RecordType::AAAA), Decision::Empty);
        let own = Decision::Answer(RData::AAAA(AAAA(Ipv6Addr::LOCALHOST)));
        assert_eq!(decided(&Guest::Direct, name, RecordType::AAAA), own);
    }
    assert_eq!(
        decided(&unlisted(), "notlocalhost.", RecordType::A),
        Decision::NoSuchName(Reason::SingleLabel)
    );
}

#[test]
fn a_direct_guest_may_ask_for_anything_else() {
    for record_type in [RecordType::TXT, RecordType::ANY, RecordType::AAAA, RecordType::HTTPS, RecordType::MX]
    {
        for name in ["evil.org.", "a?b.example.com.", "1.2.0.192.in-addr.arpa.", "."] {
            assert_eq!(decided(&Guest::Direct, name, record_type), Decision::Forward, "{name} {record_type}");
        }
    }
}

proptest! {
    #[test]
    fn a_mediated_guest_makes_nobody_ask_but_for_addresses_of_allowed_hosts(
        labels in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..30), 0..6),
        ending in prop::sample::select(vec!["", "example.com", "evil.org", "stead.internal"]),
        record_type: u16,
    ) {
        let record_type = RecordType::from(record_type);
        let ending = ending.split('.').filter(|label| !label.is_empty()).map(|label| label.as_bytes().to_vec());
        let mut name = Name::from_labels(labels.into_iter().chain(ending)).expect("short");
        name.set_fqdn(true);
        let guest = listed();
        let asker = Asker { directory: &Tables, address: GUEST, guest: &guest };
        if decide(&asker, &name, record_type) == Decision::Forward {
            prop_assert_eq!(record_type, RecordType::A);
            prop_assert!(host_of(&name).is_some_and(|host| host.as_str().ends_with("example.com")));
        }
    }
}
