//! The rules of names: what a guest may ask for, and what is answered without asking anybody else.
//!
//! Guarantees: [`decide`] is a pure function of the question, the guest's rights and the caller's tables; nothing
//! that a mediated guest asks for is forwarded but addresses (A) of hosts that it may use.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use hickory_proto::rr::rdata::{A, AAAA, PTR};
use hickory_proto::rr::{Name, RData, RecordType};
use stead_schemas::egress::{Host, HostName, Policy};

use super::host::{host_of, reversed_address};
use super::limits::MEDIATED_NAME_BYTES_MAX;
use super::report::Reason;

/// The domain of instances.
pub const INSTANCES_DOMAIN: &str = "stead.internal";
const LOCALHOST: &str = "localhost";

/// The hosts that a mediated guest may use.
pub trait AllowedHosts: Send + Sync {
    fn allows(&self, host: &HostName) -> bool;
}

impl AllowedHosts for Policy {
    fn allows(&self, host: &HostName) -> bool {
        Policy::allows(self, &Host::Name(host.clone()))
    }
}

/// The rights of a guest.
#[derive(Clone)]
pub enum Guest {
    /// The guest reaches the outside by itself: it may ask for anything.
    Direct,
    /// The guest reaches the outside only through the proxy: it may ask for the addresses of these hosts.
    Mediated(Arc<dyn AllowedHosts>),
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Direct => "Direct",
            Self::Mediated(_) => "Mediated",
        })
    }
}

/// The caller's tables of guests and instances. Its methods are called for each question and must not block.
pub trait Directory: Send + Sync {
    /// Returns the rights of the guest with this address, or `None` if it is the address of no guest.
    fn guest(&self, address: IpAddr) -> Option<Guest>;
    /// Returns the address of the instance with this name, if the guest may know it.
    fn instance_address(&self, guest: IpAddr, name: &str) -> Option<Ipv4Addr>;
    /// Returns the name of the instance with this address, if the guest may know it.
    fn instance_name(&self, guest: IpAddr, address: Ipv4Addr) -> Option<String>;
    /// Returns whether an address is in a subnet of guests; nobody else is asked for names of such addresses.
    fn is_in_subnet(&self, address: Ipv4Addr) -> bool;
}

/// A guest that asks, and the tables by which it is answered.
pub(crate) struct Asker<'a> {
    pub(crate) directory: &'a dyn Directory,
    pub(crate) address: IpAddr,
    pub(crate) guest: &'a Guest,
}

/// The decision on a question.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Decision {
    Answer(RData),
    /// The name exists and has no such record.
    Empty,
    NoSuchName(Reason),
    Refuse(Reason),
    /// An upstream resolver is asked.
    Forward,
}

/// Decides on a question of the Internet class.
pub(crate) fn decide(asker: &Asker<'_>, name: &Name, record_type: RecordType) -> Decision {
    let Some(host) = host_of(name) else {
        return match asker.guest {
            Guest::Direct => Decision::Forward,
            Guest::Mediated(_) if is_answered(record_type) => Decision::NoSuchName(Reason::NotAHost),
            Guest::Mediated(_) => Decision::Refuse(Reason::TypeNotAllowed),
        };
    };
    match (local(asker, host.as_str(), record_type), asker.guest) {
        (Some(decision), _) => decision,
        (None, Guest::Direct) => Decision::Forward,
        (None, Guest::Mediated(allowed)) => mediated(allowed.as_ref(), &host, record_type),
    }
}

/// Returns whether questions of this type are answered for mediated guests.
///
/// A connection through the proxy needs an IPv4 address only. HTTPS and SVCB are answered with nothing, so that
/// clients neither encrypt the server's name nor try HTTP/3.
fn is_answered(record_type: RecordType) -> bool {
    matches!(record_type, RecordType::A | RecordType::AAAA | RecordType::HTTPS | RecordType::SVCB)
}

fn mediated(allowed: &dyn AllowedHosts, host: &HostName, record_type: RecordType) -> Decision {
    if !is_answered(record_type) {
        return Decision::Refuse(Reason::TypeNotAllowed);
    }
    if host.as_str().len() > MEDIATED_NAME_BYTES_MAX {
        return Decision::NoSuchName(Reason::NameTooLong);
    }
    if host.parent().is_none() {
        return Decision::NoSuchName(Reason::SingleLabel);
    }
    if !allowed.allows(host) {
        return Decision::NoSuchName(Reason::HostNotAllowed);
    }
    if record_type == RecordType::A { Decision::Forward } else { Decision::Empty }
}

/// Decides on names that are answered here for every guest.
fn local(asker: &Asker<'_>, host: &str, record_type: RecordType) -> Option<Decision> {
    if is_below(host, LOCALHOST) {
        return Some(localhost(asker.guest, record_type));
    }
    if host == INSTANCES_DOMAIN {
        return Some(Decision::Empty);
    }
    if let Some(name) = host.strip_suffix(INSTANCES_DOMAIN).and_then(|name| name.strip_suffix('.')) {
        let known = instance(asker, name, record_type);
        return Some(known.unwrap_or(Decision::NoSuchName(Reason::UnknownInstance)));
    }
    if let Some(address) = reversed_address(host) {
        return reversed(asker, address, record_type);
    }
    if host.contains('.') { None } else { instance(asker, host, record_type) }
}

fn is_below(host: &str, domain: &str) -> bool {
    host.strip_suffix(domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Answers for the guest's own loopback (RFC 6761, section 6.3).
fn localhost(guest: &Guest, record_type: RecordType) -> Decision {
    match (record_type, guest) {
        (RecordType::A, _) => Decision::Answer(RData::A(A(Ipv4Addr::LOCALHOST))),
        (RecordType::AAAA, Guest::Direct) => Decision::Answer(RData::AAAA(AAAA(Ipv6Addr::LOCALHOST))),
        _ => Decision::Empty,
    }
}

/// Answers for an instance; returns `None` if the guest knows no instance of this name.
fn instance(asker: &Asker<'_>, name: &str, record_type: RecordType) -> Option<Decision> {
    let address = asker.directory.instance_address(asker.address, name)?;
    Some(if record_type == RecordType::A { Decision::Answer(RData::A(A(address))) } else { Decision::Empty })
}

/// Answers for the name of an address; returns `None` if the address is neither a guest's nor of loopback.
fn reversed(asker: &Asker<'_>, address: Ipv4Addr, record_type: RecordType) -> Option<Decision> {
    let host = if address.is_loopback() {
        Some(LOCALHOST.to_owned())
    } else if asker.directory.is_in_subnet(address) {
        let name = asker.directory.instance_name(asker.address, address);
        name.map(|name| format!("{name}.{INSTANCES_DOMAIN}"))
    } else {
        return None;
    };
    let name = host.and_then(|host| Name::from_ascii(format!("{host}.")).ok());
    Some(match name {
        None => Decision::NoSuchName(Reason::UnknownInstance),
        Some(name) if record_type == RecordType::PTR => Decision::Answer(RData::PTR(PTR(name))),
        Some(_) => Decision::Empty,
    })
}

#[cfg(test)]
#[path = "rules_tests.rs"]
mod tests;
