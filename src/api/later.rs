//! Routes of the contract that this server cannot serve yet: each says so, with the right scope.
//!
//! Lists of kinds that do not exist here are empty, which is true, and keeps list-all clients whole.

use axum::Json;
use axum::http::Uri;
use axum::routing::{delete, get, post};
use serde_json::Value;

use super::ApiError;
use super::auth::Scope;
use super::route::Routes;

async fn empty() -> Json<Vec<Value>> {
    Json(Vec::new())
}

async fn not_yet(uri: Uri) -> ApiError {
    ApiError::not_supported(uri.path())
}

pub(super) fn add(mut routes: Routes) -> Routes {
    let kinds = [
        ("/devices", "/devices/{id}", [Scope::DeviceRead, Scope::DeviceWrite, Scope::DeviceDelete]),
        ("/builds", "/builds/{id}", [Scope::BuildRead, Scope::BuildWrite, Scope::BuildDelete]),
        ("/builders", "/builders/{id}", [Scope::BuildRead, Scope::BuildWrite, Scope::BuildDelete]),
        ("/pushes", "/pushes/{id}", [Scope::ImageRead, Scope::ImageWrite, Scope::ImageDelete]),
    ];
    for (list, one, [read, write, remove]) in kinds {
        routes = routes
            .add(list, read, get(empty))
            .add(list, write, post(not_yet))
            .add(one, read, get(absent))
            .add(one, remove, delete(absent));
    }
    routes
        .add("/volumes/from-archive", Scope::VolumeWrite, post(not_yet))
        .add("/devices/available", Scope::DeviceRead, get(empty))
        .add("/resources", Scope::ResourceRead, get(not_yet))
        .add("/resources/memory/reclaim", Scope::ResourceRead, post(not_yet))
}

async fn absent() -> ApiError {
    ApiError::not_found()
}
