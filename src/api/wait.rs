//! Waiting for a state: woken by the store, without polling.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use stead_schemas::api::{WaitForState, parse_state};
use stead_schemas::instance::{Instance, Power, State as Is};
use stead_schemas::limits::WAIT_MAX;
use stead_schemas::meta::{Kind, Object};
use stead_schemas::names::Uid;
use stead_schemas::quantity::GoDuration;

use super::{ApiError, ApiState, lookup};

const WAIT_DEFAULT: Duration = Duration::from_secs(60);

/// Waits until `is_over` holds for the object, or until the deadline, and returns the object then; `None`
/// when the object is gone.
pub(super) async fn until<K: Kind>(
    state: &ApiState,
    uid: &Uid,
    at_most: Duration,
    is_over: impl Fn(&Object<K>) -> bool,
) -> Option<Arc<Object<K>>> {
    let deadline = tokio::time::Instant::now() + at_most;
    let mut waiter = state.0.waiters.wait(uid);
    loop {
        waiter.mark_seen();
        let object = state.store().get::<K>(uid)?;
        if is_over(&object) || tokio::time::timeout_at(deadline, waiter.news()).await.is_err() {
            return Some(object);
        }
    }
}

pub(super) async fn wait_for_state(
    State(state): State<ApiState>,
    id: Result<Path<String>, PathRejection>,
    params: Result<Query<BTreeMap<String, String>>, QueryRejection>,
) -> Result<Json<WaitForState>, ApiError> {
    let Query(params) = params?;
    let wanted = params.get("state").and_then(|word| parse_state(word)).filter(|&state| state != Is::Unknown);
    let wanted = wanted.ok_or_else(|| {
        ApiError::bad_request("invalid_state", "state is required: one of the states but Unknown")
    })?;
    let timeout = match params.get("timeout") {
        None => WAIT_DEFAULT,
        Some(text) => {
            let refuse = |why: String| ApiError::bad_request("invalid_timeout", format!("timeout {why}"));
            let GoDuration(timeout) = text
                .parse()
                .map_err(|error: stead_schemas::quantity::QuantityError| refuse(error.to_string()))?;
            if timeout.is_zero() {
                return Err(refuse("must be more than zero".to_owned()));
            }
            timeout.min(WAIT_MAX)
        }
    };
    let uid = lookup::instance(state.store(), &id?.0)?.meta.uid.clone();
    let seen =
        until::<Instance>(&state, &uid, timeout, |object| object.status.state == wanted || is_final(object))
            .await;
    let object = seen.ok_or_else(|| ApiError::absent(Instance::NAME, uid.as_str()))?;
    let status = &object.status;
    let timed_out = status.state != wanted && !is_final(&object);
    Ok(Json(WaitForState { state: status.state, timed_out, state_error: status.state_error.clone() }))
}

/// True if the instance is down and its spec leads to no other state: waiting longer is of no use.
fn is_final(object: &Object<Instance>) -> bool {
    match object.status.state {
        Is::Stopped => object.goal().run().is_none(),
        Is::Standby => object.spec.power == Power::Standby,
        _ => false,
    }
}
