//! The resources of the host.

use axum::Json;
use axum::extract::State;
use stead_schemas::api::Resources;
use stead_schemas::instance::Instance;

use super::{ApiError, ApiState, lookup};

/// Reports capacities and allocations, all from the store: no request waits for the host or for its disk.
pub(super) async fn resources(State(state): State<ApiState>) -> Result<Json<Resources>, ApiError> {
    let node = lookup::node(state.store())?;
    let (instances, usage) = state.store().list_with_usage::<Instance>();
    Ok(Json(Resources::of(&node, &usage, instances.iter().map(AsRef::as_ref))))
}
