//! Routes of the contract that this server cannot serve yet: each responds that it is not supported, with
//! the right scope.
//!
//! Lists of kinds that do not exist here are empty, which is true, and keeps clients that list everything
//! working.

use axum::Json;
use axum::extract::Query;
use axum::extract::rejection::QueryRejection;
use axum::http::{StatusCode, Uri};
use serde_json::{Map, Value};
use stead_schemas::api::query::TagFilter;

use super::ApiError;
use super::auth::Scope;
use super::instances::{Params, tag_filter};
use super::operation::{Operation, delete, get, post};
use super::route::Routes;
use super::rule::needs;

async fn empty(params: Result<Query<Params>, QueryRejection>) -> Result<Json<Vec<Value>>, ApiError> {
    tag_filter(&params?.0)?;
    Ok(Json(Vec::new()))
}

async fn not_yet(uri: Uri) -> ApiError {
    ApiError::not_supported(uri.path())
}

/// Describes a list that is always empty.
fn no_list(
    path: &'static str,
    id: &'static str,
    summary: &'static str,
    scope: &'static [Scope],
) -> Operation {
    get(path, id, summary).under(needs(scope)).answers::<Vec<Map<String, Value>>>(StatusCode::OK)
}

/// Describes a route that is not served yet.
fn unserved(operation: Operation, scope: &'static [Scope]) -> Operation {
    operation.under(needs(scope)).not_yet(StatusCode::NOT_IMPLEMENTED)
}

/// Describes a route to an object of a kind that has none.
fn unknown(operation: Operation, scope: &'static [Scope]) -> Operation {
    operation.under(needs(scope)).not_yet(StatusCode::NOT_FOUND)
}

pub(super) fn add(routes: Routes) -> Routes {
    add_builds(add_devices(routes))
}

fn add_devices(routes: Routes) -> Routes {
    const READ: &[Scope] = &[Scope::DeviceRead];
    let list = no_list("/devices", "listDevices", "List devices; there are none yet", READ);
    let available = "List devices that can be registered; there are none yet";
    routes
        .add(list.query::<TagFilter>(), empty)
        .add(no_list("/devices/available", "listAvailableDevices", available, READ), empty)
        .add(
            unserved(
                post("/devices", "createDevice", "Register a device; it is not supported yet"),
                &[Scope::DeviceWrite],
            ),
            not_yet,
        )
        .add(unknown(get("/devices/{id}", "getDevice", "Read a device; there are none yet"), READ), absent)
        .add(
            unknown(
                delete("/devices/{id}", "deleteDevice", "Remove a device; there are none yet"),
                &[Scope::DeviceDelete],
            ),
            absent,
        )
}

fn add_builds(routes: Routes) -> Routes {
    const READ: &[Scope] = &[Scope::BuildRead];
    const WRITE: &[Scope] = &[Scope::BuildWrite];
    const DELETE: &[Scope] = &[Scope::BuildDelete];
    const IMAGES: &[Scope] = &[Scope::ImageRead];
    let builds = no_list("/builds", "listBuilds", "List builds; there are none yet", READ);
    let builders = no_list("/builders", "listBuilders", "List builders; there are none yet", READ);
    let pushes = no_list("/pushes", "listPushes", "List pushes; there are none yet", IMAGES);
    let build = post("/builds", "createBuild", "Build an image; it is not supported yet");
    let builder = post("/builders", "createBuilder", "Create a builder; it is not supported yet");
    let push = post("/pushes", "createPush", "Push an image; it is not supported yet");
    routes
        .add(builds.query::<TagFilter>(), empty)
        .add(unserved(build, WRITE), not_yet)
        .add(unknown(get("/builds/{id}", "getBuild", "Read a build; there are none yet"), READ), absent)
        .add(
            unknown(delete("/builds/{id}", "cancelBuild", "Cancel a build; there are none yet"), DELETE),
            absent,
        )
        .add(builders.query::<TagFilter>(), empty)
        .add(unserved(builder, WRITE), not_yet)
        .add(unknown(get("/builders/{id}", "getBuilder", "Read a builder; there are none yet"), READ), absent)
        .add(
            unknown(
                delete("/builders/{id}", "deleteBuilder", "Delete a builder; there are none yet"),
                DELETE,
            ),
            absent,
        )
        .add(pushes.query::<TagFilter>(), empty)
        .add(unserved(push, &[Scope::ImageWrite]), not_yet)
        .add(unknown(get("/pushes/{id}", "getPush", "Read a push; there are none yet"), IMAGES), absent)
}

async fn absent(uri: Uri) -> ApiError {
    ApiError::not_found(format!("there is no {}", uri.path()))
}
