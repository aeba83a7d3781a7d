//! `GET /instances/{id}/stat`: the properties of one path inside the guest.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use stead_schemas::api::{PathView, named};
use stead_schemas::guest::{FromStream, Request, Stat};

use super::instances::flag;
use super::{ApiError, ApiState, socket};
use crate::guest_channel::{AgentError, Event};

/// Time for the guest's answer: it takes a millisecond, and a guest whose disk hangs does not answer at all.
const ANSWER_WAIT: Duration = Duration::from_secs(30);

pub(super) async fn stat(
    State(state): State<ApiState>,
    id: Result<Path<String>, PathRejection>,
    params: Result<Query<BTreeMap<String, String>>, QueryRejection>,
) -> Result<Json<PathView>, ApiError> {
    let Query(params) = params?;
    let text = params.get("path").cloned().unwrap_or_default();
    let path = named("path", text, params.get("path_base64").map(String::as_str));
    let path = path.map_err(|why| ApiError::bad_request("invalid_request", why))?;
    if !path.is_absolute() || path.has_nul() {
        return Err(ApiError::bad_request("invalid_request", "path is required and must be absolute"));
    }
    let follows_links = flag(&params, "follow_links")?.unwrap_or(false);
    let uid = socket::running(state.store(), &id?.0)?.meta.uid.clone();
    let request = Request::Stat(Stat { path, follows_links });
    let mut stream = socket::open(&state, &uid, request, None).await?;
    match tokio::time::timeout(ANSWER_WAIT, stream.receiver.next()).await {
        Ok(Some(Event::Message(FromStream::Info(info)))) => Ok(Json(info.into())),
        Ok(_) => Err(AgentError::Lost.into()),
        Err(_) => Err(AgentError::Unresponsive.into()),
    }
}
