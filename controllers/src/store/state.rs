//! The state that the store holds in memory and readers see: exactly the durable state.
//!
//! Only the writer changes it, in one step per batch. Readers take the lock for one read.

use std::collections::BTreeMap;

use stead_schemas::names::{Name, Uid};
use stead_schemas::resource::Usage;

use super::index::Index;
use super::object::{Erased, Kinds};

/// A stored record that cannot be read. It does not count as absent: its name and claims stay taken, and its
/// uid is no orphan. Only `Tx::remove_unreadable` removes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    pub kind: String,
    pub uid: Uid,
    pub cause: String,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) tables: BTreeMap<&'static str, Table>,
    /// The unreadable records, by uid and kind.
    pub(super) unreadable: BTreeMap<(Uid, String), Unreadable>,
    /// The resources that objects of all kinds take together.
    pub(super) usage: Usage,
    pub(super) revision: u64,
}

/// The objects of one kind.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) objects: BTreeMap<Uid, Erased>,
    /// The names of live objects and of unreadable ones.
    pub(super) names: BTreeMap<Name, Uid>,
    /// The index of their references.
    pub(super) index: Index,
}

impl State {
    pub(super) fn new(kinds: &Kinds) -> Self {
        let tables = kinds.names().map(|kind| (kind, Table::default())).collect();
        Self { tables, ..Self::default() }
    }

    /// # Panics
    /// Panics if the store was opened without the kind: every use of the kind would show the mistake.
    pub(super) fn table(&self, kind: &str) -> &Table {
        self.tables.get(kind).unwrap_or_else(|| panic!("the store was opened without kind {kind}"))
    }

    pub(super) fn table_mut(&mut self, kind: &'static str) -> &mut Table {
        self.tables.get_mut(kind).unwrap_or_else(|| panic!("the store was opened without kind {kind}"))
    }

    /// Returns the sum that a scan of all objects makes.
    pub(super) fn scanned_usage(&self) -> Usage {
        let mut sum = Usage::default();
        let objects = self.tables.values().flat_map(|table| table.objects.values());
        objects.for_each(|object| sum += object.usage());
        sum
    }

    pub(super) fn is_unreadable(&self, uid: &Uid) -> bool {
        self.unreadable.range((uid.clone(), String::new())..).next().is_some_and(|((at, _), _)| at == uid)
    }
}

impl Table {
    pub(super) fn put(&mut self, uid: &Uid, object: Erased) {
        self.index.change(uid, self.objects.get(uid), Some(&object));
        self.objects.insert(uid.clone(), object);
    }

    pub(super) fn remove(&mut self, uid: &Uid) {
        let removed = self.objects.remove(uid);
        self.index.change(uid, removed.as_ref(), None);
    }

    /// Returns the index that a scan of all objects makes.
    pub(super) fn scanned(&self) -> Index {
        let mut index = Index::default();
        self.objects.iter().for_each(|(uid, object)| index.change(uid, None, Some(object)));
        index
    }
}
