//! Instances: create, read, start, stop, delete.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use stead_controllers::refused::Refused;
use stead_controllers::store::{Store, Tx};
use stead_controllers::vm::admission::{self, Updated};
use stead_schemas::api::{self, AccessRequest, InstancePatch, InstanceRequest, InstanceStart, parse_state};
use stead_schemas::disk::Disk;
use stead_schemas::instance::{Instance, Power, State as Is};
use stead_schemas::limits::VERB_WAIT_MAX;
use stead_schemas::meta::{Kind as _, Object};
use stead_schemas::names::Uid;
use stead_schemas::network::Nic;
use stead_schemas::volume::{Access, Volume, VolumeMount};

use super::auth::{Bearer, Scope};
pub(super) use super::json::json;
pub(super) use super::tags::{has_tags, tag_filter};
use super::wait::until;
use super::{ApiError, ApiState, ServerLimits, lookup, watch};

pub(super) type Params = BTreeMap<String, String>;

/// Reads a parameter that is true or false; `None` when the request does not have it.
pub(super) fn flag(params: &Params, name: &str) -> Result<Option<bool>, ApiError> {
    match params.get(name).map(String::as_str) {
        None => Ok(None),
        Some("true") => Ok(Some(true)),
        Some("false") => Ok(Some(false)),
        Some(_) => Err(ApiError::bad_request("invalid_request", format!("{name} must be true or false"))),
    }
}

pub(super) async fn create(
    State(state): State<ApiState>,
    bearer: Bearer,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let mut asked = InstanceRequest::read(json(body)?, &lookup::node(state.store())?.offer())?;
    for mount in &asked.volumes {
        bearer.needs(match mount.access {
            AccessRequest::ReadWrite => Scope::VolumeWrite,
            AccessRequest::ReadOnly | AccessRequest::Overlay(_) => Scope::VolumeRead,
        })?;
    }
    asked.certify(stead_egress::generate_authority).map_err(|error| {
        tracing::error!(%error, "no certificate authority can be made");
        ApiError::internal()
    })?;
    let prefix = state.0.tap_prefix.clone();
    let (backend, client) = (state.0.backend.clone(), bearer.subject.clone());
    let create = move |tx: &mut Tx<'_>| {
        let object = admission::create(tx, asked, &prefix)?;
        // The client is recorded before the commit, because the registry is asked after it.
        backend.asked_by(&object.spec.allocated.image, &client);
        Ok::<_, Refused>(object)
    };
    let object = state.store().transact(create).await?;
    Ok((StatusCode::CREATED, Json(lookup::view(state.store(), &bearer, &object))).into_response())
}

pub(super) async fn list(
    State(state): State<ApiState>,
    bearer: Bearer,
    limits: Result<ServerLimits, ApiError>,
    params: Result<Query<Params>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(params) = params?;
    let tags = tag_filter(&params)?;
    let wanted = match params.get("state") {
        Some(word) => Some(parse_state(word).ok_or_else(|| {
            ApiError::bad_request("invalid_state", format!("state: {word:?} is not one of the eight states"))
        })?),
        None => None,
    };
    let is_watch = flag(&params, "watch")?.unwrap_or(false);
    let after = params.get("resource_version").map(|text| text.parse()).transpose().map_err(|_| {
        ApiError::bad_request("invalid_request", "resource_version must be a number of an earlier answer")
    })?;
    if is_watch {
        if wanted.is_some() {
            let message = "state cannot be given with watch: the end of a state would not be reported";
            return Err(ApiError::bad_request("invalid_request", message));
        }
        return Ok(watch::instances(&state, bearer, after, tags, limits?.stream_idle_max));
    }
    let store = state.store();
    let views: Vec<api::Instance> = store
        .list::<Instance>()
        .iter()
        .filter(|object| !object.meta.is_deleting() && !object.is_pooled())
        .filter(|object| wanted.is_none_or(|wanted| object.status.state == wanted))
        .filter(|object| has_tags(&object.meta.tags, &tags))
        .map(|object| lookup::present(&state, &bearer, object))
        .collect();
    Ok(Json(views).into_response())
}

pub(super) async fn get(
    State(state): State<ApiState>,
    bearer: Bearer,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<api::Instance>, ApiError> {
    let object = lookup::instance(state.store(), &id?.0)?;
    Ok(Json(lookup::present(&state, &bearer, &object)))
}

pub(super) async fn update(
    State(state): State<ApiState>,
    bearer: Bearer,
    id: Result<Path<String>, PathRejection>,
    params: Result<Query<Params>, QueryRejection>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<api::Instance>, ApiError> {
    let is_dry_run = flag(&params?.0, "dry_run")?.unwrap_or(false);
    let patch = InstancePatch::read(json(body)?, &lookup::node(state.store())?.offer())?;
    let uid = lookup::instance_to_change(state.store(), &id?.0)?.meta.uid.clone();
    let (prefix, backend, client) =
        (state.0.tap_prefix.clone(), state.0.backend.clone(), bearer.subject.clone());
    let update = move |tx: &mut Tx<'_>| {
        let updated = admission::update(tx, &uid, patch, &prefix)?;
        if let Some(image) = updated.image.as_ref().filter(|_| !is_dry_run) {
            backend.asked_by(image, &client);
        }
        Ok::<_, Refused>(updated)
    };
    let Updated { object, changes, .. } = if is_dry_run {
        state.store().rehearse(update).await?
    } else {
        state.store().transact(update).await?
    };
    let mut view = lookup::view(state.store(), &bearer, &object);
    view.changes = Some(changes);
    Ok(Json(view))
}

/// Returns the instance once a verb on it is over, or once the time for the response is: the spec is stored,
/// and is carried out even when it is late.
pub(super) async fn carried_out(
    state: &ApiState,
    bearer: &Bearer,
    uid: &Uid,
    is_over: impl Fn(&Object<Instance>) -> bool,
) -> Result<Json<api::Instance>, ApiError> {
    carried_out_within(state, bearer, uid, VERB_WAIT_MAX, is_over).await
}

/// Does the same with another time for the response.
pub(super) async fn carried_out_within(
    state: &ApiState,
    bearer: &Bearer,
    uid: &Uid,
    at_most: Duration,
    is_over: impl Fn(&Object<Instance>) -> bool,
) -> Result<Json<api::Instance>, ApiError> {
    let seen = until::<Instance>(state, uid, at_most, is_over).await;
    let object = seen.ok_or_else(|| ApiError::absent(Instance::NAME, uid.as_str()))?;
    Ok(Json(lookup::view(state.store(), bearer, &object)))
}

pub(super) async fn start(
    State(state): State<ApiState>,
    bearer: Bearer,
    id: Result<Path<String>, PathRejection>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<api::Instance>, ApiError> {
    let body = match json(body)? {
        Value::Null => Value::Object(serde_json::Map::new()),
        given => given,
    };
    let request = InstanceStart::read(body)?;
    let uid = lookup::instance_to_change(state.store(), &id?.0)?.meta.uid.clone();
    let moved = uid.clone();
    let object = state.store().transact(move |tx| admission::start(tx, &moved, request)).await?;
    let run = object.spec.run;
    // The verb is over when the instance runs, when the run has ended again, or when another verb replaced
    // it.
    carried_out(&state, &bearer, &uid, |object| {
        object.status.state == Is::Running
            || object.status.ended_run >= run
            || object.spec.power != Power::Running
    })
    .await
}

pub(super) async fn stop(
    State(state): State<ApiState>,
    bearer: Bearer,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<api::Instance>, ApiError> {
    let uid = lookup::instance_to_change(state.store(), &id?.0)?.meta.uid.clone();
    let moved = uid.clone();
    state.store().transact(move |tx| admission::stop(tx, &moved)).await?;
    carried_out(&state, &bearer, &uid, |object| {
        object.status.state == Is::Stopped || object.spec.power == Power::Running
    })
    .await
}

pub(super) async fn standby(
    State(state): State<ApiState>,
    bearer: Bearer,
    id: Result<Path<String>, PathRejection>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<api::Instance>, ApiError> {
    let request = api::StandbyRequest::read(json(body)?)?;
    let uid = lookup::instance_to_change(state.store(), &id?.0)?.meta.uid.clone();
    let moved = uid.clone();
    let object = state.store().transact(move |tx| admission::standby(tx, &moved, request)).await?;
    let run = object.spec.run;
    carried_out(&state, &bearer, &uid, |object| {
        object.status.state == Is::Standby
            || object.status.ended_run >= run
            || object.spec.power != Power::Standby
    })
    .await
}

pub(super) async fn restore(
    State(state): State<ApiState>,
    bearer: Bearer,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<api::Instance>, ApiError> {
    let uid = lookup::instance_to_change(state.store(), &id?.0)?.meta.uid.clone();
    let moved = uid.clone();
    let object = state.store().transact(move |tx| admission::restore(tx, &moved)).await?;
    let (run, generation) = (object.spec.run, object.meta.generation);
    // The old state is Running too when the standby had not begun, so the observation must be of this spec.
    carried_out(&state, &bearer, &uid, |object| {
        let is_seen = object.status.observed_generation >= generation;
        is_seen && object.status.state == Is::Running
            || object.status.ended_run >= run
            || object.spec.power != Power::Running
    })
    .await
}

pub(super) async fn delete(
    State(state): State<ApiState>,
    id: Result<Path<String>, PathRejection>,
    params: Result<Query<Params>, QueryRejection>,
) -> Result<StatusCode, ApiError> {
    let Query(params) = params?;
    let is_graceful = flag(&params, "graceful_shutdown")?.unwrap_or(true);
    let object = lookup::instance_to_change(state.store(), &id?.0)?;
    let uid = object.meta.uid.clone();
    let moved = uid.clone();
    state.store().transact(move |tx| admission::delete(tx, &moved, !is_graceful)).await?;
    // The name is free already; the response waits until the host is clear, up to its time limit.
    let (store, allocated) = (state.store(), &object.spec.allocated);
    // These are the disks over volumes, and the copies of volumes that the instance got as a fork.
    let disks: Vec<Uid> =
        object.spec.volumes.iter().filter_map(|mount| own_disk(store, &uid, mount)).collect();
    let clear = async {
        until::<Instance>(&state, &uid, VERB_WAIT_MAX, |_| false).await;
        // Owned objects go with the instance, a few milliseconds later.
        for disk in disks.iter().chain([&allocated.disk]) {
            until::<Disk>(&state, disk, VERB_WAIT_MAX, |_| false).await;
        }
        if let Some(nic) = &allocated.nic {
            until::<Nic>(&state, nic, VERB_WAIT_MAX, |_| false).await;
        }
    };
    // The deletion is stored: it is carried out even when it is late.
    let _ = tokio::time::timeout(VERB_WAIT_MAX, clear).await;
    Ok(StatusCode::NO_CONTENT)
}

/// Returns the disk of a mount that is removed together with the instance.
fn own_disk(store: &Store, instance: &Uid, mount: &VolumeMount) -> Option<Uid> {
    if let Access::Overlay { disk, .. } = &mount.access {
        return Some(disk.clone());
    }
    let volume = store.get::<Volume>(&mount.volume)?;
    let is_own = volume.meta.owner.as_ref().is_some_and(|owner| owner.uid == *instance);
    is_own.then(|| volume.spec.disk.clone())
}
