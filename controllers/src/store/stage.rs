//! The changes that a batch has staged over the published state, and their reversal.
//!
//! Guarantees: every change is noted in `undo`. So a refused transaction leaves no trace in the batch, and a
//! failed commit leaves none in the store. The keys of a failed commit stay `suspect` until a commit
//! succeeds, so that the next commit overwrites any of its data on disk.
//! Never: visible to readers.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use stead_schemas::limits::STORE_SUSPECTS_MAX;
use stead_schemas::names::{Name, Uid};
use stead_schemas::references::{Ref, Role, Target};
use stead_schemas::resource::Usage;

use super::Shared;
use super::claims::Claims;
use super::codec::{self, Sealer};
use super::error::StoreError;
use super::export::Export;
use super::index::{self, StagedIndex};
use super::key::Key;
use super::kv::Batch;
use super::object::Erased;
use super::state::State;
use super::watch::{Change, Event};

#[derive(Debug)]
pub(super) struct Stage {
    pub(super) shared: Arc<Shared>,
    layers: BTreeMap<&'static str, Layer>,
    /// The claims of the last staged step. Readers never see them.
    pub(super) claims: Claims,
    /// The resources that all objects take after the last staged step.
    pub(super) usage: Usage,
    /// Unreadable records that this batch removes.
    forgotten: BTreeSet<(Uid, String)>,
    undo: Vec<Undo>,
    touched: Vec<Touch>,
    /// Keys whose value on disk may differ from the published one. The next commit writes them too.
    suspect: BTreeSet<Key>,
    /// The last revision that was used. It never goes back, so that a number is used once.
    revision: u64,
}

/// Staged objects and names of one kind. `None` is a removal.
#[derive(Debug, Default)]
struct Layer {
    objects: BTreeMap<Uid, Option<Erased>>,
    names: BTreeMap<Name, Option<Uid>>,
    index: StagedIndex,
}

#[derive(Debug)]
enum Undo {
    Object { kind: &'static str, uid: Uid, before: Option<Option<Erased>> },
    Name { kind: &'static str, name: Name, uid: Uid, before: Option<Option<Uid>> },
    Claimed { table: String, value: String, owner: Uid },
    Released { table: String, value: String, owner: Uid },
    Forgotten { at: (Uid, String) },
}

impl Undo {
    /// Returns the key whose value the step changed.
    fn key(&self) -> Key {
        match self {
            Self::Object { kind, uid, before: _ } => {
                Key::Object { kind: Cow::Borrowed(kind), uid: uid.clone() }
            }
            Self::Name { kind, name, uid, before: _ } => {
                Key::Name { kind: Cow::Borrowed(kind), uid: uid.clone(), name: name.clone() }
            }
            Self::Claimed { table, value, owner } | Self::Released { table, value, owner } => {
                Key::Claim { table: Cow::Owned(table.clone()), uid: owner.clone(), value: value.clone() }
            }
            Self::Forgotten { at: (uid, kind) } => {
                Key::Object { kind: Cow::Owned(kind.clone()), uid: uid.clone() }
            }
        }
    }
}

/// An object written by the running transaction. Touches are kept in order.
#[derive(Debug)]
struct Touch {
    kind: &'static str,
    uid: Uid,
    revision: u64,
    before: Option<Erased>,
}

impl Stage {
    pub(super) fn new(shared: Arc<Shared>, claims: Claims, suspect: BTreeSet<Key>, revision: u64) -> Self {
        let usage = shared.read().usage;
        Self {
            shared,
            usage,
            layers: BTreeMap::new(),
            claims,
            forgotten: BTreeSet::new(),
            undo: Vec::new(),
            touched: Vec::new(),
            suspect,
            revision,
        }
    }

    pub(super) fn next_revision(&mut self) -> u64 {
        self.revision += 1;
        self.revision
    }

    pub(super) fn get(&self, kind: &'static str, uid: &Uid) -> Option<Erased> {
        self.shared.visited(1);
        match self.layers.get(kind).and_then(|layer| layer.objects.get(uid)) {
            Some(staged) => staged.clone(),
            None => self.shared.read().table(kind).objects.get(uid).cloned(),
        }
    }

    pub(super) fn named(&self, kind: &'static str, name: &Name) -> Option<Uid> {
        match self.layers.get(kind).and_then(|layer| layer.names.get(name)) {
            Some(staged) => staged.clone(),
            None => self.shared.read().table(kind).names.get(name).cloned(),
        }
    }

    /// Returns all objects of a kind, in uid order.
    pub(super) fn list(&self, kind: &'static str) -> BTreeMap<Uid, Erased> {
        let mut all = self.shared.read().table(kind).objects.clone();
        for (uid, staged) in self.layers.get(kind).iter().flat_map(|layer| &layer.objects) {
            match staged {
                Some(object) => all.insert(uid.clone(), object.clone()),
                None => all.remove(uid),
            };
        }
        self.shared.visited(all.len());
        all
    }

    pub(super) fn count_of(&self, kind: &'static str) -> usize {
        let state = self.shared.read();
        let published = &state.table(kind).objects;
        let mut count = published.len();
        for (uid, staged) in self.layers.get(kind).iter().flat_map(|layer| &layer.objects) {
            match (staged.is_some(), published.contains_key(uid)) {
                (true, false) => count += 1,
                (false, true) => count -= 1,
                (true, true) | (false, false) => {}
            }
        }
        count
    }

    /// Returns the first object of a kind that refers to this target and satisfies `fits`.
    pub(super) fn find_referring(
        &self,
        kind: &'static str,
        reference: &Ref,
        fits: impl FnMut(&Erased) -> bool,
    ) -> Option<Erased> {
        self.pointing(&self.shared.read(), kind, reference).find(fits)
    }

    /// Returns all objects of a kind that refer to this target.
    pub(super) fn referring(&self, kind: &'static str, reference: &Ref) -> Vec<Erased> {
        self.pointing(&self.shared.read(), kind, reference).collect()
    }

    fn pointing<'a>(
        &'a self,
        state: &'a State,
        kind: &'static str,
        reference: &Ref,
    ) -> impl Iterator<Item = Erased> + use<'a> {
        let (table, layer) = (state.table(kind), self.layers.get(kind));
        let staged = layer.map(|layer| layer.index.referring(&table.index, reference));
        let published = layer.is_none().then(|| table.index.referring(reference));
        let uids = staged.into_iter().flatten().chain(published.into_iter().flatten());
        uids.filter_map(move |uid| {
            self.shared.visited(1);
            match layer.and_then(|layer| layer.objects.get(uid)) {
                Some(staged) => staged.clone(),
                None => table.objects.get(uid).cloned(),
            }
        })
    }

    /// Returns all targets that objects of a kind refer to in this role.
    pub(super) fn targets(&self, kind: &'static str, role: Role) -> BTreeSet<Target> {
        let state = self.shared.read();
        let (published, nothing) = (&state.table(kind).index, StagedIndex::default());
        self.layers.get(kind).map_or(&nothing, |layer| &layer.index).targets(published, role)
    }

    /// Returns the objects of any kind that `owner` owns.
    pub(super) fn owned_by(&self, owner: &Uid) -> Vec<Erased> {
        let kinds: Vec<&'static str> = self.shared.read().tables.keys().copied().collect();
        let reference = Ref::to_owner(owner);
        kinds.into_iter().flat_map(|kind| self.referring(kind, &reference)).collect()
    }

    /// Returns true if an object or an unreadable record of this uid exists, of any kind.
    pub(super) fn exists(&self, uid: &Uid) -> bool {
        let state = self.shared.read();
        let is_there = |kind: &&'static str| match self.layers.get(kind).and_then(|l| l.objects.get(uid)) {
            Some(staged) => staged.is_some(),
            None => state.table(kind).objects.contains_key(uid),
        };
        state.tables.keys().any(is_there) || self.unreadable_in(&state, uid, None)
    }

    /// Returns true if the record of this uid and kind cannot be read.
    pub(super) fn is_unreadable(&self, kind: &str, uid: &Uid) -> bool {
        self.unreadable_in(&self.shared.read(), uid, Some(kind))
    }

    fn unreadable_in(&self, state: &State, uid: &Uid, kind: Option<&str>) -> bool {
        let uid_entries =
            state.unreadable.range((uid.clone(), String::new())..).take_while(|((at, _), _)| at == uid);
        uid_entries
            .filter(|(at, _)| !self.forgotten.contains(*at))
            .any(|((_, of), _)| kind.is_none_or(|kind| kind == of))
    }

    /// Stages an object, or its removal (`None`). The caller has given it a revision of its own.
    pub(super) fn put(&mut self, kind: &'static str, uid: &Uid, object: Option<Erased>, revision: u64) {
        let before = self.get(kind, uid);
        self.count(before.as_ref(), object.as_ref());
        let layer = self.layers.entry(kind).or_default();
        layer.index.change(uid, before.as_ref(), object.as_ref());
        let staged = layer.objects.insert(uid.clone(), object);
        self.touched.push(Touch { kind, uid: uid.clone(), revision, before });
        self.undo.push(Undo::Object { kind, uid: uid.clone(), before: staged });
    }

    /// Counts what an object takes after a change, in the place of what it took before.
    fn count(&mut self, before: Option<&Erased>, after: Option<&Erased>) {
        let usage = |object: Option<&Erased>| object.map(|object| object.usage()).unwrap_or_default();
        self.usage += usage(after);
        self.usage -= usage(before);
    }

    /// Stages that `uid` has the name, or no longer has it.
    pub(super) fn put_name(&mut self, kind: &'static str, name: &Name, uid: &Uid, is_taken: bool) {
        let layer = self.layers.entry(kind).or_default();
        let before = layer.names.insert(name.clone(), is_taken.then(|| uid.clone()));
        self.undo.push(Undo::Name { kind, name: name.clone(), uid: uid.clone(), before });
    }

    pub(super) fn claim(&mut self, table: &str, value: &str, owner: &Uid) {
        self.claims.insert(table, value, owner);
        self.undo.push(Undo::Claimed {
            table: table.to_owned(),
            value: value.to_owned(),
            owner: owner.clone(),
        });
    }

    pub(super) fn release(&mut self, table: String, value: String, owner: &Uid) {
        self.claims.remove(&table, &value, owner);
        self.undo.push(Undo::Released { table, value, owner: owner.clone() });
    }

    /// Stages the removal of an unreadable record with its name and claims.
    pub(super) fn forget(&mut self, kind: &str, uid: &Uid) {
        let at = (uid.clone(), kind.to_owned());
        self.forgotten.insert(at.clone());
        self.undo.push(Undo::Forgotten { at });
        let known = self.shared.read().tables.get_key_value(kind).map(|(kind, table)| {
            let names = table.names.iter().filter(|(_, at)| *at == uid).map(|(name, _)| name.clone());
            (*kind, names.collect::<Vec<_>>())
        });
        if let Some((kind, names)) = known {
            for name in names {
                self.put_name(kind, &name, uid, false);
            }
            let revision = self.next_revision();
            self.touched.push(Touch { kind, uid: uid.clone(), revision, before: None });
        }
        for (table, value) in self.claims.of(uid) {
            self.release(table, value, uid);
        }
    }

    /// Returns a mark to roll back to.
    pub(super) fn mark(&self) -> usize {
        self.undo.len()
    }

    /// Reverses every step since `mark`.
    pub(super) fn roll_back(&mut self, mark: usize) {
        self.touched.clear();
        while self.undo.len() > mark {
            match self.undo.pop().expect("longer than the mark") {
                Undo::Object { kind, uid, before } => {
                    let staged = self.get(kind, &uid);
                    let objects = &mut self.layers.entry(kind).or_default().objects;
                    match before {
                        Some(before) => objects.insert(uid.clone(), before),
                        None => objects.remove(&uid),
                    };
                    let restored = self.get(kind, &uid);
                    self.count(staged.as_ref(), restored.as_ref());
                    let layer = self.layers.entry(kind).or_default();
                    layer.index.change(&uid, staged.as_ref(), restored.as_ref());
                }
                Undo::Name { kind, name, uid: _, before } => {
                    let names = &mut self.layers.entry(kind).or_default().names;
                    match before {
                        Some(before) => names.insert(name, before),
                        None => names.remove(&name),
                    };
                }
                Undo::Claimed { table, value, owner } => self.claims.remove(&table, &value, &owner),
                Undo::Released { table, value, owner } => self.claims.insert(&table, &value, &owner),
                Undo::Forgotten { at } => {
                    self.forgotten.remove(&at);
                }
            }
        }
    }

    /// Takes the events of the transaction that just succeeded: one for each object, in order.
    pub(super) fn take_events(&mut self) -> Vec<Event> {
        let mut changes: BTreeMap<(&'static str, Uid), (Option<Erased>, u64)> = BTreeMap::new();
        let mut forgotten = Vec::new();
        for touch in std::mem::take(&mut self.touched) {
            if self.forgotten.contains(&(touch.uid.clone(), touch.kind.to_owned())) {
                forgotten.push(deleted(touch.kind, touch.uid, touch.revision, None));
                continue;
            }
            changes.entry((touch.kind, touch.uid)).or_insert((touch.before, 0)).1 = touch.revision;
        }
        let mut events: Vec<_> = changes
            .into_iter()
            .filter_map(|((kind, uid), (before, revision))| {
                let Some(after) = self.get(kind, &uid) else {
                    return before.map(|last| deleted(kind, uid, revision, Some(last)));
                };
                let change = match &before {
                    None => Change::Created,
                    Some(before) if is_status_change(before, &after) => Change::StatusUpdated,
                    Some(_) => Change::Updated,
                };
                let (dropped, gained) = moved(before.as_ref(), Some(&after));
                let owner = after.meta().owner.clone();
                Some(Event { revision, kind, uid, owner, change, dropped, gained, last: None })
            })
            .chain(forgotten)
            .collect();
        events.sort_by_key(|event| event.revision);
        events
    }

    /// Exports all objects, with the names and claims of those that can be read.
    pub(super) fn export(&self) -> Export {
        let kinds: Vec<&'static str> = self.shared.read().tables.keys().copied().collect();
        let (mut objects, mut marks) = (Vec::new(), Vec::new());
        for kind in kinds {
            for (uid, object) in self.list(kind) {
                let name = object.meta().name.clone();
                if self.named(kind, &name).as_ref() == Some(&uid) {
                    marks.push(Key::Name { kind: Cow::Borrowed(kind), uid: uid.clone(), name });
                }
                for (table, value) in self.claims.of(&uid) {
                    marks.push(Key::Claim { table: Cow::Owned(table), uid: uid.clone(), value });
                }
                objects.push(object);
            }
        }
        let unreadable = self.shared.read().unreadable.len();
        Export { objects, marks, revision: self.revision, unreadable }
    }

    /// Returns true if a change is staged that readers and the disk do not have yet.
    pub(super) fn is_changed(&self) -> bool {
        !self.undo.is_empty()
    }

    /// Reports whether so many commits failed that no new keys may be added to those that must be written
    /// again.
    pub(super) fn has_too_many_suspects(&self) -> bool {
        self.suspect.len() >= STORE_SUSPECTS_MAX
    }

    /// Returns every staged or suspect key with its staged value. The keys are suspect until
    /// [`Stage::publish`].
    pub(super) fn render(&mut self, sealer: &dyn Sealer) -> Result<Batch, StoreError> {
        self.suspect.extend(self.undo.iter().map(Undo::key));
        let mut writes = Vec::with_capacity(self.suspect.len() + 1);
        for key in &self.suspect {
            if let Key::Object { kind, uid } = key
                && self.is_unreadable(kind, uid)
            {
                continue; // The bytes on disk are the only copy; no write may replace them.
            }
            let text = key.to_string();
            let value = self.value(key, &text, sealer)?;
            writes.push((text, value));
        }
        let text = Key::Revision.to_string();
        let value = codec::frame(&text, &self.revision.to_le_bytes());
        writes.push((text, Some(value)));
        Ok(Batch { writes })
    }

    fn value(&self, key: &Key, text: &str, sealer: &dyn Sealer) -> Result<Option<Vec<u8>>, StoreError> {
        let known = |kind: &str| self.shared.read().tables.get_key_value(kind).map(|(kind, _)| *kind);
        let failed = |cause: String| StoreError::Encode { key: text.to_owned(), cause };
        match key {
            Key::Object { kind, uid } => {
                let Some(object) = known(kind).and_then(|kind| self.get(kind, uid)) else { return Ok(None) };
                let plain = object.encode().map_err(|error| failed(error.to_string()))?;
                codec::seal(sealer, text, &plain).map(Some).map_err(|error| failed(error.to_string()))
            }
            Key::Name { kind, uid, name } => {
                let holder = known(kind).and_then(|kind| self.named(kind, name));
                Ok((holder.as_ref() == Some(uid)).then(|| codec::frame(text, &[])))
            }
            Key::Claim { table, uid, value } => {
                Ok((self.claims.owner(table, value) == Some(uid)).then(|| codec::frame(text, &[])))
            }
            Key::Revision => Ok(Some(codec::frame(text, &self.revision.to_le_bytes()))),
        }
    }

    /// Makes the batch, which is durable, visible to readers.
    pub(super) fn publish(&mut self) {
        let mut state = self.shared.write();
        for (kind, layer) in std::mem::take(&mut self.layers) {
            let table = state.table_mut(kind);
            for (uid, object) in layer.objects {
                match object {
                    Some(object) => table.put(&uid, object),
                    None => table.remove(&uid),
                }
            }
            for (name, uid) in layer.names {
                match uid {
                    Some(uid) => table.names.insert(name, uid),
                    None => table.names.remove(&name),
                };
            }
        }
        for at in std::mem::take(&mut self.forgotten) {
            state.unreadable.remove(&at);
        }
        (state.revision, state.usage) = (self.revision, self.usage);
        drop(state);
        self.undo.clear();
        self.suspect.clear();
    }
}

fn deleted(kind: &'static str, uid: Uid, revision: u64, last: Option<Erased>) -> Event {
    let owner = last.as_ref().and_then(|object| object.meta().owner.clone());
    let (dropped, gained) = moved(last.as_ref(), None);
    Event { revision, kind, uid, owner, change: Change::Deleted, dropped, gained, last }
}

/// Returns the references that an object had before a change and no longer has, and those that it has since.
fn moved(before: Option<&Erased>, after: Option<&Erased>) -> (Vec<Ref>, Vec<Ref>) {
    let (before, after) = (index::references(before), index::references(after));
    (before.difference(&after).cloned().collect(), after.difference(&before).cloned().collect())
}

/// True if only the status differs, and the version that changes with it.
fn is_status_change(before: &Erased, after: &Erased) -> bool {
    let (old, new) = (before.meta(), after.meta());
    old.generation == new.generation
        && old.name == new.name
        && old.tags == new.tags
        && old.deletion_requested_at == new.deletion_requested_at
        && old.finalizers == new.finalizers
}
