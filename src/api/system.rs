//! Health, capabilities and backup of the server.

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use stead_schemas::api::Capabilities;

use super::{ApiError, ApiState};

/// Reports health; a store that cannot write any more makes the server unhealthy.
pub(super) async fn health(State(state): State<ApiState>) -> (StatusCode, Json<Value>) {
    match state.0.backend.store_failure() {
        None => (StatusCode::OK, Json(json!({"status": "ok"}))),
        Some(why) => (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"status": "failed", "message": why}))),
    }
}

pub(super) async fn capabilities(State(state): State<ApiState>) -> Json<Capabilities> {
    Json(state.0.capabilities.clone())
}

/// Streams a backup of the control plane; an incomplete backup breaks the client's connection.
pub(super) async fn backup(State(state): State<ApiState>) -> Result<Response, ApiError> {
    let stream = state.0.backend.backup().await?;
    let kind = [(header::CONTENT_TYPE, "application/octet-stream")];
    Ok((kind, Body::from_stream(stream)).into_response())
}
