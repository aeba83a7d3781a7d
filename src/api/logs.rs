//! `GET /instances/{id}/logs`: the last lines, and the following ones, as server-sent events.

use std::collections::BTreeMap;
use std::convert::Infallible;

use axum::body::{Body, Bytes};
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use futures::stream;
use stead_schemas::limits::STREAM_IDLE_MAX;

use super::instances::flag;
use super::{ApiError, ApiState, LogError, lookup};

const TAIL_DEFAULT: usize = 100;
const TAIL_MAX: usize = 100_000;

pub(super) async fn logs(
    State(state): State<ApiState>,
    id: Result<Path<String>, PathRejection>,
    params: Result<Query<BTreeMap<String, String>>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(params) = params?;
    let count = match params.get("tail") {
        None => TAIL_DEFAULT,
        Some(text) => text.parse().ok().filter(|count| (0..=TAIL_MAX).contains(count)).ok_or_else(|| {
            ApiError::bad_request(
                "invalid_request",
                format!("tail must be a whole number from 0 to {TAIL_MAX}"),
            )
        })?,
    };
    let follows = flag(&params, "follow")?.unwrap_or(false);
    let source = params.get("source").map_or("app", String::as_str);
    let source = match source {
        "app" | "vmm" | "stead" => source,
        // The wire calls this log `hypeman`.
        "hypeman" => "stead",
        _ => {
            return Err(ApiError::bad_request(
                "invalid_request",
                "source must be app, vmm, stead or hypeman",
            ));
        }
    };
    let object = lookup::instance(state.store(), &id?.0)?;
    let lines = state.0.backend.log(&object.meta.uid, source, count, follows).await;
    let lines = lines.map_err(|error| match error {
        LogError::Missing => {
            ApiError::new(StatusCode::NOT_FOUND, "log_not_found", "there is no such log yet")
        }
        LogError::Busy(why) => ApiError::overloaded(&format!("the log cannot be read now: {why}")),
    })?;
    let events = lines.map(|lines| {
        let events = lines.into_iter().map(|line| format!("data: {}\n\n", serde_json::Value::String(line)));
        Bytes::from(events.collect::<String>())
    });
    let events = stream::unfold(Box::pin(events), |mut events| async move {
        match tokio::time::timeout(STREAM_IDLE_MAX, events.next()).await {
            Ok(bytes) => bytes.map(|bytes| (Ok::<Bytes, Infallible>(bytes), events)),
            Err(_) => Some((Ok(Bytes::from_static(b": still here\n\n")), events)),
        }
    });
    let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-cache")];
    Ok((headers, [("x-accel-buffering", "no")], Body::from_stream(events)).into_response())
}
