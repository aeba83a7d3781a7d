//! The snapshot schedule of an instance: set, read, delete.

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, PathRejection};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use jiff::Timestamp;
use stead_controllers::schedule::admission;
use stead_schemas::api::{ScheduleRequest, SnapshotSchedule};
use stead_schemas::names::Name;
use stead_schemas::schedule::SnapshotSchedule as Kind;

use super::instances::json;
use super::{ApiError, ApiState, lookup};

pub(super) async fn put(
    State(state): State<ApiState>,
    id: Result<Path<String>, PathRejection>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<SnapshotSchedule>, ApiError> {
    let request = ScheduleRequest::read(json(body)?)?;
    let instance = lookup::instance_to_change(state.store(), &id?.0)?.meta.uid.clone();
    let object = state.store().transact(move |tx| admission::put(tx, &instance, request)).await?;
    Ok(Json(SnapshotSchedule::of(&object, Timestamp::now())))
}

pub(super) async fn get(
    State(state): State<ApiState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<SnapshotSchedule>, ApiError> {
    let instance = lookup::instance(state.store(), &id?.0)?;
    let object = state.store().find::<Kind>(&Name::from(&instance.meta.uid));
    let object = object.filter(|object| !object.meta.is_deleting());
    let object = object.ok_or_else(|| ApiError::not_found(admission::NO_SCHEDULE))?;
    Ok(Json(SnapshotSchedule::of(&object, Timestamp::now())))
}

pub(super) async fn delete(
    State(state): State<ApiState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<StatusCode, ApiError> {
    let instance = lookup::instance_to_change(state.store(), &id?.0)?.meta.uid.clone();
    state.store().transact(move |tx| admission::delete(tx, &instance)).await?;
    Ok(StatusCode::NO_CONTENT)
}
