//! Tests of the cache: times, limits, and that a guest evicts only its own answers.

use std::net::Ipv4Addr;

use hickory_proto::rr::rdata::{A, TXT};
use hickory_proto::rr::{Name, RData, RecordType};
use proptest::prelude::*;

use super::*;

fn guest(number: u32) -> IpAddr {
    Ipv4Addr::from(number).into()
}

fn key(number: usize) -> Key {
    let name = Name::from_ascii(format!("h{number}.example.")).expect("a name");
    Key { name, record_type: RecordType::A }
}

fn answer(data: RData, ttl: u64) -> Arc<Answer> {
    let record = Record::from_rdata(Name::root(), 60, data);
    Arc::new(Answer { found: Found::Records(vec![record]), ttl: Duration::from_secs(ttl) })
}

fn small() -> Arc<Answer> {
    answer(RData::A(A(Ipv4Addr::new(203, 0, 113, 1))), 60)
}

fn text(length: usize) -> Arc<Answer> {
    answer(RData::TXT(TXT::new(vec!["x".repeat(250); length / 250])), 60)
}

/// Asserts what holds after every use: the tables agree, and no limit is exceeded.
fn check(cache: &Cache) {
    assert!(cache.entries.len() <= CACHE_ENTRIES_MAX && cache.bytes <= CACHE_BYTES_MAX);
    assert_eq!(cache.bytes, cache.entries.values().map(|entry| entry.bytes).sum::<usize>());
    assert_eq!(cache.entries.len(), cache.shares.values().map(|share| share.by_use.len()).sum::<usize>());
    for (owner, share) in &cache.shares {
        assert!(!share.by_use.is_empty());
        assert!(
            share.by_use.len() <= CACHE_ENTRIES_PER_GUEST_MAX && share.bytes <= CACHE_BYTES_PER_GUEST_MAX
        );
        for (used, key) in &share.by_use {
            let entry = &cache.entries[key];
            assert_eq!((entry.used, entry.owner), (*used, *owner));
        }
    }
}

#[test]
fn an_answer_is_returned_until_its_time_ends() {
    let (mut cache, now) = (Cache::default(), Instant::now());
    cache.insert(key(1), small(), guest(1), now);
    let (answer, left) = cache.get(&key(1), now + Duration::from_secs(20)).expect("it is kept");
    assert_eq!((answer, left), (small(), Duration::from_secs(40)));
    assert!(cache.get(&key(1), now + Duration::from_secs(60)).is_none());
    assert!(cache.entries.is_empty() && cache.shares.is_empty() && cache.bytes == 0);
}

#[test]
fn a_name_is_found_in_whatever_case_it_is_asked_for() {
    let (mut cache, now) = (Cache::default(), Instant::now());
    cache.insert(key(1), small(), guest(1), now);
    let upper = Key { name: Name::from_ascii("H1.EXAMPLE.").expect("a name"), record_type: RecordType::A };
    assert!(cache.get(&upper, now).is_some());
    let other = Key { record_type: RecordType::TXT, ..upper };
    assert!(cache.get(&other, now).is_none());
}

#[test]
fn a_newer_answer_replaces_the_older_one_and_its_owner() {
    let (mut cache, now) = (Cache::default(), Instant::now());
    cache.insert(key(1), small(), guest(1), now);
    cache.insert(key(1), text(500), guest(2), now);
    check(&cache);
    assert_eq!(cache.entries.len(), 1);
    assert!(cache.shares.contains_key(&guest(2)) && !cache.shares.contains_key(&guest(1)));
}

#[test]
fn a_guest_that_asks_for_many_names_evicts_only_its_own_answers() {
    let (mut cache, now) = (Cache::default(), Instant::now());
    cache.insert(key(0), small(), guest(1), now);
    for number in 1..=3 * CACHE_ENTRIES_PER_GUEST_MAX {
        cache.insert(key(number), small(), guest(2), now);
    }
    check(&cache);
    assert!(cache.get(&key(0), now).is_some(), "the other guest's answer is kept");
    let is_kept = |number: usize| cache.entries.contains_key(&key(number));
    assert!(!is_kept(1) && is_kept(3 * CACHE_ENTRIES_PER_GUEST_MAX));
    assert_eq!(cache.shares[&guest(2)].by_use.len(), CACHE_ENTRIES_PER_GUEST_MAX);
}

#[test]
fn the_answers_that_are_used_stay() {
    let (mut cache, now) = (Cache::default(), Instant::now());
    for number in 0..2 * CACHE_ENTRIES_PER_GUEST_MAX {
        cache.insert(key(number), small(), guest(1), now);
        assert!(cache.get(&key(0), now).is_some(), "{number}");
    }
    check(&cache);
}

#[test]
fn a_guest_has_a_limit_of_bytes_too() {
    let (mut cache, now) = (Cache::default(), Instant::now());
    for number in 0..CACHE_ENTRIES_PER_GUEST_MAX {
        cache.insert(key(number), text(10_000), guest(1), now);
    }
    check(&cache);
    assert!(cache.shares[&guest(1)].by_use.len() < 100);
}

#[test]
fn an_answer_that_is_too_large_is_not_kept() {
    let (mut cache, now) = (Cache::default(), Instant::now());
    cache.insert(key(1), text(20_000), guest(1), now);
    assert!(cache.entries.is_empty());
}

#[test]
fn a_full_cache_takes_from_the_guest_with_the_largest_part() {
    let (mut cache, now) = (Cache::default(), Instant::now());
    cache.insert(key(0), small(), guest(0), now);
    let mut number = 1;
    for owner in 1..=20 {
        for _ in 0..90 {
            cache.insert(key(number), text(10_000), guest(owner), now);
            number += 1;
        }
    }
    check(&cache);
    assert!(cache.bytes > CACHE_BYTES_MAX - CACHE_ENTRY_BYTES_MAX, "the cache is full");
    assert!(cache.get(&key(0), now).is_some(), "the guest with the smallest part keeps it");
}

proptest! {
    #[test]
    fn the_tables_agree_after_any_sequence_of_uses(
        uses in prop::collection::vec((any::<bool>(), 0usize..8, 0u32..3, 0u64..90, 0usize..3), 0..30),
    ) {
        let (mut cache, start) = (Cache::default(), Instant::now());
        for (is_insert, number, owner, at, size) in uses {
            let now = start + Duration::from_secs(at);
            if is_insert {
                cache.insert(key(number), text(size * 3000), guest(owner), now);
            } else if let Some((_, left)) = cache.get(&key(number), now) {
                prop_assert!(!left.is_zero());
            }
            check(&cache);
        }
    }
}
