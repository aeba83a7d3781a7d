//! The state of auto-standby, and the hold.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use stead_controllers::store::Store;
use stead_controllers::vm::admission;
use stead_schemas::api::AutoStandbyView;
use stead_schemas::instance::Instance;
use stead_schemas::meta::Object;
use stead_schemas::network::Nic;

use super::{ApiError, ApiState, lookup};

fn view(store: &Store, object: &Object<Instance>) -> Json<AutoStandbyView> {
    let nic = object.spec.allocated.nic.as_ref().and_then(|uid| store.get::<Nic>(uid));
    let nic = nic.as_deref().map(|nic| &nic.spec);
    Json(AutoStandbyView::of(object, nic, store.now()))
}

pub(super) async fn status(
    State(state): State<ApiState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<AutoStandbyView>, ApiError> {
    let object = lookup::instance(state.store(), &id?.0)?;
    Ok(view(state.store(), &object))
}

pub(super) async fn hold(
    State(state): State<ApiState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<AutoStandbyView>, ApiError> {
    let uid = lookup::instance_to_change(state.store(), &id?.0)?.meta.uid.clone();
    let object = state.store().transact(move |tx| admission::hold(tx, &uid)).await?;
    Ok(view(state.store(), &object))
}
