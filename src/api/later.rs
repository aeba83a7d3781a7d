//! Routes of the contract that this server cannot serve yet: each responds that it is not supported, with
//! the right scope.
//!
//! Lists of kinds that do not exist here are empty, which is true, and keeps clients that list everything
//! working.

use axum::Json;
use axum::extract::Query;
use axum::extract::rejection::QueryRejection;
use axum::http::Uri;
use serde_json::Value;

use super::ApiError;
use super::auth::Scope;
use super::instances::{Params, tag_filter};
use super::route::Verb::{Delete, Get, Post};
use super::route::{Routes, needs};

async fn empty(params: Result<Query<Params>, QueryRejection>) -> Result<Json<Vec<Value>>, ApiError> {
    tag_filter(&params?.0)?;
    Ok(Json(Vec::new()))
}

async fn not_yet(uri: Uri) -> ApiError {
    ApiError::not_supported(uri.path())
}

pub(super) fn add(mut routes: Routes) -> Routes {
    const DEVICES: [&[Scope]; 3] = [&[Scope::DeviceRead], &[Scope::DeviceWrite], &[Scope::DeviceDelete]];
    const BUILDS: [&[Scope]; 3] = [&[Scope::BuildRead], &[Scope::BuildWrite], &[Scope::BuildDelete]];
    let kinds = [
        ("/devices", "/devices/{id}", DEVICES),
        ("/builds", "/builds/{id}", BUILDS),
        ("/builders", "/builders/{id}", BUILDS),
    ];
    for (list, one, [read, write, remove]) in kinds {
        routes = routes
            .add(Get, list, needs(read).query(&["tags[]"]), empty)
            .add(Post, list, needs(write).any_query(), not_yet)
            .add(Get, one, needs(read).any_query(), absent)
            .add(Delete, one, needs(remove).any_query(), absent);
    }
    let read = needs(&[Scope::ImageRead]);
    routes
        .add(Get, "/pushes", read.query(&["tags[]"]), empty)
        .add(Post, "/pushes", needs(&[Scope::ImageWrite]).any_query(), not_yet)
        .add(Get, "/pushes/{id}", read.any_query(), absent)
        .add(Post, "/volumes/from-archive", needs(&[Scope::VolumeWrite]).any_query(), not_yet)
        .add(Get, "/devices/available", needs(&[Scope::DeviceRead]), empty)
        .add(Get, "/resources", needs(&[Scope::ResourceRead]).any_query(), not_yet)
        .add(Post, "/resources/memory/reclaim", needs(&[Scope::ResourceRead]).any_query(), not_yet)
}

async fn absent(uri: Uri) -> ApiError {
    ApiError::not_found(format!("there is no {}", uri.path()))
}
