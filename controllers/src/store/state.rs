//! What the store holds in memory and readers see: exactly what is durable.
//!
//! Written by the writer only, in one step per batch; readers take the lock for one look.

use std::collections::{BTreeMap, BTreeSet};

use stead_schemas::names::{Name, Uid};

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
    /// Owner to owned.
    pub(super) owned: BTreeMap<Uid, BTreeSet<Uid>>,
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
        if let Some(owner) = &object.meta().owner {
            self.owned.entry(owner.uid.clone()).or_default().insert(uid.clone());
        }
        self.objects.insert(uid.clone(), object);
    }

    pub(super) fn remove(&mut self, uid: &Uid) {
        let removed = self.objects.remove(uid);
        let Some(owner) = removed.as_ref().and_then(|object| object.meta().owner.as_ref()) else { return };
        if let Some(owned) = self.owned.get_mut(&owner.uid) {
            owned.remove(uid);
            if owned.is_empty() {
                self.owned.remove(&owner.uid);
            }
        }
    }
}
