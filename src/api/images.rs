//! Images: create, read, alias, import, delete.

use std::collections::BTreeMap;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::rejection::{BytesRejection, PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use stead_controllers::image::admission;
use stead_controllers::store::{Tx, TxError};
use stead_schemas::api::{Image as View, ImageCreate, ImageTag};
use stead_schemas::image::Image;
use stead_schemas::names::ImageRef;

use super::auth::{Bearer, Scope};
use super::instances::{has_tags, json, tag_filter};
use super::{ApiError, ApiState, lookup};

type Params = BTreeMap<String, String>;

pub(super) async fn create(
    State(state): State<ApiState>,
    bearer: Bearer,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let platform = lookup::node(state.store())?.spec.platform;
    let ImageCreate { reference, platform, tags, credentials } = ImageCreate::read(json(body)?, platform)?;
    let (backend, client) = (state.0.backend.clone(), bearer.subject.clone());
    let create = move |tx: &mut Tx<'_>| {
        let object = admission::create(tx, &reference, platform, tags)?;
        // The client is recorded before the commit, because the registry is asked after it.
        backend.asked_by(&object.meta.uid, &client);
        Ok::<_, TxError>(object)
    };
    // This runs in a task of its own: the credentials exist only here, and must not be lost when the client
    // hangs up.
    let created = tokio::spawn(async move {
        let object = state.store().transact(create).await?;
        if let Some(credentials) = credentials {
            // The credentials are kept after the commit, because the id is needed. An image that was pulled
            // without them is pulled again.
            state.0.backend.keep_credentials(&object.meta.uid, credentials);
        }
        Ok::<_, ApiError>(object)
    });
    let object = created.await.map_err(|_| ApiError::internal())??;
    Ok((StatusCode::ACCEPTED, Json(View::of(&object))).into_response())
}

pub(super) async fn list(
    State(state): State<ApiState>,
    params: Result<Query<Params>, QueryRejection>,
) -> Result<Json<Vec<View>>, ApiError> {
    let tags = tag_filter(&params?.0)?;
    let images = state.store().list::<Image>();
    let wanted = images.iter().filter(|image| !image.meta.is_deleting() && has_tags(&image.meta.tags, &tags));
    Ok(Json(wanted.map(|image| View::of(image)).collect()))
}

pub(super) async fn get(
    State(state): State<ApiState>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<View>, ApiError> {
    Ok(Json(View::of(&*lookup::image(state.store(), &name?.0)?)))
}

pub(super) async fn delete(
    State(state): State<ApiState>,
    name: Result<Path<String>, PathRejection>,
) -> Result<StatusCode, ApiError> {
    let uid = lookup::image(state.store(), &name?.0)?.meta.uid.clone();
    state.store().transact(move |tx| admission::delete(tx, &uid)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Checks the right to put content under this name. A name of a remote registry stands, for all who run it,
/// for what that registry says it is: putting other content there takes a separate scope.
fn publishes(bearer: &Bearer, target: &ImageRef) -> Result<(), ApiError> {
    let host = target.registry.rsplit_once(':').map_or(&*target.registry, |(host, _)| host);
    let is_local = host == "localhost"
        || host.ends_with(".localhost")
        || host
            .trim_matches(['[', ']'])
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback());
    if is_local { Ok(()) } else { bearer.needs(Scope::ImagePublish) }
}

/// Handles `POST /images/{name}/tag`; names have slashes, so the verb is the path's tail.
pub(super) async fn tag(
    State(state): State<ApiState>,
    bearer: Bearer,
    path: Result<Path<String>, PathRejection>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let Path(path) = path?;
    let Some(name) = path.strip_suffix("/tag") else {
        let refused =
            ApiError::refused(StatusCode::METHOD_NOT_ALLOWED, "this path does not take this method");
        return Ok(([(header::ALLOW, "GET,HEAD,DELETE")], refused).into_response());
    };
    let ImageTag { target } = ImageTag::read(json(body)?)?;
    publishes(&bearer, &target)?;
    let source = lookup::image(state.store(), name)?;
    let (uid, name) = (source.meta.uid.clone(), source.meta.name.clone());
    // The alias' content is read in the same commit: otherwise it might be collected before.
    let object = state.store().transact(move |tx| admission::alias(tx, &uid, &target)).await?;
    let Some(object) = object else {
        return Err(ApiError::conflict("image_not_ready", format!("image {name} is not ready")));
    };
    Ok((StatusCode::CREATED, Json(View::of(&object))).into_response())
}

/// Handles `POST /images/import?name=REF` with an archive as the body, which needs no registry.
pub(super) async fn import(
    State(state): State<ApiState>,
    bearer: Bearer,
    params: Result<Query<Params>, QueryRejection>,
    body: Body,
) -> Result<Response, ApiError> {
    let Query(params) = params?;
    let name = params.get("name").ok_or_else(|| ApiError::bad_request("invalid_name", "name is required"))?;
    let target: ImageRef =
        name.parse().map_err(|error| ApiError::bad_request("invalid_name", format!("name {error}")))?;
    publishes(&bearer, &target)?;
    let archive = body.into_data_stream().map(|chunk| chunk.map_err(std::io::Error::other)).boxed();
    let imported = state.0.backend.import(&bearer.subject, archive).await?;
    let (platform, digest) = (lookup::node(state.store())?.spec.platform, imported.digest);
    let object = state.store().transact(move |tx| admission::point(tx, &target, platform, digest)).await?;
    // An object refers to the content by now.
    drop(imported.hold);
    Ok((StatusCode::CREATED, Json(View::of(&object))).into_response())
}
