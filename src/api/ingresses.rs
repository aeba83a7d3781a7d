//! Ingresses: host names at ports of this host that lead to instances.

use std::collections::{BTreeMap, BTreeSet};

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use stead_controllers::ingress::admission;
use stead_controllers::refused::{Refused, RefusedKind};
use stead_schemas::api::{self, IngressRequest};
use stead_schemas::ingress::{Ingress, IngressRule};
use stead_schemas::limits::VERB_WAIT_MAX;
use stead_schemas::validate::FieldErrors;

use super::auth::Bearer;
use super::instances::{has_tags, json, tag_filter};
use super::wait::until;
use super::{ApiError, ApiState, lookup, secrets};

type Params = BTreeMap<String, String>;

pub(super) async fn create(
    State(state): State<ApiState>,
    bearer: Bearer,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let request = IngressRequest::read(json(body)?)?;
    check_ports(&state, &request.rules)?;
    let object = state.store().transact(move |tx| admission::create(tx, request)).await?;
    // The response waits for the first pass: the ingress is served then, or the conditions say why not.
    let (uid, generation) = (&object.meta.uid, object.meta.generation);
    let is_over = |seen: &stead_schemas::meta::Object<Ingress>| seen.status.observed_generation >= generation;
    let seen = until::<Ingress>(&state, uid, VERB_WAIT_MAX, is_over).await.unwrap_or(object.clone());
    Ok((StatusCode::CREATED, Json(secrets::ingress(&bearer, api::Ingress::of(&seen)))).into_response())
}

/// Refuses ports that another program uses now; a port that is taken later is reported in a condition.
fn check_ports(state: &ApiState, rules: &[IngressRule]) -> Result<(), ApiError> {
    let ports: BTreeSet<u16> = rules.iter().map(|rule| rule.port).collect();
    let taken: BTreeSet<u16> = ports.into_iter().filter(|&port| !state.0.backend.can_listen(port)).collect();
    let mut errors = FieldErrors::default();
    for (index, rule) in rules.iter().enumerate().filter(|(_, rule)| taken.contains(&rule.port)) {
        let message = format!("is {}, which another program listens at", rule.port);
        errors.push(format!("rules[{index}].match.port"), "port_in_use", message);
    }
    errors.into_result().map_err(|fields| Refused::fields(RefusedKind::PortInUse, fields).into())
}

pub(super) async fn list(
    State(state): State<ApiState>,
    bearer: Bearer,
    params: Result<Query<Params>, QueryRejection>,
) -> Result<Json<Vec<api::Ingress>>, ApiError> {
    let Query(params) = params?;
    let tags = tag_filter(&params)?;
    let objects = state.store().list::<Ingress>();
    let shown = objects.iter().filter(|one| !one.meta.is_deleting() && has_tags(&one.meta.tags, &tags));
    Ok(Json(shown.map(|object| secrets::ingress(&bearer, api::Ingress::of(object))).collect()))
}

pub(super) async fn get(
    State(state): State<ApiState>,
    bearer: Bearer,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<api::Ingress>, ApiError> {
    let object = lookup::named::<Ingress>(state.store(), &id?.0)?;
    Ok(Json(secrets::ingress(&bearer, api::Ingress::of(&object))))
}

pub(super) async fn delete(
    State(state): State<ApiState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<StatusCode, ApiError> {
    let uid = lookup::named_to_change::<Ingress>(state.store(), &id?.0)?.meta.uid.clone();
    let moved = uid.clone();
    state.store().transact(move |tx| admission::delete(tx, &moved)).await?;
    // By then nothing of the ingress is served any more, and its host names are free.
    until::<Ingress>(&state, &uid, VERB_WAIT_MAX, |_| false).await;
    Ok(StatusCode::NO_CONTENT)
}
