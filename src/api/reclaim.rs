//! `POST /resources/memory/reclaim`: instances give memory back to their host for a while.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use futures::future::join_all;
use stead_controllers::vm::admission::{Share, plan_reclaim, reclaim as store_reclaim};
use stead_schemas::api::{MemoryReclaim, MemoryReclaimAction, PressureState, ReclaimRequest, ReclaimStatus};
use stead_schemas::condition::{self, ConditionType, Reason};
use stead_schemas::instance::Instance;
use stead_schemas::limits::RECLAIM_WAIT;
use stead_schemas::meta::Object;
use stead_schemas::quantity::Bytes as Size;

use super::instances::json;
use super::wait::until;
use super::{ApiError, ApiState};

pub(super) async fn reclaim(
    State(state): State<ApiState>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<MemoryReclaim>, ApiError> {
    let request = ReclaimRequest::read(json(body)?)?;
    let (bytes, hold_for) = (request.bytes, request.hold_for);
    let (actions, hold_until): (Vec<MemoryReclaimAction>, _) = if request.is_dry_run {
        let shares = plan_reclaim(state.store().list::<Instance>(), bytes);
        (shares.iter().map(|share| action(share, None)).collect(), None)
    } else {
        let stored = state.store().transact(move |tx| store_reclaim(tx, bytes, hold_for)).await?;
        let (shares, until) = stored;
        tracing::info!(bytes, instances = shares.len(), %until, reason = request.reason, "memory is taken back");
        (join_all(shares.iter().map(|share| applied(&state, share))).await, Some(until))
    };
    let is_held = actions.iter().any(|action| action.status != ReclaimStatus::Unsupported);
    let planned = |action: &MemoryReclaimAction| {
        action.previous_target_guest_memory_bytes - action.planned_target_guest_memory_bytes
    };
    let pressure = state.0.backend.pressure();
    Ok(Json(MemoryReclaim {
        requested_reclaim_bytes: request.bytes,
        planned_reclaim_bytes: actions.iter().map(planned).sum(),
        applied_reclaim_bytes: actions.iter().map(|action| action.applied_reclaim_bytes).sum(),
        host_available_bytes: pressure.available.0,
        host_pressure_state: if pressure.is_high { PressureState::Pressure } else { PressureState::Healthy },
        hold_until: hold_until.filter(|_| is_held),
        actions,
    }))
}

/// Waits until an instance gave its share back or cannot, at most for a while.
async fn applied(state: &ApiState, share: &Share) -> MemoryReclaimAction {
    if !share.is_possible() {
        return action(share, Some(&share.object));
    }
    let has_settled = |object: &Object<Instance>| used(object) <= share.after || error(object).is_some();
    let seen: Option<Arc<Object<Instance>>> =
        until::<Instance>(state, &share.object.meta.uid, RECLAIM_WAIT, has_settled).await;
    match seen {
        Some(object) => action(share, Some(&object)),
        // It was deleted meanwhile, which gives back everything.
        None => {
            let status = ReclaimStatus::Applied;
            MemoryReclaimAction { status, applied_reclaim_bytes: share.before.0, ..action(share, None) }
        }
    }
}

fn used(object: &Object<Instance>) -> Size {
    object.status.hotplugged.unwrap_or_default()
}

/// Returns the words of a guest that does not give memory back.
fn error(object: &Object<Instance>) -> Option<String> {
    let condition = condition::find(&object.status.conditions, ConditionType::MemoryResized)?;
    let is_about_this = condition.observed_generation == object.meta.generation;
    (condition.reason == Reason::MemoryInUse && is_about_this).then(|| condition.message.clone())
}

/// Returns the part of one instance, as it is now; `None` for a plan that is not carried out.
fn action(share: &Share, now: Option<&Object<Instance>>) -> MemoryReclaimAction {
    let spec = &share.object.spec;
    let floor = spec.memory_max().0 - spec.hotplug.0;
    let used = now.map_or(share.before, used);
    let (status, error) = match now {
        _ if !share.is_possible() => {
            let why = "its memory is mapped from a saved file, of which nothing can be taken back";
            (ReclaimStatus::Unsupported, Some(why.to_owned()))
        }
        None => (ReclaimStatus::Planned, None),
        Some(_) if used <= share.after => (ReclaimStatus::Applied, None),
        Some(object) => (ReclaimStatus::Pending, error(object)),
    };
    MemoryReclaimAction {
        instance_id: share.object.meta.uid.to_string(),
        instance_name: share.object.meta.name.to_string(),
        hypervisor: spec.hypervisor,
        status,
        assigned_memory_bytes: spec.memory_max().0,
        previous_target_guest_memory_bytes: floor + share.before.0,
        planned_target_guest_memory_bytes: floor + share.after.0,
        target_guest_memory_bytes: floor + used.0,
        protected_floor_bytes: floor,
        applied_reclaim_bytes: share.before.0.saturating_sub(used.0),
        error,
    }
}
