//! The common parts of every stored object: identity, versions, life-cycle marks, and its kind.
//!
//! Guarantees: `generation` changes only when a client changes `spec`; `resource_version` changes with every
//! commit and is unique within one store; an object whose `deletion_requested_at` is set lives until its
//! last finalizer is gone.
//! Never: a `spec` is written by a reconciler, or a `status` by a client (the store enforces it).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::names::{Name, Uid};
use crate::numbers::Generation;
use crate::references::{Ref, Role, Target, WokenBy};
use crate::resource::Usage;

/// User-defined labels; their bounds are in [`crate::limits`], and are checked by [`crate::validate`].
pub type Tags = BTreeMap<String, String>;

/// A kind of stored object: its name in keys, and its two halves.
pub trait Kind: Debug + Clone + PartialEq + Send + Sync + 'static {
    /// Lower-case singular noun; part of every key, so it never changes.
    const NAME: &'static str;
    /// The finalizer held by this kind's reconciler until nothing of the object is on the host.
    const FINALIZER: &'static str;
    /// The desired state, set by clients.
    type Spec: Serialize + DeserializeOwned + Clone + PartialEq + Debug + Send + Sync + 'static;
    /// The observed state.
    type Status: Serialize + DeserializeOwned + Clone + PartialEq + Debug + Default + Send + Sync + 'static;

    /// The changes of other objects that wake an object of this kind. Its own spec, and the objects that it
    /// owns, always do.
    const WOKEN_BY: &'static [WokenBy] = &[];

    /// Returns the generation of the spec that a status was made from, or `None` if statuses of this kind do
    /// not record it.
    #[must_use]
    fn observed_generation(status: &Self::Status) -> Option<Generation> {
        let _ = status;
        None
    }

    /// Lists the things that the object points at, apart from its owner. The store's index finds the objects
    /// that point at one of them, without reading all objects.
    #[must_use]
    fn references(object: &Object<Self>) -> Vec<Ref> {
        let _ = object;
        Vec::new()
    }

    /// Returns what the object takes of the resources of its host. The store keeps the sum over all objects.
    #[must_use]
    fn usage(object: &Object<Self>) -> Usage {
        let _ = object;
        Usage::default()
    }
}

impl Ref {
    /// Makes a reference to an object of kind `K`.
    #[must_use]
    pub fn to<K: Kind>(role: Role, uid: &Uid) -> Self {
        Self { role, target: Target::Object { kind: K::NAME, uid: uid.clone() } }
    }

    /// Returns the uid that the reference points at, if the target is an object of kind `K`.
    #[must_use]
    pub fn uid_of<K: Kind>(&self) -> Option<&Uid> {
        match &self.target {
            Target::Object { kind, uid } if *kind == K::NAME => Some(uid),
            _ => None,
        }
    }
}

/// A stored object of kind `K`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(bound = "")]
pub struct Object<K: Kind> {
    pub meta: Meta,
    pub spec: K::Spec,
    pub status: K::Status,
}

/// Identity and life cycle of an object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    pub uid: Uid,
    /// Name of the object; unique within the kind among objects whose deletion was not requested.
    pub name: Name,
    #[serde(default)]
    pub tags: Tags,
    /// Version of `spec`: starts at 1, and is raised by 1 with every change.
    pub generation: Generation,
    /// The commit that last wrote this object.
    pub resource_version: u64,
    pub created_at: Timestamp,
    pub deletion_requested_at: Option<Timestamp>,
    /// The reconcilers that must confirm that nothing is left before the record is removed.
    pub finalizers: BTreeSet<String>,
    /// The object whose removal removes this one.
    pub owner: Option<OwnerRef>,
}

/// A reference to an owner: kind and uid.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct OwnerRef {
    pub kind: String,
    pub uid: Uid,
}

impl Meta {
    /// True if deletion was requested; the object only waits for its finalizers.
    #[must_use]
    pub fn is_deleting(&self) -> bool {
        self.deletion_requested_at.is_some()
    }
}
