//! The last listing of our tables, kept while only our own transactions change them.
//!
//! The kernel counts the transactions of all programs. A listing belongs to one count. A transaction of ours that
//! increases the count by one is applied to the listing, so that adding and removing a thousand ports costs no
//! listing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde_json::Value;
use stead_controllers::host::NicRule;

use super::nft_mediation::LANES;

/// The objects of both tables by family, kind and chain or name, with rules in order and without ports.
pub(super) type Tables = BTreeMap<(String, String, String), Vec<Value>>;

/// The content of both tables of one name.
#[derive(Debug, Clone)]
pub(super) struct Listed {
    pub(super) is_there: bool,
    pub(super) tables: Arc<Tables>,
    /// The ports; one whose address is in several lanes is here for each of them.
    pub(super) nics: BTreeSet<NicRule>,
}

impl Listed {
    /// Returns whether the rule of a port is loaded, and its address is in no other lane.
    pub(super) fn has(&self, nic: &NicRule) -> bool {
        let is_loaded = |lane| self.nics.contains(&NicRule { lane, ..nic.clone() });
        LANES.into_iter().all(|lane| is_loaded(lane) == (lane == nic.lane))
    }
}

/// A change of the set of ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum NicChange {
    Add(NicRule),
    Remove(NicRule),
}

/// Listings at one transaction count, by table.
#[derive(Debug, Default)]
pub(super) struct Cache {
    generation: u32,
    listed: BTreeMap<String, Listed>,
}

impl Cache {
    /// Calls `read` with the listing of the table at this count. Returns `None` when there is no such listing.
    pub(super) fn at<T>(&self, generation: u32, table: &str, read: impl FnOnce(&Listed) -> T) -> Option<T> {
        self.listed.get(table).filter(|_| self.generation == generation).map(read)
    }

    /// Keeps a listing that was begun at this count.
    pub(super) fn keep(&mut self, generation: u32, table: &str, listed: Listed) {
        if self.generation != generation {
            *self = Self { generation, listed: BTreeMap::new() };
        }
        self.listed.insert(table.to_owned(), listed);
    }

    /// Applies our own transaction that ran between two counts. Transactions of other programs in between invalidate
    /// the listings.
    pub(super) fn changed(&mut self, before: u32, after: u32, table: &str, changes: &[NicChange]) {
        if self.generation != before || after != before.wrapping_add(1) {
            self.listed.clear();
        }
        self.generation = after;
        let Some(listed) = self.listed.get_mut(table) else { return };
        for change in changes {
            let (NicChange::Add(rule) | NicChange::Remove(rule)) = change;
            for lane in LANES {
                listed.nics.remove(&NicRule { lane, ..rule.clone() });
            }
            if matches!(change, NicChange::Add(_)) {
                listed.nics.insert(rule.clone());
            }
        }
    }

    pub(super) fn clear(&mut self) {
        self.listed.clear();
    }
}

#[cfg(test)]
mod tests {
    use stead_schemas::network::Lane;

    use super::*;

    fn rule(number: u8) -> NicRule {
        NicRule {
            tap: format!("st-{number}").parse().expect("a valid name"),
            mac: format!("02:00:00:00:00:{number:02x}").parse().expect("a valid address"),
            address: [10, 0, 0, number].into(),
            lane: Lane::Direct,
        }
    }

    fn nics(cache: &Cache, generation: u32) -> Option<Vec<NicRule>> {
        cache.at(generation, "ours", |listed| listed.nics.iter().cloned().collect())
    }

    #[test]
    fn own_transactions_are_followed_and_those_of_others_are_not_passed_by() {
        let mut cache = Cache::default();
        let listed = Listed { is_there: true, tables: Arc::default(), nics: BTreeSet::from([rule(1)]) };
        cache.keep(7, "ours", listed);
        assert_eq!(nics(&cache, 8), None, "another count");
        cache.changed(7, 8, "ours", &[NicChange::Add(rule(2)), NicChange::Remove(rule(1))]);
        assert_eq!(nics(&cache, 8), Some(vec![rule(2)]));
        assert_eq!(nics(&cache, 7), None);
        cache.changed(8, 10, "ours", &[NicChange::Add(rule(3))]);
        assert_eq!(nics(&cache, 10), None, "another program's transaction came between");
        let listed = Listed { is_there: true, tables: Arc::default(), nics: BTreeSet::new() };
        cache.keep(u32::MAX, "ours", listed);
        cache.changed(u32::MAX, 0, "ours", &[NicChange::Add(rule(4))]);
        assert_eq!(nics(&cache, 0), Some(vec![rule(4)]), "the count wraps");
    }
}
