//! Opening of the store: every stored value is read, checked and indexed once.
//!
//! Guarantees: a record that cannot be read is kept as [`Unreadable`], and its name and claims stay taken. A
//! name whose own record is damaged or missing is restored from its object.
//! Never: writes; the first transaction repairs.

use std::borrow::Cow;
use std::collections::BTreeSet;

use stead_schemas::names::{Name, Uid};
use tracing::warn;

use super::claims::Claims;
use super::codec::{self, Cause, Sealer};
use super::error::StoreError;
use super::key::Key;
use super::kv::Kv;
use super::object::{Erased, Kinds};
use super::state::{State, Unreadable};

/// The state on disk, and the keys that the next batch must write again.
pub(super) struct Loaded {
    pub(super) state: State,
    pub(super) claims: Claims,
    pub(super) suspect: BTreeSet<Key>,
}

/// Number of revisions that are skipped when the record of the last revision is lost, so that none is used
/// twice. It is far more than one batch could have used since the newest object was written.
const REVISIONS_SKIPPED: u64 = 1 << 20;

pub(super) fn load(kv: &dyn Kv, sealer: &dyn Sealer, kinds: &Kinds) -> Result<Loaded, StoreError> {
    let mut loading = Loading {
        sealer,
        kinds,
        state: State::new(kinds),
        claims: Claims::default(),
        names: Vec::new(),
        revision: None,
        objects: 0,
        foreign: None,
    };
    kv.load(&mut |key, value| loading.visit(key, value))?;
    loading.finish()
}

struct Loading<'a> {
    sealer: &'a dyn Sealer,
    kinds: &'a Kinds,
    state: State,
    claims: Claims,
    /// The name records, which are indexed after all objects are known.
    names: Vec<(&'static str, Uid, Name)>,
    revision: Option<u64>,
    objects: usize,
    foreign: Option<String>,
}

impl Loading<'_> {
    fn visit(&mut self, key: &[u8], value: &[u8]) {
        let text = String::from_utf8_lossy(key);
        match Key::parse(&text) {
            None => self.foreign = Some(text.into_owned()),
            Some(Key::Object { kind, uid }) => self.visit_object(&text, kind.into_owned(), uid, value),
            Some(Key::Name { kind, uid, name }) => {
                self.names.extend(self.kinds.find(&kind).map(|kind| (kind, uid, name)));
            }
            Some(Key::Claim { table, uid, value }) => match self.claims.owner(&table, &value) {
                // Only a damaged database can contain this; the first owner is kept.
                Some(by) => warn!(%table, value, %by, %uid, "a claim has two owners on disk"),
                None => self.claims.insert(&table, &value, &uid),
            },
            Some(Key::Revision) => {
                let payload = codec::unframe(&text, value).ok().and_then(|bytes| bytes.try_into().ok());
                self.revision = payload.map(u64::from_le_bytes);
            }
        }
    }

    fn visit_object(&mut self, key: &str, kind: String, uid: Uid, value: &[u8]) {
        self.objects += 1;
        match self.read(key, &kind, &uid, value) {
            Ok(object) => self.state.table_mut(object.kind()).put(&uid, object),
            Err(cause) => {
                let cause = cause.to_string();
                warn!(kind, %uid, cause, "a stored record cannot be read");
                let unreadable = Unreadable { kind: kind.clone(), uid: uid.clone(), cause };
                self.state.unreadable.insert((uid, kind), unreadable);
            }
        }
    }

    fn read(&self, key: &str, kind: &str, uid: &Uid, value: &[u8]) -> Result<Erased, Cause> {
        let plain = codec::unseal(self.sealer, key, value)?;
        let object = self.kinds.decode(kind, &plain).map_err(Cause::Content)?;
        if object.meta().uid == *uid {
            Ok(object)
        } else {
            Err(Cause::Content(format!("it is the record of {}", object.meta().uid)))
        }
    }

    fn finish(mut self) -> Result<Loaded, StoreError> {
        if let Some(key) = self.foreign {
            return Err(StoreError::ForeignKey { key });
        }
        if self.objects > 0
            && self.state.unreadable.len() == self.objects
            && let Some((_, first)) = self.state.unreadable.first_key_value()
        {
            // One damaged record is a fault of the disk; if all are damaged, the key or the format is
            // another.
            return Err(StoreError::Unopenable { records: self.objects, cause: first.cause.clone() });
        }
        let mut suspect = BTreeSet::new();
        let newest = self.index_names(&mut suspect);
        self.state.revision = match self.revision {
            Some(revision) => revision.max(newest),
            None if newest > 0 => newest + REVISIONS_SKIPPED,
            None => 0,
        };
        self.state.usage = self.state.scanned_usage();
        Ok(Loaded { state: self.state, claims: self.claims, suspect })
    }

    /// Indexes names, first from live objects and then from the records of unreadable ones. Returns the
    /// newest resource version.
    fn index_names(&mut self, suspect: &mut BTreeSet<Key>) -> u64 {
        let mut newest = 0;
        let key = |kind: &'static str, uid: &Uid, name: &Name| Key::Name {
            kind: Cow::Borrowed(kind),
            uid: uid.clone(),
            name: name.clone(),
        };
        let recorded: BTreeSet<_> = std::mem::take(&mut self.names).into_iter().collect();
        for (kind, table) in &mut self.state.tables {
            for (uid, object) in &table.objects {
                let meta = object.meta();
                newest = newest.max(meta.resource_version);
                if meta.is_deleting() {
                    continue;
                }
                table.names.insert(meta.name.clone(), uid.clone());
                if !recorded.contains(&(*kind, uid.clone(), meta.name.clone())) {
                    suspect.insert(key(kind, uid, &meta.name));
                }
            }
        }
        for (kind, uid, name) in recorded {
            let is_unreadable = self.state.is_unreadable(&uid);
            let table = self.state.table_mut(kind);
            if table.names.get(&name) == Some(&uid) {
                continue;
            }
            if is_unreadable && !table.names.contains_key(&name) {
                table.names.insert(name, uid);
            } else {
                suspect.insert(key(kind, &uid, &name)); // No live object has it: removed.
            }
        }
        newest
    }
}
