//! The cache of answers.
//!
//! All guests use the same answers, and each answer is charged to the guest that caused it. A guest that exceeds its
//! share drops its own least used answers, and a cache that is full drops those of the guest with the largest part.
//! Thus a guest that asks for a million names loses only its own answers. Admission by frequency was the alternative:
//! it needs no owner, but a guest can ask for each of its names twice.
//!
//! A guest can notice by the time of an answer that another guest asked for the same name a short time ago. A cache for
//! each guest would hide that, at the cost of asking the upstream resolvers once for each guest.
//!
//! Guarantees: the numbers of entries and bytes stay below their limits, in total and for each guest; an answer is
//! not returned after its time. Pure: the time comes from the caller.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hickory_proto::rr::Record;
use hickory_proto::serialize::binary::BinEncodable;

use super::answer::{Answer, Found, Key};
use super::limits::{
    CACHE_BYTES_MAX, CACHE_BYTES_PER_GUEST_MAX, CACHE_ENTRIES_MAX, CACHE_ENTRIES_PER_GUEST_MAX,
    CACHE_ENTRY_BYTES_MAX,
};

/// Estimate of the memory of an entry besides its name and records, in bytes: both tables, the key twice, the answer.
const ENTRY_OVERHEAD_BYTES: usize = 512;
/// Estimate of the memory of a record besides its data, in bytes.
const RECORD_OVERHEAD_BYTES: usize = 256;

#[derive(Debug)]
struct Entry {
    answer: Arc<Answer>,
    expires: Instant,
    owner: IpAddr,
    /// The time of the last use, as a number that grows with each use of the cache.
    used: u64,
    bytes: usize,
}

/// The entries of one owner, the least used first.
#[derive(Debug, Default)]
struct Share {
    by_use: BTreeMap<u64, Key>,
    bytes: usize,
}

/// The cache.
#[derive(Debug, Default)]
pub(crate) struct Cache {
    entries: HashMap<Key, Entry>,
    /// Owners have at least one entry, so that there are no more of them than entries.
    shares: HashMap<IpAddr, Share>,
    bytes: usize,
    uses: u64,
}

impl Cache {
    /// Returns the answer to a question and the time for which it is valid still.
    pub(crate) fn get(&mut self, key: &Key, now: Instant) -> Option<(Arc<Answer>, Duration)> {
        let entry = self.entries.get_mut(key)?;
        let left = entry.expires.saturating_duration_since(now);
        if left.is_zero() {
            self.remove(key);
            return None;
        }
        self.uses += 1;
        if let Some(share) = self.shares.get_mut(&entry.owner)
            && let Some(key) = share.by_use.remove(&entry.used)
        {
            share.by_use.insert(self.uses, key);
        }
        entry.used = self.uses;
        Some((entry.answer.clone(), left))
    }

    /// Keeps an answer for its time, charged to the guest that caused it.
    pub(crate) fn insert(&mut self, key: Key, answer: Arc<Answer>, owner: IpAddr, now: Instant) {
        self.remove(&key);
        let bytes = size(&key, &answer);
        if bytes > CACHE_ENTRY_BYTES_MAX {
            return;
        }
        while self.is_share_full(owner, bytes) {
            self.remove_least_used(owner);
        }
        while self.entries.len() >= CACHE_ENTRIES_MAX || self.bytes + bytes > CACHE_BYTES_MAX {
            let Some(largest) = self.largest_owner() else { return };
            self.remove_least_used(largest);
        }
        self.uses += 1;
        let share = self.shares.entry(owner).or_default();
        share.by_use.insert(self.uses, key.clone());
        share.bytes += bytes;
        self.bytes += bytes;
        let expires = now + answer.ttl;
        self.entries.insert(key, Entry { answer, expires, owner, used: self.uses, bytes });
    }

    fn is_share_full(&self, owner: IpAddr, bytes: usize) -> bool {
        self.shares.get(&owner).is_some_and(|share| {
            share.by_use.len() >= CACHE_ENTRIES_PER_GUEST_MAX
                || share.bytes + bytes > CACHE_BYTES_PER_GUEST_MAX
        })
    }

    /// Returns the owner with the most bytes. Takes time in proportion to the number of guests, and only while the
    /// cache is full.
    fn largest_owner(&self) -> Option<IpAddr> {
        self.shares.iter().max_by_key(|(_, share)| share.bytes).map(|(owner, _)| *owner)
    }

    fn remove_least_used(&mut self, owner: IpAddr) {
        let key = self.shares.get(&owner).and_then(|share| share.by_use.values().next()).cloned();
        match key {
            Some(key) => self.remove(&key),
            None => drop(self.shares.remove(&owner)),
        }
    }

    fn remove(&mut self, key: &Key) {
        let Some(entry) = self.entries.remove(key) else { return };
        self.bytes -= entry.bytes;
        if let Some(share) = self.shares.get_mut(&entry.owner) {
            share.by_use.remove(&entry.used);
            share.bytes -= entry.bytes;
            if share.by_use.is_empty() {
                self.shares.remove(&entry.owner);
            }
        }
    }
}

/// Returns an estimate of an entry's memory, in bytes.
fn size(key: &Key, answer: &Answer) -> usize {
    let records = match &answer.found {
        Found::Records(records) => records.as_slice(),
        Found::Empty | Found::NoSuchName | Found::Failure => &[],
    };
    // A record that cannot be written cannot be sent either; its entry is too large to be kept.
    let record_bytes =
        |record: &Record| BinEncodable::to_bytes(record).map_or(CACHE_ENTRY_BYTES_MAX, |bytes| bytes.len());
    let records = records.iter().map(|record| record_bytes(record) + RECORD_OVERHEAD_BYTES);
    ENTRY_OVERHEAD_BYTES + key.name.len() + records.sum::<usize>()
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
