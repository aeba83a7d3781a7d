//! Health, capabilities and backup of the server.

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use stead_controllers::network::admission::DEFAULT_NETWORK;
use stead_schemas::api::{
    Capabilities, Health, HostView, ImagesView, NetworkModel, Runtime, RuntimeView, ServerHealth, ServerView,
};
use stead_schemas::capabilities::VmmCapabilities;
use stead_schemas::instance::Hypervisor;
use stead_schemas::names::Name;
use stead_schemas::network::Network;
use stead_schemas::node::{HypervisorStatus, NodeStatus};

use super::{ApiError, ApiState, lookup};

/// Version of the published API whose behaviour this server has.
const API_VERSION: &str = "0.3.0";

/// Reports health; a store that cannot write any more makes the server unhealthy.
pub(super) async fn health(State(state): State<ApiState>) -> (StatusCode, Json<Health>) {
    match state.0.backend.store_failure() {
        None => (StatusCode::OK, Json(Health { status: ServerHealth::Ok, message: None })),
        Some(why) => {
            let health = Health { status: ServerHealth::Failed, message: Some(why) };
            (StatusCode::SERVICE_UNAVAILABLE, Json(health))
        }
    }
}

pub(super) async fn capabilities(State(state): State<ApiState>) -> Result<Json<Capabilities>, ApiError> {
    let node = lookup::node(state.store())?;
    let name = Name::resource(DEFAULT_NETWORK).map_err(|_| ApiError::internal())?;
    let gateway = state.store().find::<Network>(&name).map(|network| network.spec.gateway);
    let default = node.spec.default_hypervisor;
    let is_available = node.status.hypervisors.get(&default).is_some_and(|status| status.is_available);
    let platform = node.spec.platform;
    Ok(Json(Capabilities {
        server: ServerView {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            api_version: API_VERSION.to_owned(),
        },
        host: HostView {
            os: "linux".to_owned(),
            arch: platform.architecture().to_owned(),
            cgroups: node.status.has_cgroups,
            vhost_net: node.status.has_vhost_net,
            missing_walls: node.status.missing_walls.iter().map(|wall| wall.as_str().to_owned()).collect(),
            accelerator_problem: node.status.accelerator_problem.clone(),
        },
        default_runtime: Runtime { name: default.as_str().to_owned(), available: is_available },
        runtimes: runtimes(&node.status),
        network: NetworkModel {
            model: "bridge".to_owned(),
            guest_to_guest: false,
            gateway: gateway.map(|gateway| gateway.address.to_string()),
            subnet: gateway.map(|gateway| gateway.subnet().to_string()),
        },
        images: ImagesView {
            platforms: vec![platform.as_str().to_owned()],
            default_platform: platform.as_str().to_owned(),
        },
        features: ["exec", "images", "ingress", "instances", "logs", "volumes"]
            .map(ToOwned::to_owned)
            .to_vec(),
    }))
}

/// Returns the hypervisors of this host, sorted by name.
fn runtimes(node: &NodeStatus) -> Vec<RuntimeView> {
    let view = |(hypervisor, status): (&Hypervisor, &HypervisorStatus)| RuntimeView {
        name: hypervisor.as_str().to_owned(),
        available: status.is_available,
        features: features(status.capabilities),
        accelerator: node.accelerator.map(|accelerator| accelerator.as_str().to_owned()),
    };
    let mut runtimes: Vec<RuntimeView> = node.hypervisors.iter().map(view).collect();
    runtimes.sort_by(|one, other| one.name.cmp(&other.name));
    runtimes
}

/// Returns the wire's names of a hypervisor's capabilities. The disk of every VM can be captured.
fn features(has: VmmCapabilities) -> Vec<String> {
    let all = [
        ("disk-io-limit", has.io_limits),
        ("fork", has.fork_memory),
        ("gpu-passthrough", has.devices),
        ("hotplug-memory", has.resize_memory),
        ("live-volumes", has.live_volumes),
        ("snapshots", true),
        ("standby", has.standby),
    ];
    all.into_iter().filter(|(_, has)| *has).map(|(name, _)| name.to_owned()).collect()
}

/// Streams a backup of the control plane; an incomplete backup breaks the client's connection.
pub(super) async fn backup(State(state): State<ApiState>) -> Result<Response, ApiError> {
    let stream = state.0.backend.backup().await?;
    let kind = [(header::CONTENT_TYPE, "application/octet-stream")];
    Ok((kind, Body::from_stream(stream)).into_response())
}
