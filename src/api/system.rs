//! What the server says of itself.

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};
use stead_schemas::api::Capabilities;

use super::ApiState;

pub(super) async fn health() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

pub(super) async fn capabilities(State(state): State<ApiState>) -> Json<Capabilities> {
    Json(state.0.capabilities.clone())
}
