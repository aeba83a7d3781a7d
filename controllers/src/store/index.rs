//! The index of references: for a thing that is pointed at, the objects of one kind that point at it.
//!
//! Guarantees: it is what a scan of all objects would find ([`super::Store::stale_references`] compares), as
//! of the last commit for readers and as of the last staged step for a transaction.
//! Never: stored; it is built when the store opens.

use std::collections::{BTreeMap, BTreeSet};

use stead_schemas::names::Uid;
use stead_schemas::references::{Ref, Role, Target};

use super::object::Erased;

/// References of a state of an object, which may be none; its owner's among them, each once.
pub(super) fn references(object: Option<&Erased>) -> BTreeSet<Ref> {
    let Some(object) = object else { return BTreeSet::new() };
    let mut references: BTreeSet<Ref> = object.references().into_iter().collect();
    references.extend(object.meta().owner.as_ref().map(|owner| Ref::to_owner(&owner.uid)));
    references
}

/// The published half: who points at what.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Index(BTreeMap<Role, BTreeMap<Target, BTreeSet<Uid>>>);

impl Index {
    /// Takes the change of one object into the index.
    pub(super) fn change(&mut self, uid: &Uid, before: Option<&Erased>, after: Option<&Erased>) {
        let (before, after) = (references(before), references(after));
        for Ref { role, target } in before.difference(&after) {
            let Some(targets) = self.0.get_mut(role) else { continue };
            let Some(uids) = targets.get_mut(target) else { continue };
            uids.remove(uid);
            if uids.is_empty() {
                targets.remove(target);
            }
        }
        for Ref { role, target } in after.difference(&before) {
            self.0.entry(*role).or_default().entry(target.clone()).or_default().insert(uid.clone());
        }
    }

    /// Objects that point at this, in uid order.
    pub(super) fn referring(&self, reference: &Ref) -> impl Iterator<Item = &Uid> + use<'_> {
        let uids = self.0.get(&reference.role).and_then(|targets| targets.get(&reference.target));
        uids.into_iter().flatten()
    }

    /// Everything that is pointed at in this role.
    fn targets(&self, role: Role) -> impl Iterator<Item = &Target> {
        self.0.get(&role).into_iter().flat_map(|targets| targets.keys())
    }

    /// The references in which two indexes differ.
    pub(super) fn difference(&self, other: &Self) -> Vec<Ref> {
        let flat = |index: &Self| -> BTreeSet<(Ref, Uid)> {
            let mut flat = BTreeSet::new();
            for (role, targets) in &index.0 {
                for (target, uids) in targets {
                    let reference = Ref { role: *role, target: target.clone() };
                    flat.extend(uids.iter().map(|uid| (reference.clone(), uid.clone())));
                }
            }
            flat
        };
        flat(self).symmetric_difference(&flat(other)).map(|(reference, _)| reference.clone()).collect()
    }
}

/// The staged half: references that a batch adds to the published ones or takes from them.
#[derive(Debug, Default)]
pub(super) struct StagedIndex(BTreeMap<Role, BTreeMap<Target, BTreeMap<Uid, bool>>>);

impl StagedIndex {
    /// Takes one staged step, or its undoing, into the index.
    pub(super) fn change(&mut self, uid: &Uid, before: Option<&Erased>, after: Option<&Erased>) {
        let (before, after) = (references(before), references(after));
        let gone = before.difference(&after).map(|reference| (reference, false));
        let new = after.difference(&before).map(|reference| (reference, true));
        for (Ref { role, target }, is_there) in gone.chain(new) {
            let uids = self.0.entry(*role).or_default().entry(target.clone()).or_default();
            uids.insert(uid.clone(), is_there);
        }
    }

    fn staged(&self, role: Role, target: &Target) -> Option<&BTreeMap<Uid, bool>> {
        self.0.get(&role)?.get(target)
    }

    /// Objects that point at this by the published index and what is staged over it: those of before the
    /// batch first, each in uid order.
    pub(super) fn referring<'a>(
        &'a self,
        published: &'a Index,
        reference: &Ref,
    ) -> impl Iterator<Item = &'a Uid> + use<'a> {
        let staged = self.staged(reference.role, &reference.target);
        let is_unchanged = move |uid: &&Uid| staged.is_none_or(|staged| !staged.contains_key(*uid));
        let new = staged.into_iter().flatten().filter(|(_, is_there)| **is_there).map(|(uid, _)| uid);
        published.referring(reference).filter(is_unchanged).chain(new)
    }

    /// Everything that is pointed at in this role, likewise.
    pub(super) fn targets(&self, published: &Index, role: Role) -> BTreeSet<Target> {
        let staged = self.0.get(&role).into_iter().flat_map(|targets| targets.keys());
        let all: BTreeSet<&Target> = published.targets(role).chain(staged).collect();
        let is_pointed_at = |target: &Target| {
            let reference = Ref { role, target: target.clone() };
            self.referring(published, &reference).next().is_some()
        };
        all.into_iter().filter(|target| is_pointed_at(target)).cloned().collect()
    }
}
