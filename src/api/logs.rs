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
use stead_schemas::mediation::Mediation;
use stead_schemas::references::Ref;

use super::instances::flag;
use super::{ApiError, ApiState, LogError, ServerLimits, lookup};

const TAIL_DEFAULT: usize = 100;
const TAIL_MAX: usize = 100_000;

type Params = Result<Query<BTreeMap<String, String>>, QueryRejection>;

pub(super) async fn logs(
    State(state): State<ApiState>,
    limits: ServerLimits,
    id: Result<Path<String>, PathRejection>,
    params: Params,
) -> Result<Response, ApiError> {
    let Query(params) = params?;
    let source = params.get("source").map_or("app", String::as_str);
    let source = match source {
        "app" | "vmm" | "stead" | "egress" => source,
        // The wire calls this log `hypeman`.
        "hypeman" => "stead",
        _ => {
            return Err(ApiError::bad_request(
                "invalid_request",
                "source must be app, vmm, stead, hypeman or egress",
            ));
        }
    };
    read((&state, limits), id, &params, source, |line| serde_json::Value::String(line).to_string()).await
}

/// Reads the log of what mediated egress carried. Each event is the object of one line.
pub(super) async fn egress(
    State(state): State<ApiState>,
    limits: ServerLimits,
    id: Result<Path<String>, PathRejection>,
    params: Params,
) -> Result<Response, ApiError> {
    read((&state, limits), id, &params?.0, "egress", |line| line).await
}

/// Sends the lines of a log as events with what `form` makes of them.
async fn read(
    (state, limits): (&ApiState, ServerLimits),
    id: Result<Path<String>, PathRejection>,
    params: &BTreeMap<String, String>,
    source: &str,
    form: fn(String) -> String,
) -> Result<Response, ApiError> {
    let count = match params.get("tail") {
        None => TAIL_DEFAULT,
        Some(text) => text.parse().ok().filter(|count| (0..=TAIL_MAX).contains(count)).ok_or_else(|| {
            ApiError::bad_request(
                "invalid_request",
                format!("tail must be a whole number from 0 to {TAIL_MAX}"),
            )
        })?,
    };
    let follows = flag(params, "follow")?.unwrap_or(false);
    let object = lookup::instance(state.store(), &id?.0)?;
    // The log of egress belongs to the policy, which comes and goes with the card.
    let policy = object.spec.allocated.nic.as_ref().filter(|_| source == "egress");
    let policy = policy.and_then(|nic| state.store().uids_referring::<Mediation>(&Ref::to_owner(nic)).pop());
    let owner = match policy {
        Some(policy) => policy,
        None => object.meta.uid.clone(),
    };
    let lines = state.0.backend.log(&owner, source, count, follows).await;
    let lines = lines.map_err(|error| match error {
        LogError::Missing => {
            ApiError::new(StatusCode::NOT_FOUND, "log_not_found", "there is no such log yet")
        }
        LogError::Busy(why) => ApiError::overloaded(&format!("the log cannot be read now: {why}")),
    })?;
    let events = lines.map(move |lines| {
        let events = lines.into_iter().map(|line| format!("data: {}\n\n", form(line)));
        Bytes::from(events.collect::<String>())
    });
    let events = stream::unfold(Box::pin(events), move |mut events| async move {
        match tokio::time::timeout(limits.stream_idle_max, events.next()).await {
            Ok(bytes) => bytes.map(|bytes| (Ok::<Bytes, Infallible>(bytes), events)),
            Err(_) => Some((Ok(Bytes::from_static(b": still here\n\n")), events)),
        }
    });
    let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-cache")];
    Ok((headers, [("x-accel-buffering", "no")], Body::from_stream(events)).into_response())
}
