//! `GET /instances?watch=true&resource_version=N`: changes as they happen, as one JSON line each.
//!
//! A line is `{"type": "added"|"modified"|"deleted", "resource_version": N, "object": {...}}`. A client that
//! fell behind, or asks from a version that is too old, gets `{"type": "too_old", "oldest": N}` and lists
//! again. When nothing happens, `{"type": "bookmark", "resource_version": N}` comes from time to time: all
//! changes up to N were sent.

use std::collections::BTreeMap;
use std::convert::Infallible;

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use stead_controllers::store::{Change, Event, Store, Watch};
use stead_schemas::instance::Instance;
use stead_schemas::limits::STREAM_IDLE_MAX;
use stead_schemas::meta::{Kind, Tags};

use super::auth::Bearer;
use super::{ApiError, ApiState, instances, lookup};

pub(super) fn instances(
    state: &ApiState,
    bearer: Bearer,
    params: &BTreeMap<String, String>,
    tags: Tags,
) -> Result<Response, ApiError> {
    let store = state.store().clone();
    let from = match params.get("resource_version") {
        None => store.revision(),
        Some(text) => text.parse().map_err(|_| {
            ApiError::bad_request("invalid_request", "resource_version must be a number of an earlier answer")
        })?,
    };
    let body = match store.watch(Some(Instance::NAME), from) {
        Ok(watch) => Body::from_stream(futures::stream::unfold(Some((store, watch, tags, bearer)), next)),
        Err(error) => Body::from(line(&json!({"type": "too_old", "oldest": error.oldest}))),
    };
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson"), (header::CACHE_CONTROL, "no-cache")], body)
        .into_response())
}

type Following = Option<(Store, Watch, Tags, Bearer)>;

async fn next(following: Following) -> Option<(Result<Bytes, Infallible>, Following)> {
    let (store, mut watch, tags, bearer) = following?;
    loop {
        match tokio::time::timeout(STREAM_IDLE_MAX, watch.next()).await {
            Err(_) => {
                let mark = line(&json!({"type": "bookmark", "resource_version": watch.revision()}));
                return Some((Ok(mark), Some((store, watch, tags, bearer))));
            }
            Ok(Ok(event)) => {
                if let Some(value) = told(&store, &bearer, &event, &tags) {
                    return Some((Ok(line(&value)), Some((store, watch, tags, bearer))));
                }
            }
            Ok(Err(error)) => {
                return Some((Ok(line(&json!({"type": "too_old", "oldest": error.oldest}))), None));
            }
        }
    }
}

fn told(store: &Store, bearer: &Bearer, event: &Event, tags: &Tags) -> Option<Value> {
    let (word, object) = match event.change {
        Change::Created => ("added", store.get::<Instance>(&event.uid)?),
        // The object is gone meanwhile: its deletion is sent as an event of its own.
        Change::Updated | Change::StatusUpdated => ("modified", store.get::<Instance>(&event.uid)?),
        Change::Deleted => ("deleted", event.last::<Instance>()?),
    };
    let is_wanted = instances::has_tags(&object.meta.tags, tags) && !object.is_pooled();
    is_wanted.then(
        || json!({"type": word, "resource_version": event.revision, "object": lookup::view(store, bearer, &object)}),
    )
}

fn line(value: &Value) -> Bytes {
    Bytes::from(format!("{value}\n"))
}
