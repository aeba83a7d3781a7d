//! Objects with their kind erased, and the list of kinds that a store knows.
//!
//! The store handles every kind with the same code. This file is where types are erased and restored.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;

use stead_schemas::meta::{Kind, Meta, Object};
use stead_schemas::names::Uid;
use stead_schemas::numbers::Generation;
use stead_schemas::references::Ref;
use stead_schemas::resource::Usage;

/// An object of some kind.
pub(super) trait AnyObject: Any + Debug + Send + Sync {
    fn meta(&self) -> &Meta;
    fn kind(&self) -> &'static str;
    /// Returns the targets that the object refers to, apart from its owner.
    fn references(&self) -> Vec<Ref>;
    /// Returns what the object takes of its host.
    fn usage(&self) -> Usage;
    fn observed_generation(&self) -> Option<Generation>;
    /// Returns the same object with another meta, for rules that apply to every kind.
    fn with_meta(&self, meta: Meta) -> Erased;
    fn encode(&self) -> Result<Vec<u8>, serde_json::Error>;
}

pub(super) type Erased = Arc<dyn AnyObject>;

/// An object whose reconciler has not finished with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsettled {
    pub kind: &'static str,
    pub uid: Uid,
    /// True if the object waits for its deletion.
    pub is_deleting: bool,
    /// True if the status was made from an earlier generation of the spec.
    pub is_outdated: bool,
}

impl Unsettled {
    /// Returns `None` for an object with which its reconciler has finished.
    pub(super) fn of(object: &Erased) -> Option<Self> {
        let meta = object.meta();
        let is_outdated = object.observed_generation().is_some_and(|observed| observed != meta.generation);
        let unsettled =
            Self { kind: object.kind(), uid: meta.uid.clone(), is_deleting: meta.is_deleting(), is_outdated };
        (unsettled.is_deleting || unsettled.is_outdated).then_some(unsettled)
    }
}

impl<K: Kind> AnyObject for Object<K> {
    fn meta(&self) -> &Meta {
        &self.meta
    }
    fn kind(&self) -> &'static str {
        K::NAME
    }
    fn references(&self) -> Vec<Ref> {
        K::references(self)
    }
    fn usage(&self) -> Usage {
        K::usage(self)
    }
    fn observed_generation(&self) -> Option<Generation> {
        K::observed_generation(&self.status)
    }
    fn with_meta(&self, meta: Meta) -> Erased {
        Arc::new(Self { meta, spec: self.spec.clone(), status: self.status.clone() })
    }
    fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec(self)
    }
}

/// Restores the type of an object. Every table holds objects of one kind, so this cannot fail.
pub(super) fn typed<K: Kind>(erased: &Erased) -> Arc<Object<K>> {
    let any: Arc<dyn Any + Send + Sync> = erased.clone();
    any.downcast().expect("a table holds objects of its own kind only")
}

type Decode = fn(&[u8]) -> Result<Erased, serde_json::Error>;

/// The kinds that a store is opened with.
#[derive(Debug, Clone, Default)]
pub struct Kinds(BTreeMap<&'static str, Decode>);

impl Kinds {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// # Panics
    /// Panics if the kind was added already or its name cannot be part of a key. Both are mistakes of the
    /// program that every start would show.
    #[must_use]
    pub fn with<K: Kind>(mut self) -> Self {
        assert!(!K::NAME.is_empty() && !K::NAME.contains('/'), "kind name {:?} cannot be in a key", K::NAME);
        let decode: Decode = |bytes| Ok(Arc::new(serde_json::from_slice::<Object<K>>(bytes)?));
        assert!(self.0.insert(K::NAME, decode).is_none(), "kind {} was given twice", K::NAME);
        self
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &'static str> {
        self.0.keys().copied()
    }

    /// Returns the static name equal to `name`.
    pub(super) fn find(&self, name: &str) -> Option<&'static str> {
        self.0.get_key_value(name).map(|(name, _)| *name)
    }

    pub(super) fn decode(&self, kind: &str, bytes: &[u8]) -> Result<Erased, String> {
        let decode = self.0.get(kind).ok_or_else(|| format!("kind {kind:?} is not known"))?;
        decode(bytes).map_err(|error| error.to_string())
    }
}
