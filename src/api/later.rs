//! Routes of the contract that this server cannot serve yet: each says so, with the right scope.
//!
//! Lists of kinds that do not exist here are empty, which is true, and keeps list-all clients whole.

use axum::Json;
use axum::http::Uri;
use serde_json::Value;

use super::ApiError;
use super::auth::Scope;
use super::route::Verb::{Delete, Get, Post};
use super::route::{Routes, needs};

async fn empty() -> Json<Vec<Value>> {
    Json(Vec::new())
}

async fn not_yet(uri: Uri) -> ApiError {
    ApiError::not_supported(uri.path())
}

pub(super) fn add(mut routes: Routes) -> Routes {
    const DEVICES: [&[Scope]; 3] = [&[Scope::DeviceRead], &[Scope::DeviceWrite], &[Scope::DeviceDelete]];
    const BUILDS: [&[Scope]; 3] = [&[Scope::BuildRead], &[Scope::BuildWrite], &[Scope::BuildDelete]];
    const PUSHES: [&[Scope]; 3] = [&[Scope::ImageRead], &[Scope::ImageWrite], &[Scope::ImageDelete]];
    let kinds = [
        ("/devices", "/devices/{id}", DEVICES),
        ("/builds", "/builds/{id}", BUILDS),
        ("/builders", "/builders/{id}", BUILDS),
        ("/pushes", "/pushes/{id}", PUSHES),
    ];
    for (list, one, [read, write, remove]) in kinds {
        routes = routes
            .add(Get, list, needs(read).query(&["tags[]"]), empty)
            .add(Post, list, needs(write).any_query(), not_yet)
            .add(Get, one, needs(read).any_query(), absent)
            .add(Delete, one, needs(remove).any_query(), absent);
    }
    routes
        .add(Post, "/volumes/from-archive", needs(&[Scope::VolumeWrite]).any_query(), not_yet)
        .add(Get, "/devices/available", needs(&[Scope::DeviceRead]), empty)
        .add(Get, "/resources", needs(&[Scope::ResourceRead]).any_query(), not_yet)
        .add(Post, "/resources/memory/reclaim", needs(&[Scope::ResourceRead]).any_query(), not_yet)
}

async fn absent() -> ApiError {
    ApiError::not_found()
}
