//! `GET /instances/{id}/stats`: the current resource usage of an instance.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use stead_schemas::api::InstanceStats;
use stead_schemas::network::Nic;

use super::{ApiError, ApiState, lookup};

pub(super) async fn stats(
    State(state): State<ApiState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<InstanceStats>, ApiError> {
    let object = lookup::instance(state.store(), &id?.0)?;
    let nic = object.spec.allocated.nic.as_ref().and_then(|uid| state.store().get::<Nic>(uid));
    let tap = nic.as_ref().map(|nic| nic.spec.tap.as_str());
    let mut stats = state.0.backend.usage(&object.meta.uid, object.status.vmm_pid, tap);
    stats.instance_id = object.meta.uid.to_string();
    stats.instance_name = object.meta.name.to_string();
    stats.allocated_vcpus = object.spec.vcpus;
    stats.allocated_memory_bytes = object.spec.memory_max().0;
    stats.memory_utilization_ratio = ratio(stats.memory_rss_bytes, object.spec.memory_max().0);
    Ok(Json(stats))
}

#[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
fn ratio(used: u64, of: u64) -> Option<f64> {
    (of > 0).then(|| used as f64 / of as f64)
}
