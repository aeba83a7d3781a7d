//! The index of references: for each referenced target, the objects of one kind that refer to it.
//!
//! Guarantees: the index equals the result of a scan of all objects ([`super::Store::stale_references`]
//! compares them). It is that of the last commit for readers, and that of the last staged step for a
//! transaction.
//! Never: stored. It is built when the store opens.

use std::collections::{BTreeMap, BTreeSet};

use stead_schemas::names::Uid;
use stead_schemas::references::{Ref, Role, Target};

use super::object::Erased;

/// Returns the references of a state of an object, which may be `None`. The reference to its owner is
/// included, and each occurs once.
pub(super) fn references(object: Option<&Erased>) -> BTreeSet<Ref> {
    let Some(object) = object else { return BTreeSet::new() };
    let mut references: BTreeSet<Ref> = object.references().into_iter().collect();
    references.extend(object.meta().owner.as_ref().map(|owner| Ref::to_owner(&owner.uid)));
    references
}

/// The published half of the index: the referring objects by role and target.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Index(BTreeMap<Role, BTreeMap<Target, BTreeSet<Uid>>>);

impl Index {
    /// Applies the change of one object to the index.
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

    /// Returns the objects that refer to this target, in uid order.
    pub(super) fn referring(&self, reference: &Ref) -> impl Iterator<Item = &Uid> + use<'_> {
        let uids = self.0.get(&reference.role).and_then(|targets| targets.get(&reference.target));
        uids.into_iter().flatten()
    }

    /// Returns all targets that are referred to in this role.
    fn targets(&self, role: Role) -> impl Iterator<Item = &Target> {
        self.0.get(&role).into_iter().flat_map(|targets| targets.keys())
    }

    /// Returns the references in which two indexes differ.
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

/// The staged half of the index: references that a batch adds to the published ones or removes from them.
#[derive(Debug, Default)]
pub(super) struct StagedIndex(BTreeMap<Role, BTreeMap<Target, BTreeMap<Uid, bool>>>);

impl StagedIndex {
    /// Applies a staged step, or its reversal, to the index.
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

    /// Returns the objects that refer to this target by the published index and the staged changes. The
    /// objects from before the batch come first, each group in uid order.
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

    /// Returns all targets that are referred to in this role, by the published index and the staged changes.
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
