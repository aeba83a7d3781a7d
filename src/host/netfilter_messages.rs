//! Kernel messages that no crate of ours parses, read only as far as needed to find the objects that they concern.
//!
//! ```text
//! datagram  = messages          message = nlmsghdr(16) family header(4) attributes
//! attribute = len kind value, padded to 4
//! ```
//! The bytes come from the kernel and are still read with bounds checks. A message that is not understood is reported
//! as possibly concerning everything.

use super::report::Notification;

const HEADER: usize = 16;
/// Size of `nfgenmsg`, and of `netconfmsg` with its padding, in bytes.
const FAMILY_HEADER: usize = 4;

pub(super) const SUBSYSTEM_NFTABLES: u8 = 10;
const NEW_ELEMENT: u8 = 12;
const DELETE_ELEMENT: u8 = 14;
const NEW_GENERATION: u8 = 15;
/// Attribute with the number of a generation message, big-endian.
const GENERATION_ID: u16 = 1;
/// Attribute with the table's name in all nftables messages except that of a generation.
const TABLE: u16 = 1;
/// Attribute with the elements in messages about set elements.
const ELEMENTS: u16 = 3;
const ITEM: u16 = 1;
const KEY: u16 = 1;
const VALUE: u16 = 1;
/// Length of the interface name, which is the first part of the set's key, in bytes.
const IFNAME_BYTES: usize = 16;

/// Message RTM_NEWNETCONF: `(subsystem, message)` are the two bytes of its number, 80.
const NEW_NETCONF: (u8, u8) = (0, 80);
const NETCONF_INTERFACE: u16 = 1;
/// Index for the settings of the host as a whole.
const ALL_INTERFACES: i32 = -1;
const NETCONF_FORWARDING: u16 = 2;

/// Returns `true` if a datagram reports that the host's forwarding was switched.
pub(super) fn is_forwarding_switched(datagram: &[u8]) -> bool {
    messages(datagram).any(|(subsystem, message, body)| {
        (subsystem, message) == NEW_NETCONF
            && find(body, NETCONF_INTERFACE) == Some(&ALL_INTERFACES.to_ne_bytes())
            && find(body, NETCONF_FORWARDING).is_some()
    })
}

/// Returns the objects that a datagram may concern, if it is about the table.
pub(super) fn of_table(datagram: &[u8], table: &str) -> Vec<Notification> {
    let ours = messages(datagram).filter(|(subsystem, ..)| *subsystem == SUBSYSTEM_NFTABLES);
    ours.flat_map(|(_, message, body)| notifications_of(message, body, table)).collect()
}

/// Returns the number of the last change of all tables, if a datagram reports it.
pub(super) fn generation(datagram: &[u8]) -> Option<u32> {
    let mut ours = messages(datagram)
        .filter(|(subsystem, message, _)| (*subsystem, *message) == (SUBSYSTEM_NFTABLES, NEW_GENERATION));
    let (_, _, body) = ours.next()?;
    Some(u32::from_be_bytes(find(body, GENERATION_ID)?.try_into().ok()?))
}

fn notifications_of(message: u8, body: &[u8], table: &str) -> Vec<Notification> {
    if message == NEW_GENERATION || !find(body, TABLE).map(text).is_some_and(|found| is_of(found, table)) {
        return Vec::new();
    }
    match message {
        // We make the additions ourselves, and they are harmless: the rule of an absent TAP lets no guest send.
        NEW_ELEMENT => Vec::new(),
        DELETE_ELEMENT => taps_of(body).unwrap_or_else(|| vec![Notification::Everything]),
        _ => vec![Notification::Everything],
    }
}

/// Returns `true` for the table itself, or for one of a further segment: its name with `_` and a number.
fn is_of(found: &[u8], table: &str) -> bool {
    let Some(rest) = found.strip_prefix(table.as_bytes()) else { return false };
    match rest.split_first() {
        None => true,
        Some((b'_', number)) => !number.is_empty() && number.iter().all(u8::is_ascii_digit),
        Some(_) => false,
    }
}

/// Returns the TAPs or addresses whose elements a message is about, or `None` when they cannot be determined.
fn taps_of(body: &[u8]) -> Option<Vec<Notification>> {
    let items = attributes(find(body, ELEMENTS)?).filter(|(kind, _)| *kind == ITEM);
    let tap = |(_, item)| {
        let key = find(find(item, KEY)?, VALUE)?;
        // The key of a lane's set is an address.
        if let Ok(address) = <[u8; 4]>::try_from(key) {
            return Some(Notification::Lane(address.into()));
        }
        let name = key.get(..IFNAME_BYTES)?;
        std::str::from_utf8(text(name)).ok()?.parse().ok().map(Notification::Nic)
    };
    let taps: Option<Vec<Notification>> = items.map(tap).collect();
    taps.filter(|taps| !taps.is_empty())
}

fn text(bytes: &[u8]) -> &[u8] {
    bytes.split(|&byte| byte == 0).next().unwrap_or_default()
}

fn messages(datagram: &[u8]) -> impl Iterator<Item = (u8, u8, &[u8])> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let length = usize::try_from(u32::from_ne_bytes(rest.get(..4)?.try_into().ok()?)).ok()?;
        let [message, subsystem] = *rest.get(4..6)? else { return None };
        let body = rest.get(HEADER + FAMILY_HEADER..length)?;
        rest = rest.get(padded(length)..).unwrap_or_default();
        Some((subsystem, message, body))
    })
}

fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(rest.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?) & 0x3fff; // less its two flags
        let value = rest.get(4..length)?;
        rest = rest.get(padded(length)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

fn padded(length: usize) -> usize {
    length.next_multiple_of(4)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(4 + value.len()).expect("short");
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend_from_slice(value);
        bytes.resize(padded(bytes.len()), 0);
        bytes
    }

    fn message(kind: u8, attributes: &[Vec<u8>]) -> Vec<u8> {
        let body = attributes.concat();
        let length = u32::try_from(HEADER + FAMILY_HEADER + body.len()).expect("short");
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend([kind, SUBSYSTEM_NFTABLES]);
        bytes.resize(HEADER + FAMILY_HEADER, 0);
        bytes.extend(body);
        bytes
    }

    fn element(tap: &str) -> Vec<u8> {
        let mut key = tap.as_bytes().to_vec();
        key.resize(28, 0);
        attribute(ITEM, &attribute(KEY, &attribute(VALUE, &key)))
    }

    #[test]
    fn only_messages_of_the_table_are_notified_and_lost_ports_are_named() {
        let (ours, other) = (attribute(TABLE, b"ours\0"), attribute(TABLE, b"other\0"));
        let elements = |taps: &[&str]| {
            attribute(ELEMENTS, &taps.iter().flat_map(|tap| element(tap)).collect::<Vec<u8>>())
        };
        let one = message(DELETE_ELEMENT, &[ours.clone(), elements(&["st-a"])]);
        let tap = |name: &str| Notification::Nic(name.parse().expect("valid"));
        assert_eq!(of_table(&one, "ours"), [tap("st-a")]);
        assert_eq!(of_table(&one, "other"), []);
        let named = |name: &[u8]| message(DELETE_ELEMENT, &[attribute(TABLE, name), elements(&["st-a"])]);
        assert_eq!(of_table(&named(b"ours_12\0"), "ours"), [tap("st-a")], "a further segment");
        for foreign in [&b"ours_\0"[..], b"ours_1x\0", b"ours2\0"] {
            assert_eq!(of_table(&named(foreign), "ours"), []);
        }
        let two = message(DELETE_ELEMENT, &[ours.clone(), elements(&["st-a", "st-b"])]);
        assert_eq!(of_table(&two, "ours"), [tap("st-a"), tap("st-b")], "those that went together");
        assert_eq!(of_table(&message(NEW_ELEMENT, &[ours.clone(), elements(&["st-a"])]), "ours"), []);
        assert_eq!(of_table(&message(NEW_GENERATION, std::slice::from_ref(&ours)), "ours"), []);
        assert_eq!(
            of_table(&message(DELETE_ELEMENT, std::slice::from_ref(&ours)), "ours"),
            [Notification::Everything]
        );
        let rule = message(6, std::slice::from_ref(&ours));
        assert_eq!(of_table(&rule, "ours"), [Notification::Everything]);
        assert_eq!(of_table(&[message(6, &[other]), one.clone()].concat(), "ours"), [tap("st-a")]);
        assert_eq!(of_table(&[one, rule].concat(), "ours"), [tap("st-a"), Notification::Everything]);
    }

    #[test]
    fn a_generation_is_read_from_its_message_only() {
        let number = attribute(GENERATION_ID, &7_u32.to_be_bytes());
        let reported = message(NEW_GENERATION, std::slice::from_ref(&number));
        assert_eq!(generation(&reported), Some(7));
        assert_eq!(generation(&message(6, &[number])), None);
        assert_eq!(generation(&message(NEW_GENERATION, &[attribute(GENERATION_ID, &[7])])), None);
        assert_eq!(generation(&reported[..reported.len() - 1]), None);
    }

    #[test]
    fn only_the_hosts_own_forwarding_is_a_switch() {
        let notice = |interface: i32, kind| {
            let attributes =
                [attribute(NETCONF_INTERFACE, &interface.to_ne_bytes()), attribute(kind, &[1, 0, 0, 0])];
            let mut bytes = message(80, &attributes);
            bytes[5] = 0;
            bytes
        };
        assert!(is_forwarding_switched(&notice(-1, NETCONF_FORWARDING)));
        assert!(!is_forwarding_switched(&notice(7, NETCONF_FORWARDING)));
        assert!(!is_forwarding_switched(&notice(-1, 3)));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            is_forwarding_switched(&bytes);
            of_table(&bytes, "ours");
        }
    }
}
