//! Volumes: create, read, delete, attach to instances, and detach.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::rejection::{BytesRejection, PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use serde_json::{Map, Value};
use stead_controllers::store::{Store, Tx};
use stead_controllers::volume::admission;
use stead_schemas::api::{Volume as View, VolumeCreate, VolumePatch};
use stead_schemas::disk::Disk;
use stead_schemas::instance::Instance;
use stead_schemas::limits::VERB_WAIT_MAX;
use stead_schemas::meta::{Kind, Object};
use stead_schemas::references::{Ref, Role};
use stead_schemas::volume::{Volume, VolumeMount};

use super::auth::Bearer;
use super::instances::{has_tags, json, tag_filter};
use super::wait::until;
use super::{ApiError, ApiState, lookup};

type Params = BTreeMap<String, String>;

fn find(store: &Store, word: &str) -> Result<Arc<Object<Volume>>, ApiError> {
    lookup::exact(store, word).ok_or_else(|| ApiError::absent(Volume::NAME, word))
}

fn view(store: &Store, volume: &Object<Volume>) -> View {
    let mounts = [Role::Writes, Role::Reads].map(|role| Ref::to::<Volume>(role, &volume.meta.uid));
    let mut instances: Vec<_> = mounts.iter().flat_map(|mount| store.referring::<Instance>(mount)).collect();
    instances.sort_by(|one, other| one.meta.uid.cmp(&other.meta.uid));
    let live = instances.iter().filter(|instance| !instance.meta.is_deleting() && !instance.is_pooled());
    let mounts = live.flat_map(|instance| {
        let of = |mount: &&VolumeMount| mount.volume == volume.meta.uid;
        instance.spec.volumes.iter().filter(of).map(|mount| (&instance.meta.uid, mount))
    });
    View::of(volume, mounts)
}

pub(super) async fn create(
    State(state): State<ApiState>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let request = VolumeCreate::read(json(body)?)?;
    let object = state.store().transact(move |tx| admission::create(tx, request)).await?;
    Ok((StatusCode::CREATED, Json(view(state.store(), &object))).into_response())
}

/// Handles `POST /volumes/from-archive`, whose body is an archive and whose parameters are the fields of [`create`].
pub(super) async fn create_from_archive(
    State(state): State<ApiState>,
    bearer: Bearer,
    params: Result<Query<Params>, QueryRejection>,
    body: Body,
) -> Result<Response, ApiError> {
    let request = VolumeCreate::read(fields(params?.0))?;
    // Before the archive is received.
    let asked = request.clone();
    let check = move |tx: &mut Tx<'_>| admission::check_new(tx, &asked).map(|()| tx.next_uid());
    let name = state.store().transact(check).await?;
    let archive = body.into_data_stream().map(|chunk| chunk.map_err(std::io::Error::other)).boxed();
    let prepared =
        state.0.backend.prepare_volume(&bearer.subject, name.clone(), request.size, archive).await?;
    let store = state.store().clone();
    // On a task of its own: a client that is gone must not come between the volume and its content.
    let stored = tokio::spawn(async move {
        let object = store.transact(move |tx| admission::create_from(tx, request, name)).await?;
        (prepared.keep)();
        Ok::<_, ApiError>(object)
    });
    let object = stored.await.map_err(|_| ApiError::internal())??;
    Ok((StatusCode::CREATED, Json(view(state.store(), &object))).into_response())
}

/// Converts parameters to the fields of a body.
fn fields(params: Params) -> Value {
    let (mut fields, mut tags) = (Map::new(), Map::new());
    for (key, value) in params {
        let tag = key.strip_prefix("tags[").and_then(|key| key.strip_suffix(']'));
        match (tag, value.parse::<u64>()) {
            (Some(tag), _) => drop(tags.insert(tag.to_owned(), value.into())),
            (None, Ok(number)) if key == "size_gb" => drop(fields.insert(key, number.into())),
            (None, _) => drop(fields.insert(key, value.into())),
        }
    }
    if !tags.is_empty() {
        fields.insert("tags".to_owned(), tags.into());
    }
    fields.into()
}

pub(super) async fn update(
    State(state): State<ApiState>,
    id: Result<Path<String>, PathRejection>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<View>, ApiError> {
    let VolumePatch { size } = VolumePatch::read(json(body)?)?;
    let uid = find(state.store(), &id?.0)?.meta.uid.clone();
    let object = state.store().transact(move |tx| admission::grow(tx, &uid, size)).await?;
    Ok(Json(view(state.store(), &object)))
}

pub(super) async fn list(
    State(state): State<ApiState>,
    params: Result<Query<Params>, QueryRejection>,
) -> Result<Json<Vec<View>>, ApiError> {
    let tags = tag_filter(&params?.0)?;
    let volumes = state.store().list::<Volume>();
    let wanted =
        volumes.iter().filter(|volume| !volume.meta.is_deleting() && has_tags(&volume.meta.tags, &tags));
    Ok(Json(wanted.map(|volume| view(state.store(), volume)).collect()))
}

pub(super) async fn get(
    State(state): State<ApiState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<View>, ApiError> {
    let volume = find(state.store(), &id?.0)?;
    Ok(Json(view(state.store(), &volume)))
}

pub(super) async fn delete(
    State(state): State<ApiState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<StatusCode, ApiError> {
    let volume = find(state.store(), &id?.0)?;
    let uid = volume.meta.uid.clone();
    state.store().transact(move |tx| admission::delete(tx, &uid)).await?;
    // The deletion is stored: it is carried out even when it is late.
    until::<Disk>(&state, &volume.spec.disk, VERB_WAIT_MAX, |_| false).await;
    Ok(StatusCode::NO_CONTENT)
}
