//! Claims: the owners of values in tables (addresses, context ids, classes).
//!
//! Guarantees: a value has one owner. The lowest free number of a range is found in O(log n), because taken
//! numbers are kept as merged intervals: the number after an interval is free.
//! Never: drops a claim without a request. A claim is removed with its owner's record or by `release`.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use stead_schemas::names::Uid;

/// All claim tables. Only the writer uses them.
#[derive(Debug, Default)]
pub(super) struct Claims {
    tables: BTreeMap<String, Table>,
    by_owner: BTreeMap<Uid, BTreeSet<(String, String)>>,
}

#[derive(Debug, Default)]
struct Table {
    owners: BTreeMap<String, Uid>,
    /// Start to end (inclusive) of each run of taken numbers; neighbouring runs are always merged.
    runs: BTreeMap<u32, u32>,
}

impl Claims {
    pub(super) fn owner(&self, table: &str, value: &str) -> Option<&Uid> {
        self.tables.get(table)?.owners.get(value)
    }

    pub(super) fn count(&self, table: &str) -> usize {
        self.tables.get(table).map_or(0, |table| table.owners.len())
    }

    /// Returns the claims of an owner, as table and value.
    pub(super) fn of(&self, owner: &Uid) -> Vec<(String, String)> {
        self.by_owner.get(owner).map(|claims| claims.iter().cloned().collect()).unwrap_or_default()
    }

    /// Takes a free value.
    pub(super) fn insert(&mut self, table: &str, value: &str, owner: &Uid) {
        let entry = self.tables.entry(table.to_owned()).or_default();
        let before = entry.owners.insert(value.to_owned(), owner.clone());
        assert!(before.is_none(), "claim {table}/{value} was taken twice");
        if let Some(number) = number(value) {
            entry.take(number);
        }
        self.by_owner.entry(owner.clone()).or_default().insert((table.to_owned(), value.to_owned()));
    }

    /// Frees a value held by `owner`.
    pub(super) fn remove(&mut self, table: &str, value: &str, owner: &Uid) {
        let entry = self.tables.get_mut(table).expect("a held claim has its table");
        let before = entry.owners.remove(value);
        assert_eq!(before.as_ref(), Some(owner), "claim {table}/{value} is freed by its owner only");
        if let Some(number) = number(value) {
            entry.free(number);
        }
        if let Some(claims) = self.by_owner.get_mut(owner) {
            claims.remove(&(table.to_owned(), value.to_owned()));
            if claims.is_empty() {
                self.by_owner.remove(owner);
            }
        }
    }

    /// Returns the lowest free number of the range.
    pub(super) fn lowest_free(&self, table: &str, range: &RangeInclusive<u32>) -> Option<u32> {
        let (low, high) = (*range.start(), *range.end());
        let run_end = self
            .tables
            .get(table)
            .and_then(|table| table.runs.range(..=low).next_back())
            .map(|(_, &end)| end)
            .filter(|&end| end >= low);
        let free = match run_end {
            Some(end) => end.checked_add(1)?,
            None => low,
        };
        (free <= high).then_some(free)
    }
}

/// Returns the number that a value stands for, if its text is the canonical one: `7`, not `07`.
fn number(value: &str) -> Option<u32> {
    value.parse().ok().filter(|number: &u32| number.to_string() == value)
}

impl Table {
    fn take(&mut self, number: u32) {
        let (mut start, mut end) = (number, number);
        if let Some((&left, &left_end)) = self.runs.range(..number).next_back()
            && left_end.checked_add(1) == Some(number)
        {
            start = left;
        }
        if let Some(right) = number.checked_add(1)
            && let Some(right_end) = self.runs.remove(&right)
        {
            end = right_end;
        }
        self.runs.insert(start, end);
    }

    fn free(&mut self, number: u32) {
        let (&start, &end) = self.runs.range(..=number).next_back().expect("a taken number is in a run");
        assert!(number <= end, "a taken number is in a run");
        if start < number {
            self.runs.insert(start, number - 1);
        } else {
            self.runs.remove(&start);
        }
        if number < end {
            self.runs.insert(number + 1, end);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn owner() -> Uid {
        "abcdefghijklmnopqrstuvwx".parse().expect("valid")
    }

    #[test]
    fn the_ends_of_the_number_range_can_be_taken_and_freed() {
        let mut claims = Claims::default();
        for value in [u32::MAX, 0] {
            claims.insert("t", &value.to_string(), &owner());
        }
        assert_eq!(claims.lowest_free("t", &(u32::MAX..=u32::MAX)), None);
        assert_eq!(claims.lowest_free("t", &(0..=5)), Some(1));
        claims.insert("t", "text", &owner());
        claims.insert("t", "007", &owner());
        assert_eq!(claims.lowest_free("t", &(7..=7)), Some(7), "007 is a text, not the number 7");
        assert_eq!(claims.count("t"), 4);
        for (table, value) in claims.of(&owner()) {
            claims.remove(&table, &value, &owner());
        }
        assert_eq!(claims.lowest_free("t", &(0..=u32::MAX)), Some(0));
        assert!(claims.of(&owner()).is_empty());
    }

    proptest! {
        #[test]
        fn the_lowest_free_number_is_that_of_a_plain_set(
            steps in proptest::collection::vec((any::<bool>(), 0u32..24), 1..120),
        ) {
            let (mut claims, mut model) = (Claims::default(), BTreeSet::new());
            for (is_take, number) in steps {
                if is_take && model.insert(number) {
                    claims.insert("t", &number.to_string(), &owner());
                } else if !is_take && model.remove(&number) {
                    claims.remove("t", &number.to_string(), &owner());
                }
                for low in [0, 5, 20] {
                    let expected = (low..=22).find(|n| !model.contains(n));
                    prop_assert_eq!(claims.lowest_free("t", &(low..=22)), expected);
                }
            }
        }
    }
}
