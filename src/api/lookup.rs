//! Finds the object that a path names: by id, then by name, then by id prefix.
//!
//! A prefix that was meant as the name of a removed object may be the prefix of a foreign object's id. It
//! must be long enough that this does not happen by chance, and longer where something is changed.

use std::sync::Arc;

use stead_controllers::node::admission::not_observed;
use stead_controllers::node::local;
use stead_controllers::store::Store;
use stead_schemas::image::Image;
use stead_schemas::instance::Instance;
use stead_schemas::meta::{Kind, Object};
use stead_schemas::names::{ImageRef, Name, Uid};
use stead_schemas::network::Nic;
use stead_schemas::node::Node;
use stead_schemas::references::Ref;

use super::auth::Bearer;
use super::{ApiError, ApiState, secrets};

/// Number of characters of an id that are enough where nothing is changed.
const PREFIX_TO_READ: usize = 4;
/// Number of characters of an id that are enough where something is changed or destroyed.
const PREFIX_TO_CHANGE: usize = 8;

/// Returns the node of this host. Until the host was observed, requests that depend on it have to wait.
pub(super) fn node(store: &Store) -> Result<Arc<Object<Node>>, ApiError> {
    let node = local(store).filter(|node| node.is_observed());
    node.ok_or_else(|| not_observed().into())
}

/// Finds an instance to read, by full id, exact name, or id prefix; an instance that is being deleted is
/// found by id only.
pub(super) fn instance(store: &Store, word: &str) -> Result<Arc<Object<Instance>>, ApiError> {
    unpooled(word, named::<Instance>(store, word)?)
}

/// Finds an instance to change or destroy, in the same way but with a longer prefix.
pub(super) fn instance_to_change(store: &Store, word: &str) -> Result<Arc<Object<Instance>>, ApiError> {
    unpooled(word, named_to_change::<Instance>(store, word)?)
}

/// Hides pooled instances, which belong to no client yet.
fn unpooled(word: &str, object: Arc<Object<Instance>>) -> Result<Arc<Object<Instance>>, ApiError> {
    if object.is_pooled() { Err(ApiError::absent(Instance::NAME, word)) } else { Ok(object) }
}

/// Finds an object to read, of a kind whose names are resource names, by id, name or id prefix.
pub(super) fn named<K: Kind>(store: &Store, word: &str) -> Result<Arc<Object<K>>, ApiError> {
    exact(store, word).map_or_else(|| by_prefix(store, word, PREFIX_TO_READ), Ok)
}

/// Finds an object to change or destroy, by id, name or id prefix.
pub(super) fn named_to_change<K: Kind>(store: &Store, word: &str) -> Result<Arc<Object<K>>, ApiError> {
    exact(store, word).map_or_else(|| by_prefix(store, word, PREFIX_TO_CHANGE), Ok)
}

/// Finds an object by full id or exact name.
pub(super) fn exact<K: Kind>(store: &Store, word: &str) -> Option<Arc<Object<K>>> {
    let by_id = word.parse::<Uid>().ok().and_then(|uid| store.get::<K>(&uid));
    by_id.or_else(|| Name::resource(word).ok().and_then(|name| store.find::<K>(&name)))
}

fn by_prefix<K: Kind>(store: &Store, word: &str, least: usize) -> Result<Arc<Object<K>>, ApiError> {
    let absent = || ApiError::absent(K::NAME, word);
    if word.len() < least || !word.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        return Err(absent());
    }
    let mut found = store.starting_with::<K>(word, 2).into_iter();
    match (found.next(), found.next()) {
        (None, _) => Err(absent()),
        (Some(object), None) => Ok(object),
        (Some(_), Some(_)) => {
            Err(ApiError::conflict("ambiguous", format!("several ids start with {word:?}; give more of it")))
        }
    }
}

/// Finds an image by reference in any spelling, by digest reference, or by id.
pub(super) fn image(store: &Store, word: &str) -> Result<Arc<Object<Image>>, ApiError> {
    if let Some(object) = word.parse::<Uid>().ok().and_then(|uid| store.get::<Image>(&uid)) {
        return Ok(object);
    }
    let reference: ImageRef =
        word.parse().map_err(|error| ApiError::bad_request("invalid_name", format!("name {error}")))?;
    if let Some(object) = store.find::<Image>(&Name::from(&reference)) {
        return Ok(object);
    }
    let is_same = |image: &Object<Image>| {
        let image_reference = &image.spec.reference;
        image.status.digest == reference.digest
            && image_reference.registry == reference.registry
            && image_reference.repository == reference.repository
    };
    let by_digest = |digest| store.find_referring::<Image>(&Ref::to_content(digest), is_same);
    reference.digest.as_ref().and_then(by_digest).ok_or_else(|| ApiError::absent(Image::NAME, word))
}

/// Returns the wire form of an instance, with its port's address, limited to what this reader may see.
pub(super) fn view(
    store: &Store,
    bearer: &Bearer,
    object: &Object<Instance>,
) -> stead_schemas::api::Instance {
    let nic = object.spec.allocated.nic.as_ref().and_then(|uid| store.get::<Nic>(uid));
    let nic = nic.as_deref().map(|nic| &nic.spec);
    secrets::instance(bearer, stead_schemas::api::Instance::of(object, nic, store.now()))
}

/// Returns the same with the current counts of its health check; the record has those of the last
/// significant result.
pub(super) fn present(
    state: &ApiState,
    bearer: &Bearer,
    object: &Object<Instance>,
) -> stead_schemas::api::Instance {
    let mut view = view(state.store(), bearer, object);
    let counted = state.0.backend.health(&object.meta.uid);
    if let (Some(health), Some((of, tally))) = (&mut view.health_status, counted)
        && object.status.health.of == Some(of)
    {
        health.count(&tally);
    }
    view
}
