//! The guard against rebinding: addresses that a name must not stand for are taken out of answers.
//!
//! Guarantees: an answer that had only such addresses is reported as denied and not as empty; what is left has no
//! address that the filter refuses.

use std::net::IpAddr;

use hickory_proto::rr::{RData, Record};
use stead_schemas::addresses::AddressRules;

/// The caller's filter of the addresses that guests may reach by a name.
///
/// An implementation refuses private, loopback and link-local addresses, those of the host, and every other form of
/// them (mapped, translated). The resolver calls it for each answer, so that it must not block.
pub trait Addresses: Send + Sync {
    fn may_reach(&self, guest: IpAddr, address: IpAddr) -> bool;
}

/// The rules of the proxy, which are the same for every guest.
impl Addresses for AddressRules {
    fn may_reach(&self, _: IpAddr, address: IpAddr) -> bool {
        self.check(address).is_ok()
    }
}

/// The records that passed the filter.
#[derive(Debug)]
pub(crate) struct Guarded {
    pub(crate) records: Vec<Record>,
    /// The first address that was removed.
    pub(crate) removed: Option<IpAddr>,
    /// True if addresses were removed and none is left.
    pub(crate) is_denied: bool,
}

/// Returns the address of a record that has one.
pub(crate) fn address_of(record: &Record) -> Option<IpAddr> {
    match &record.data {
        RData::A(address) => Some(address.0.into()),
        RData::AAAA(address) => Some(address.0.into()),
        _ => None,
    }
}

/// Removes the addresses that a guest must not reach.
pub(crate) fn guard(records: &[Record], may_reach: impl Fn(IpAddr) -> bool) -> Guarded {
    let is_removed = |record: &&Record| address_of(record).is_some_and(|address| !may_reach(address));
    let (refused, records): (Vec<&Record>, Vec<&Record>) = records.iter().partition(is_removed);
    let is_denied = !refused.is_empty() && records.iter().all(|record| address_of(record).is_none());
    let removed = refused.first().and_then(|record| address_of(record));
    let records = if is_denied { Vec::new() } else { records.into_iter().cloned().collect() };
    Guarded { records, removed, is_denied }
}

#[cfg(test)]
mod tests {
    use hickory_proto::rr::Name;
    use hickory_proto::rr::rdata::{A, AAAA, CNAME};
    use proptest::prelude::*;

    use super::*;

    fn record(address: IpAddr) -> Record {
        let data = match address {
            IpAddr::V4(address) => RData::A(A(address)),
            IpAddr::V6(address) => RData::AAAA(AAAA(address)),
        };
        Record::from_rdata(Name::root(), 5, data)
    }

    fn alias() -> Record {
        Record::from_rdata(Name::root(), 5, RData::CNAME(CNAME(Name::root())))
    }

    fn is_public(address: IpAddr) -> bool {
        matches!(address, IpAddr::V4(address) if !address.is_private() && !address.is_loopback())
    }

    fn addresses(text: &[&str]) -> Vec<IpAddr> {
        text.iter().map(|text| text.parse().expect("an address")).collect()
    }

    fn guarded(text: &[&str]) -> Guarded {
        let records: Vec<Record> =
            std::iter::once(alias()).chain(addresses(text).into_iter().map(record)).collect();
        guard(&records, is_public)
    }

    #[test]
    fn mixed_answers_keep_the_public_addresses_only() {
        let guarded = guarded(&["10.0.0.1", "203.0.113.1", "127.0.0.1", "203.0.113.2"]);
        let left: Vec<IpAddr> = guarded.records.iter().filter_map(address_of).collect();
        assert_eq!(left, addresses(&["203.0.113.1", "203.0.113.2"]));
        assert_eq!(guarded.removed, Some(addresses(&["10.0.0.1"])[0]));
        assert!(!guarded.is_denied);
        assert_eq!(guarded.records.len(), 3, "the alias is kept");
    }

    #[test]
    fn an_answer_without_any_other_address_is_denied() {
        let guarded = guarded(&["10.0.0.1", "::1"]);
        assert!(guarded.is_denied && guarded.records.is_empty());
    }

    #[test]
    fn an_answer_that_had_no_address_is_not_denied() {
        let guarded = guarded(&[]);
        assert!(!guarded.is_denied && guarded.removed.is_none());
        assert_eq!(guarded.records.len(), 1);
    }

    proptest! {
        #[test]
        fn no_refused_address_is_left_and_no_other_is_lost(addresses in prop::collection::vec(any::<IpAddr>(), 0..8)) {
            let records: Vec<Record> = addresses.iter().copied().map(record).collect();
            let guarded = guard(&records, is_public);
            let left: Vec<IpAddr> = guarded.records.iter().filter_map(address_of).collect();
            let expected: Vec<IpAddr> = addresses.iter().copied().filter(|address| is_public(*address)).collect();
            prop_assert_eq!(guarded.is_denied, expected.is_empty() && !addresses.is_empty());
            prop_assert_eq!(left, expected);
        }
    }
}
