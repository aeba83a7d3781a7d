//! `Tx`: the operations of a transaction, and the rules for the life of every object.
//!
//! Guarantees: the generation starts at 1 and changes only when the spec changes. A name belongs to one live
//! object of its kind, and is free again once deletion is requested. A claim belongs to one owner until the
//! owner's record is gone. When the last finalizer of a deleted object is removed, its record is removed and
//! the deletion of all objects it owned is requested, in the same transaction.
//! Never: a client writes a status, or a reconciler a spec. The verbs of reconcilers belong to the store
//! (`write_status`, `remove_finalizer`) and not to the transaction.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::sync::Arc;

use jiff::Timestamp;
use stead_schemas::limits::OBJECTS_PER_KIND_MAX;
use stead_schemas::meta::{Kind, Meta, Object, OwnerRef, Tags};
use stead_schemas::names::{Name, Uid};
use stead_schemas::numbers::Generation;
use stead_schemas::references::{Ref, Role, Target};
use stead_schemas::resource::Usage;

use super::error::{Claimed, StoreError, TxError};
use super::export::Export;
use super::object::{Erased, typed};
use super::stage::Stage;
use crate::runtime::Ids;

/// A new object.
#[derive(Debug, Clone)]
pub struct New<K: Kind> {
    /// The uid; `None` draws a new uid. It is given if another step of the transaction needs it first.
    pub uid: Option<Uid>,
    pub name: Name,
    pub tags: Tags,
    pub owner: Option<OwnerRef>,
    pub spec: K::Spec,
}

/// A transaction, run by the writer. All of its steps are stored together or not at all.
pub struct Tx<'a> {
    stage: &'a mut Stage,
    ids: &'a dyn Ids,
    now: Timestamp,
    /// Owners that must exist when the closure ends.
    owners: BTreeSet<Uid>,
    has_created: bool,
}

impl std::fmt::Debug for Tx<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tx").field("now", &self.now).finish_non_exhaustive()
    }
}

impl<'a> Tx<'a> {
    pub(super) fn new(stage: &'a mut Stage, ids: &'a dyn Ids, now: Timestamp) -> Self {
        Self { stage, ids, now, owners: BTreeSet::new(), has_created: false }
    }

    /// Returns the time of the transaction, which is the same for all of its steps.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        self.now
    }

    #[must_use]
    pub fn next_uid(&self) -> Uid {
        self.ids.next()
    }

    #[must_use]
    pub fn get<K: Kind>(&self, uid: &Uid) -> Option<Arc<Object<K>>> {
        self.stage.get(K::NAME, uid).as_ref().map(typed)
    }

    /// Returns the live object of this name.
    #[must_use]
    pub fn find<K: Kind>(&self, name: &Name) -> Option<Arc<Object<K>>> {
        self.get(&self.stage.named(K::NAME, name)?)
    }

    /// Returns all objects of the kind, in uid order.
    #[must_use]
    pub fn list<K: Kind>(&self) -> Vec<Arc<Object<K>>> {
        self.stage.list(K::NAME).values().map(typed).collect()
    }

    #[must_use]
    pub fn count<K: Kind>(&self) -> usize {
        self.stage.count_of(K::NAME)
    }

    /// Returns what all objects take of their host, as it is staged.
    #[must_use]
    pub fn usage(&self) -> Usage {
        self.stage.usage
    }

    /// Returns the objects of the kind that `owner` owns.
    #[must_use]
    pub fn owned_by<K: Kind>(&self, owner: &Uid) -> Vec<Arc<Object<K>>> {
        self.referring(&Ref::to_owner(owner))
    }

    /// Returns the objects of the kind that refer to this target.
    #[must_use]
    pub fn referring<K: Kind>(&self, reference: &Ref) -> Vec<Arc<Object<K>>> {
        self.stage.referring(K::NAME, reference).iter().map(typed).collect()
    }

    /// Returns the first object of the kind that refers to this target and satisfies `fits`.
    #[must_use]
    pub fn find_referring<K: Kind>(
        &self,
        reference: &Ref,
        fits: impl Fn(&Object<K>) -> bool,
    ) -> Option<Arc<Object<K>>> {
        self.stage.find_referring(K::NAME, reference, |object| fits(&typed(object))).as_ref().map(typed)
    }

    /// Returns all targets that objects of the kind refer to in this role.
    #[must_use]
    pub fn targets<K: Kind>(&self, role: Role) -> BTreeSet<Target> {
        self.stage.targets(K::NAME, role)
    }

    /// Stages a new object with generation 1 and its kind's finalizer. Its owner must be in the store when
    /// the transaction ends, but not before.
    ///
    /// # Errors
    /// Returns `NameTaken`, `UidTaken` or `TooMany`.
    pub fn create<K: Kind>(&mut self, new: New<K>) -> Result<Arc<Object<K>>, TxError> {
        let New { uid, name, tags, owner, spec } = new;
        let kind = K::NAME;
        if let Some(by) = self.stage.named(kind, &name) {
            return Err(TxError::NameTaken { kind, name, by });
        }
        if self.stage.count_of(kind) >= OBJECTS_PER_KIND_MAX {
            return Err(TxError::TooMany { kind });
        }
        let uid = uid.unwrap_or_else(|| self.ids.next());
        if self.stage.exists(&uid) {
            return Err(TxError::UidTaken { kind, uid });
        }
        self.has_created = true;
        self.owners.extend(owner.iter().map(|owner| owner.uid.clone()));
        let resource_version = self.stage.next_revision();
        let meta = Meta {
            uid: uid.clone(),
            name: name.clone(),
            tags,
            generation: Generation(1),
            resource_version,
            created_at: self.now,
            deletion_requested_at: None,
            finalizers: BTreeSet::from([K::FINALIZER.to_owned()]),
            owner,
        };
        let object = Arc::new(Object::<K> { meta, spec, status: K::Status::default() });
        self.stage.put(kind, &uid, Some(object.clone()), resource_version);
        self.stage.put_name(kind, &name, &uid, true);
        Ok(object)
    }

    /// Changes the spec in place. The generation changes only if the spec differs afterwards.
    ///
    /// # Errors
    /// Returns `NotFound`, `Unreadable`, `Deleting` or `Stale`.
    pub fn update_spec<K: Kind>(
        &mut self,
        uid: &Uid,
        expected_resource_version: Option<u64>,
        change: impl FnOnce(&mut K::Spec),
    ) -> Result<Arc<Object<K>>, TxError> {
        let old = self.for_update::<K>(uid, expected_resource_version)?;
        let mut spec = old.spec.clone();
        change(&mut spec);
        if spec == old.spec {
            return Ok(old);
        }
        let meta = Meta { generation: old.meta.generation.next(), ..old.meta.clone() };
        Ok(self.put_typed(Object { meta, spec, status: old.status.clone() }))
    }

    /// Replaces the tags.
    ///
    /// # Errors
    /// Returns `NotFound`, `Unreadable`, `Deleting` or `Stale`.
    pub fn update_tags<K: Kind>(
        &mut self,
        uid: &Uid,
        expected_resource_version: Option<u64>,
        tags: Tags,
    ) -> Result<Arc<Object<K>>, TxError> {
        let old = self.for_update::<K>(uid, expected_resource_version)?;
        if old.meta.tags == tags {
            return Ok(old);
        }
        let meta = Meta { tags, ..old.meta.clone() };
        Ok(self.put_typed(Object { meta, spec: old.spec.clone(), status: old.status.clone() }))
    }

    /// Gives the object another name and other tags, and removes its owner. It counts as created now.
    ///
    /// # Errors
    /// Returns `NameTaken`, `NotFound`, `Unreadable` or `Deleting`.
    pub fn release_as<K: Kind>(
        &mut self,
        uid: &Uid,
        name: Name,
        tags: Tags,
    ) -> Result<Arc<Object<K>>, TxError> {
        let old = self.rename::<K>(uid, name)?;
        let meta = Meta { tags, owner: None, created_at: self.now, ..old.meta.clone() };
        Ok(self.put_typed(Object { meta, spec: old.spec.clone(), status: old.status.clone() }))
    }

    /// Gives the object another name. The name that it has already changes nothing.
    ///
    /// # Errors
    /// Returns `NameTaken`, `NotFound`, `Unreadable` or `Deleting`.
    pub fn rename<K: Kind>(&mut self, uid: &Uid, name: Name) -> Result<Arc<Object<K>>, TxError> {
        let old = self.for_update::<K>(uid, None)?;
        let kind = K::NAME;
        match self.stage.named(kind, &name) {
            Some(by) if by == *uid => return Ok(old),
            Some(by) => return Err(TxError::NameTaken { kind, name, by }),
            None => {}
        }
        self.stage.put_name(kind, &old.meta.name, uid, false);
        self.stage.put_name(kind, &name, uid, true);
        let meta = Meta { name, ..old.meta.clone() };
        Ok(self.put_typed(Object { meta, spec: old.spec.clone(), status: old.status.clone() }))
    }

    /// Marks the object for deletion and frees its name. A repeated call returns `Ok` and changes nothing.
    ///
    /// # Errors
    /// Returns `NotFound` or `Unreadable`.
    pub fn request_deletion<K: Kind>(&mut self, uid: &Uid) -> Result<Arc<Object<K>>, TxError> {
        let object = self.existing::<K>(uid)?;
        let erased: Erased = object;
        Ok(typed(&self.request_deletion_of(&erased)))
    }

    /// Removes a record that cannot be read, by force, with its name and claims. The deletion of the objects
    /// it owned is requested, and its objects on the host become orphans. Returns `false` if there is no such
    /// record.
    pub fn remove_unreadable(&mut self, kind: &str, uid: &Uid) -> bool {
        let is_there = self.stage.is_unreadable(kind, uid);
        if is_there {
            self.stage.forget(kind, uid);
            self.delete_owned(uid);
        }
        is_there
    }

    /// Takes a value of a table for an owner. A repeated call by the same owner returns `Ok`.
    ///
    /// # Errors
    /// Returns the owner that holds the value.
    ///
    /// # Panics
    /// Panics if the table's name contains a slash, which is a mistake of the program.
    pub fn claim(&mut self, table: &'static str, value: impl Display, owner: &Uid) -> Result<(), Claimed> {
        assert!(!table.contains('/'), "claim table {table:?} cannot be in a key");
        let value = value.to_string();
        match self.stage.claims.owner(table, &value) {
            Some(by) if by == owner => Ok(()),
            Some(by) => Err(Claimed { by: by.clone() }),
            None => {
                self.stage.claim(table, &value, owner);
                self.owners.insert(owner.clone());
                Ok(())
            }
        }
    }

    /// Takes the lowest free number of a range. Returns `None` if all are taken.
    pub fn claim_lowest(
        &mut self,
        table: &'static str,
        range: RangeInclusive<u32>,
        owner: &Uid,
    ) -> Option<u32> {
        let free = self.stage.claims.lowest_free(table, &range)?;
        self.claim(table, free, owner).expect("a number found free is free");
        Some(free)
    }

    /// Releases a value before its owner's record is removed. Returns `false` if `owner` does not hold it.
    pub fn release(&mut self, table: &'static str, value: impl Display, owner: &Uid) -> bool {
        let value = value.to_string();
        let is_held = self.stage.claims.owner(table, &value) == Some(owner);
        if is_held {
            self.stage.release(table.to_owned(), value, owner);
        }
        is_held
    }

    /// Returns the owner that holds a value.
    #[must_use]
    pub fn claimed_by(&self, table: &'static str, value: impl Display) -> Option<Uid> {
        self.stage.claims.owner(table, &value.to_string()).cloned()
    }

    /// Returns the number of values of a table that are taken.
    #[must_use]
    pub fn claims(&self, table: &'static str) -> usize {
        self.stage.claims.count(table)
    }

    /// Exports everything as it is staged: the state that this transaction's group makes durable.
    pub(super) fn export(&self) -> Export {
        self.stage.export()
    }

    /// Returns `false` if the object is gone or already has this status.
    pub(super) fn write_status<K: Kind>(&mut self, uid: &Uid, status: K::Status) -> bool {
        let Some(old) = self.get::<K>(uid).filter(|old| old.status != status) else { return false };
        self.put_typed(Object::<K> { meta: old.meta.clone(), spec: old.spec.clone(), status });
        true
    }

    /// Returns `true` if the record was removed with the finalizer.
    pub(super) fn remove_finalizer<K: Kind>(&mut self, uid: &Uid) -> bool {
        let Some(old) = self.stage.get(K::NAME, uid) else { return false };
        let mut meta = old.meta().clone();
        meta.finalizers.remove(K::FINALIZER);
        if meta.is_deleting() && meta.finalizers.is_empty() {
            self.remove(&old);
            return true;
        }
        if meta.finalizers != old.meta().finalizers {
            self.put_meta(&old, meta);
        }
        false
    }

    /// Checks whether the steps that a successful closure staged may be stored.
    pub(super) fn check(&self) -> Result<(), StoreError> {
        match self.owners.iter().find(|owner| !self.stage.exists(owner)) {
            Some(owner) => Err(StoreError::OwnerGone { owner: owner.clone() }),
            None => Ok(()),
        }
    }

    /// Returns true if the transaction makes new objects.
    pub(super) fn has_created(&self) -> bool {
        self.has_created
    }

    fn existing<K: Kind>(&self, uid: &Uid) -> Result<Arc<Object<K>>, TxError> {
        let kind = K::NAME;
        self.get(uid).ok_or_else(|| match self.stage.is_unreadable(kind, uid) {
            true => TxError::Unreadable { kind, uid: uid.clone() },
            false => TxError::NotFound { kind, uid: uid.clone() },
        })
    }

    fn for_update<K: Kind>(&self, uid: &Uid, expected: Option<u64>) -> Result<Arc<Object<K>>, TxError> {
        let kind = K::NAME;
        let old = self.existing::<K>(uid)?;
        let actual = old.meta.resource_version;
        match expected {
            _ if old.meta.is_deleting() => Err(TxError::Deleting { kind, uid: uid.clone() }),
            Some(expected) if expected != actual => {
                Err(TxError::Stale { kind, uid: uid.clone(), expected, actual })
            }
            _ => Ok(old),
        }
    }

    fn put_typed<K: Kind>(&mut self, mut object: Object<K>) -> Arc<Object<K>> {
        object.meta.resource_version = self.stage.next_revision();
        let object = Arc::new(object);
        self.stage.put(K::NAME, &object.meta.uid, Some(object.clone()), object.meta.resource_version);
        object
    }

    fn put_meta(&mut self, old: &Erased, mut meta: Meta) -> Erased {
        meta.resource_version = self.stage.next_revision();
        let (uid, revision) = (meta.uid.clone(), meta.resource_version);
        let object = old.with_meta(meta);
        self.stage.put(object.kind(), &uid, Some(object.clone()), revision);
        object
    }

    fn request_deletion_of(&mut self, old: &Erased) -> Erased {
        if old.meta().is_deleting() {
            return old.clone();
        }
        let meta = Meta { deletion_requested_at: Some(self.now), ..old.meta().clone() };
        self.stage.put_name(old.kind(), &meta.name, &meta.uid, false);
        let is_free = meta.finalizers.is_empty();
        let object = self.put_meta(old, meta);
        if is_free {
            self.remove(&object);
        }
        object
    }

    /// Removes a deleted object's record, frees its claims, and requests the deletion of the objects it owns.
    fn remove(&mut self, object: &Erased) {
        let uid = object.meta().uid.clone();
        let revision = self.stage.next_revision();
        self.stage.put(object.kind(), &uid, None, revision);
        for (table, value) in self.stage.claims.of(&uid) {
            self.stage.release(table, value, &uid);
        }
        self.delete_owned(&uid);
    }

    fn delete_owned(&mut self, owner: &Uid) {
        for owned in self.stage.owned_by(owner) {
            self.request_deletion_of(&owned);
        }
    }
}
