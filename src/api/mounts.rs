//! Volumes of instances: attach and detach. Both wait for a guest that runs.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, PathRejection};
use axum::extract::{Path, State};
use stead_controllers::refused::Refused;
use stead_controllers::vm::{PROBLEM_END, admission};
use stead_schemas::api::{Instance as View, MountRequest, VolumeAttach};
use stead_schemas::condition::{self, ConditionType, Reason};
use stead_schemas::instance::Instance;
use stead_schemas::limits::{VERB_WAIT_MAX, VOLUME_RELEASE_WAIT};
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;

use super::auth::Bearer;
use super::instances::json;
use super::wait::until;
use super::{ApiError, ApiState, lookup};

pub(super) async fn attach(
    State(state): State<ApiState>,
    bearer: Bearer,
    path: Result<Path<(String, String)>, PathRejection>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<View>, ApiError> {
    let Path((instance, volume)) = path?;
    let VolumeAttach { path, access } = VolumeAttach::read(json(body)?)?;
    let uid = lookup::instance_to_change(state.store(), &instance)?.meta.uid.clone();
    let (word, mount_path) = (volume.clone(), path.clone());
    let request = MountRequest { volume, path, access };
    let attached = state
        .store()
        .transact({
            let uid = uid.clone();
            move |tx| admission::attach(tx, &uid, request)
        })
        .await?;
    let seen = settled(&state, &attached, VERB_WAIT_MAX, |_| true).await?;
    if let Some(why) = trouble_at(&seen, &mount_path) {
        // The guest cannot mount it, so it is as if the request had not been made.
        let why = format!("the guest cannot mount the volume: {why}");
        state.store().transact(move |tx| admission::detach(tx, &uid, &word)).await?;
        return Err(Refused::conflict(why).into());
    }
    Ok(Json(lookup::view(state.store(), &bearer, &seen)))
}

pub(super) async fn detach(
    State(state): State<ApiState>,
    bearer: Bearer,
    path: Result<Path<(String, String)>, PathRejection>,
) -> Result<Json<View>, ApiError> {
    let Path((instance, word)) = path?;
    let uid = lookup::instance_to_change(state.store(), &instance)?.meta.uid.clone();
    let volume = lookup::exact::<stead_schemas::volume::Volume>(state.store(), &word)
        .ok_or_else(|| ApiError::absent("volume", &word))?;
    let volume = volume.meta.uid.clone();
    let asked = uid.clone();
    let object = state.store().transact(move |tx| admission::detach(tx, &asked, &word)).await?;
    if !has(&object, &volume) {
        return Ok(Json(lookup::view(state.store(), &bearer, &object)));
    }
    let is_left = |object: &Object<Instance>| !has(object, &volume);
    // A program may close its last file in a moment.
    let seen = settled(&state, &object, VOLUME_RELEASE_WAIT, is_left).await?;
    if let Some(why) = trouble(&seen).filter(|_| !is_left(&seen)) {
        return keep(&state, &bearer, &uid, &volume, why).await;
    }
    let seen = settled(&state, &object, VERB_WAIT_MAX - VOLUME_RELEASE_WAIT, is_left).await?;
    match trouble(&seen).filter(|_| !is_left(&seen)) {
        Some(why) => keep(&state, &bearer, &uid, &volume, why).await,
        None => Ok(Json(lookup::view(state.store(), &bearer, &seen))),
    }
}

/// Lets an instance keep a volume that its guest does not unmount. It may have done so at the last moment.
async fn keep(
    state: &ApiState,
    bearer: &Bearer,
    uid: &Uid,
    volume: &Uid,
    why: String,
) -> Result<Json<View>, ApiError> {
    let (kept, of) = (volume.clone(), uid.clone());
    let object = state.store().transact(move |tx| admission::keep_volume(tx, &of, &kept)).await?;
    if has(&object, volume) {
        return Err(Refused::conflict(format!("the guest does not give the volume back: {why}")).into());
    }
    Ok(Json(lookup::view(state.store(), bearer, &object)))
}

fn has(object: &Object<Instance>, volume: &Uid) -> bool {
    object.spec.volumes.iter().any(|mount| mount.volume == *volume)
}

/// Waits until a change of volumes is carried out or cannot be, as far as `is_done` agrees.
async fn settled(
    state: &ApiState,
    changed: &Object<Instance>,
    at_most: Duration,
    is_done: impl Fn(&Object<Instance>) -> bool,
) -> Result<Arc<Object<Instance>>, ApiError> {
    let is_over = |object: &Object<Instance>| {
        let is_observed = object.status.observed_generation >= changed.meta.generation;
        is_observed
            && match change(object) {
                Some((Reason::ChangingVolumes | Reason::WaitingForDisk, _)) => false,
                Some((Reason::WaitingForStart, _)) => true,
                Some(_) | None => is_done(object),
            }
    };
    let seen = until::<Instance>(state, &changed.meta.uid, at_most, is_over).await;
    seen.ok_or_else(|| ApiError::absent("instance", changed.meta.uid.as_str()))
}

/// Returns how the volumes of the guest differ from those of the spec.
fn change(object: &Object<Instance>) -> Option<(Reason, &str)> {
    let found = condition::find(&object.status.conditions, ConditionType::VolumesMounted)?;
    Some((found.reason, &found.message))
}

/// Returns why a guest cannot mount the volume of this path. Others may have problems of their own.
fn trouble_at(object: &Object<Instance>, path: &str) -> Option<String> {
    let all = trouble(object)?;
    let own = all.split(PROBLEM_END).find(|problem| problem.starts_with(&format!("{path}: ")));
    own.map(ToOwned::to_owned)
}

/// Returns why a guest cannot mount or unmount volumes.
fn trouble(object: &Object<Instance>) -> Option<String> {
    let (_, why) = change(object).filter(|(reason, _)| *reason == Reason::VolumeInUse)?;
    Some(why.to_owned())
}
