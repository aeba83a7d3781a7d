//! Snapshots and forks: create, list, restore in place, and make instances from them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use stead_controllers::snapshot::admission::{self, CreateRequest};
use stead_controllers::store::Tx;
use stead_controllers::vm::admission::{self as instances, ForkRequest, Forked, Target};
use stead_schemas::api::{
    self, ForkCreate, SnapshotCreate, SnapshotFork, SnapshotPatch, SnapshotRestore, parse_kind, state_of,
};
use stead_schemas::condition::{self, ConditionType, Reason};
use stead_schemas::instance::Instance;
use stead_schemas::limits::VERB_WAIT_MAX;
use stead_schemas::meta::{Kind, Object};
use stead_schemas::names::Uid;
use stead_schemas::references::{Ref, Role};
use stead_schemas::snapshot::{Snapshot, SnapshotKind, SnapshotPhase, SnapshotPurpose};
use tokio::time::Instant;

use super::auth::{Bearer, Scope};
use super::instances::{carried_out_within, has_tags, json, tag_filter};
use super::wait::until;
use super::{ApiError, ApiState, lookup};

type Params = BTreeMap<String, String>;

/// Finds a snapshot among those that clients see: a snapshot that only serves a fork is hidden.
fn find(state: &ApiState, id: &str) -> Result<Arc<Object<Snapshot>>, ApiError> {
    let absent = || ApiError::absent(Snapshot::NAME, id);
    let uid: Uid = id.parse().map_err(|_| absent())?;
    let object = state.store().get::<Snapshot>(&uid);
    object
        .filter(|object| object.spec.purpose == SnapshotPurpose::Kept && !object.meta.is_deleting())
        .ok_or_else(absent)
}

/// Checks the right to fill a pool: pooled instances are instances that run.
fn may_fill(bearer: &Bearer, pool: u32) -> Result<(), ApiError> {
    if pool > 0 { bearer.needs(Scope::InstanceWrite) } else { Ok(()) }
}

pub(super) async fn create(
    State(state): State<ApiState>,
    bearer: Bearer,
    id: Result<Path<String>, PathRejection>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let SnapshotCreate { kind, name, tags, compression, pool } = SnapshotCreate::read(json(body)?)?;
    may_fill(&bearer, pool)?;
    let source = lookup::instance_to_change(state.store(), &id?.0)?;
    let policy = source.spec.snapshot_policy.and_then(|policy| policy.compression);
    // A snapshot without memory is not compressed: its copies share blocks where the file system can.
    let compression = compression.or(policy).filter(|_| kind == SnapshotKind::Standby);
    let source = source.meta.uid.clone();
    let request =
        CreateRequest { kind, name, tags, purpose: SnapshotPurpose::Kept, compression, pool, schedule: None };
    let object = state.store().transact(move |tx| admission::create(tx, &source, request)).await?;
    let object = captured(&state, &object.meta.uid).await?;
    Ok((StatusCode::CREATED, Json(api::Snapshot::of(&object))).into_response())
}

/// Waits until the snapshot is taken, or until the time for a response is over; it is taken even then. If it
/// fails, the response says why; its own reconciler removes it.
async fn captured(state: &ApiState, uid: &Uid) -> Result<Arc<Object<Snapshot>>, ApiError> {
    let object = until::<Snapshot>(state, uid, VERB_WAIT_MAX, is_over).await;
    let object = object.ok_or_else(|| ApiError::absent(Snapshot::NAME, uid.as_str()))?;
    if object.status.phase == SnapshotPhase::Failed { Err(failure(&object)) } else { Ok(object) }
}

fn is_over(object: &Object<Snapshot>) -> bool {
    object.status.phase != SnapshotPhase::Pending
}

/// Converts the failure of a snapshot to an error response.
fn failure(object: &Object<Snapshot>) -> ApiError {
    let why = object.status.error.clone().unwrap_or_default();
    let ready = condition::find(&object.status.conditions, ConditionType::Ready);
    match ready.map(|ready| ready.reason) {
        Some(Reason::DiskFull | Reason::CapacityExhausted) => ApiError::insufficient_storage(why),
        _ if object.was_never_taken() => {
            ApiError::conflict("conflict", format!("the snapshot could not be taken: {why}"))
        }
        _ => ApiError::conflict("conflict", format!("the snapshot failed: {why}")),
    }
}

pub(super) async fn list(
    State(state): State<ApiState>,
    params: Result<Query<Params>, QueryRejection>,
) -> Result<Json<Vec<api::Snapshot>>, ApiError> {
    let Query(params) = params?;
    let tags = tag_filter(&params)?;
    let kind =
        match params.get("kind") {
            Some(word) => Some(parse_kind(word).ok_or_else(|| {
                ApiError::bad_request("invalid_request", "kind: must be Standby or Stopped")
            })?),
            None => None,
        };
    let (source, name) = (params.get("source_instance_id"), params.get("name"));
    let source_filter = source.map(|source| match source.parse() {
        Ok(uid) => state.store().referring::<Snapshot>(&Ref::to::<Instance>(Role::Source, &uid)),
        Err(_) => Vec::new(),
    });
    let objects = source_filter.unwrap_or_else(|| state.store().list::<Snapshot>());
    let offered = objects.iter().filter(|object| {
        let (spec, meta) = (&object.spec, &object.meta);
        // A snapshot that is half written, or was never taken, is not offered. The owner has to learn of a
        // snapshot that was there and lost its files.
        object.status.phase != SnapshotPhase::Pending
            && !object.was_never_taken()
            && spec.purpose == SnapshotPurpose::Kept
            && !meta.is_deleting()
            && kind.is_none_or(|kind| spec.kind == kind)
            && name.is_none_or(|name| spec.name.as_ref().is_some_and(|own| own.as_str() == name))
            && has_tags(&meta.tags, &tags)
    });
    Ok(Json(offered.map(|object| api::Snapshot::of(object)).collect()))
}

pub(super) async fn get(
    State(state): State<ApiState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<api::Snapshot>, ApiError> {
    Ok(Json(api::Snapshot::of(&*find(&state, &id?.0)?)))
}

pub(super) async fn update(
    State(state): State<ApiState>,
    bearer: Bearer,
    id: Result<Path<String>, PathRejection>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<api::Snapshot>, ApiError> {
    let SnapshotPatch { pool } = SnapshotPatch::read(json(body)?)?;
    may_fill(&bearer, pool)?;
    let uid = find(&state, &id?.0)?.meta.uid.clone();
    let object = state.store().transact(move |tx| admission::set_pool(tx, &uid, pool)).await?;
    Ok(Json(api::Snapshot::of(&object)))
}

pub(super) async fn delete(
    State(state): State<ApiState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<StatusCode, ApiError> {
    let uid = find(&state, &id?.0)?.meta.uid.clone();
    let moved = uid.clone();
    state.store().transact(move |tx| admission::delete(tx, &moved)).await?;
    // The files are removed even when the removal is late.
    until::<Snapshot>(&state, &uid, VERB_WAIT_MAX, |_| false).await;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn restore(
    State(state): State<ApiState>,
    bearer: Bearer,
    ids: Result<Path<(String, String)>, PathRejection>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<api::Instance>, ApiError> {
    let SnapshotRestore { target, hypervisor } =
        SnapshotRestore::read(json(body)?, &lookup::node(state.store())?.offer())?;
    let target = Target { power: target, hypervisor };
    let Path((id, snapshot)) = ids?;
    let uid = lookup::instance_to_change(state.store(), &id)?.meta.uid.clone();
    let snapshot = find(&state, &snapshot)?.meta.uid.clone();
    let (moved, prefix) = (uid.clone(), state.0.tap_prefix.clone());
    let restore = move |tx: &mut Tx<'_>| instances::restore_snapshot(tx, &moved, &snapshot, target, &prefix);
    let object = state.store().transact(restore).await?;
    arrived(&state, &bearer, &object, VERB_WAIT_MAX).await
}

pub(super) async fn fork(
    State(state): State<ApiState>,
    bearer: Bearer,
    id: Result<Path<String>, PathRejection>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let ForkCreate { name, from_running, target } = ForkCreate::read(json(body)?)?;
    let source = lookup::instance_to_change(state.store(), &id?.0)?.meta.uid.clone();
    let (request, prefix) = (ForkRequest { name, from_running, target }, state.0.tap_prefix.clone());
    let forked = state.store().transact(move |tx| instances::fork(tx, &source, request, &prefix)).await?;
    made(&state, &bearer, forked).await
}

pub(super) async fn fork_snapshot(
    State(state): State<ApiState>,
    bearer: Bearer,
    id: Result<Path<String>, PathRejection>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let SnapshotFork { name, target, hypervisor } =
        SnapshotFork::read(json(body)?, &lookup::node(state.store())?.offer())?;
    let target = Target { power: target, hypervisor };
    let (snapshot, prefix) = (find(&state, &id?.0)?.meta.uid.clone(), state.0.tap_prefix.clone());
    let fork =
        state.store().transact(move |tx| instances::fork_snapshot(tx, &snapshot, name, target, &prefix));
    let forked = fork.await?;
    made(&state, &bearer, forked).await
}

/// Waits until the fork is in its desired state, or until the time for a response is over. If the snapshot
/// that it begins with fails, the response says why; the fork's own reconciler removes it.
async fn made(state: &ApiState, bearer: &Bearer, forked: Forked) -> Result<Response, ApiError> {
    let deadline = Instant::now() + VERB_WAIT_MAX;
    if let Some(snapshot) = &forked.snapshot {
        // A snapshot that is gone has served the fork already.
        let snapshot = until::<Snapshot>(state, snapshot, VERB_WAIT_MAX, is_over).await;
        check_usable(snapshot.as_deref())?;
    }
    let left = deadline.saturating_duration_since(Instant::now());
    let instance = match arrived(state, bearer, &forked.instance, left).await {
        Ok(instance) => instance,
        Err(absent) => {
            // The snapshot's files went missing while the fork copied them.
            let snapshot = forked.snapshot.as_ref().and_then(|uid| state.store().get::<Snapshot>(uid));
            check_usable(snapshot.as_deref())?;
            return Err(absent);
        }
    };
    Ok((StatusCode::CREATED, instance).into_response())
}

fn check_usable(snapshot: Option<&Object<Snapshot>>) -> Result<(), ApiError> {
    match snapshot.filter(|snapshot| snapshot.status.phase == SnapshotPhase::Failed) {
        Some(failed) => Err(failure(failed)),
        None => Ok(()),
    }
}

/// Waits until the instance is in the state that its spec asks for.
async fn arrived(
    state: &ApiState,
    bearer: &Bearer,
    desired: &Object<Instance>,
    at_most: Duration,
) -> Result<Json<api::Instance>, ApiError> {
    let (generation, power, run) = (desired.meta.generation, desired.spec.power, desired.spec.run);
    carried_out_within(state, bearer, &desired.meta.uid, at_most, |object| {
        let is_seen = object.status.observed_generation >= generation;
        let is_there = is_seen && object.status.state == state_of(power);
        is_there || object.status.ended_run > run || object.meta.generation > generation
    })
    .await
}
