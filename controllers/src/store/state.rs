//! What the store holds in memory and readers see: exactly what is durable.
//!
//! Written by the writer only, in one step per batch; readers take the lock for one look.

use std::collections::BTreeMap;

use stead_schemas::names::{Name, Uid};

use super::index::Index;
use super::object::{Erased, Kinds};

/// A stored record that cannot be read. It is not absent: its name and claims stay taken and its
/// uid is nobody's orphan. `Tx::remove_unreadable` is the only way out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    pub kind: String,
    pub uid: Uid,
    pub cause: String,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) tables: BTreeMap<&'static str, Table>,
    /// By uid and kind.
    pub(super) unreadable: BTreeMap<(Uid, String), Unreadable>,
    pub(super) revision: u64,
}

/// The objects of one kind.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) objects: BTreeMap<Uid, Erased>,
    /// Names of live objects, and of unreadable ones.
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
    /// When the store was opened without the kind: every use of the kind would show it.
    pub(super) fn table(&self, kind: &str) -> &Table {
        self.tables.get(kind).unwrap_or_else(|| panic!("the store was opened without kind {kind}"))
    }

    pub(super) fn table_mut(&mut self, kind: &'static str) -> &mut Table {
        self.tables.get_mut(kind).unwrap_or_else(|| panic!("the store was opened without kind {kind}"))
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

    /// The index as a scan of all objects makes it.
    pub(super) fn scanned(&self) -> Index {
        let mut index = Index::default();
        self.objects.iter().for_each(|(uid, object)| index.change(uid, None, Some(object)));
        index
    }
}
