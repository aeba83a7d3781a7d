//! The HTTP API: wire to store and back.
//!
//! Guarantees: a request is validated whole before anything is stored; an answer to a write leaves
//! after it is durable; every error has the one shape; bodies, headers, connections and concurrent
//! requests are bounded, and overload is answered with 503 and `Retry-After`.
//! Never: touches the host: what it needs of it comes in by the traits of `backend`.

pub mod auth;
mod auto_standby;
mod backend;
mod cp;
mod describe;
mod error;
mod exec;
mod images;
mod ingresses;
mod instances;
mod later;
mod logs;
mod lookup;
mod route;
mod schedules;
mod server;
mod snapshots;
mod socket;
mod stat;
mod stats;
mod system;
mod volumes;
mod wait;
mod watch;

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware;
use axum::routing::{delete, get, patch, post, put};
use stead_controllers::store::Store;
use stead_schemas::api::{Capabilities, InstanceDefaults};
use stead_schemas::limits;

pub use backend::{Backend, ImportStream, LogError, LogStream};
pub use error::ApiError;
pub use server::{ServerLimits, serve};

use auth::{Keys, Scope};
use route::Routes;

/// What every handler may use; cheap to clone.
#[derive(Clone)]
pub struct ApiState(Arc<Inner>);

struct Inner {
    store: Store,
    keys: Keys,
    backend: Arc<dyn Backend>,
    defaults: InstanceDefaults,
    tap_prefix: String,
    capabilities: Capabilities,
    admission: tokio::sync::Semaphore,
    sockets: Arc<tokio::sync::Semaphore>,
}

/// What the API is made of.
pub struct ApiConfig {
    pub store: Store,
    pub keys: Keys,
    pub backend: Arc<dyn Backend>,
    pub defaults: InstanceDefaults,
    pub tap_prefix: String,
    pub capabilities: Capabilities,
    /// Requests handled at once, streams not counted once they flow.
    pub requests_max: usize,
    /// Sessions of exec and cp at once.
    pub sockets_max: usize,
}

impl std::fmt::Debug for ApiConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApiConfig").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for ApiState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApiState").finish_non_exhaustive()
    }
}

impl ApiState {
    #[must_use]
    pub fn new(config: ApiConfig) -> Self {
        let ApiConfig { store, keys, backend, defaults, tap_prefix, capabilities, requests_max, sockets_max } =
            config;
        let admission = tokio::sync::Semaphore::new(requests_max);
        let sockets = Arc::new(tokio::sync::Semaphore::new(sockets_max));
        Self(Arc::new(Inner { store, keys, backend, defaults, tap_prefix, capabilities, admission, sockets }))
    }

    fn store(&self) -> &Store {
        &self.0.store
    }
}

/// Every route with its scope. What the contract names and this server lacks is in `later`.
pub fn router(state: ApiState) -> Router {
    let routes = Routes::new(state.clone())
        .public("/health", get(system::health))
        .public("/spec.json", get(describe::json))
        .public("/spec.yaml", get(describe::yaml))
        .add("/capabilities", Scope::ResourceRead, get(system::capabilities))
        .add("/instances", Scope::InstanceRead, get(instances::list))
        .add("/instances", Scope::InstanceWrite, post(instances::create))
        .add("/instances/{id}", Scope::InstanceRead, get(instances::get))
        .add("/instances/{id}", Scope::InstanceDelete, delete(instances::delete))
        .add("/instances/{id}", Scope::InstanceWrite, patch(instances::update))
        .add("/instances/{id}/start", Scope::InstanceWrite, post(instances::start))
        .add("/instances/{id}/stop", Scope::InstanceWrite, post(instances::stop))
        .add("/instances/{id}/standby", Scope::InstanceWrite, post(instances::standby))
        .add("/instances/{id}/restore", Scope::InstanceWrite, post(instances::restore))
        .add("/instances/{id}/fork", Scope::InstanceWrite, post(snapshots::fork))
        .add("/instances/{id}/snapshots", Scope::SnapshotWrite, post(snapshots::create))
        .add("/instances/{id}/snapshots/{snapshot}/restore", Scope::SnapshotWrite, post(snapshots::restore))
        .add("/instances/{id}/snapshot-schedule", Scope::SnapshotRead, get(schedules::get))
        .add("/instances/{id}/snapshot-schedule", Scope::SnapshotWrite, put(schedules::put))
        .add("/instances/{id}/snapshot-schedule", Scope::SnapshotDelete, delete(schedules::delete))
        .add("/snapshots", Scope::SnapshotRead, get(snapshots::list))
        .add("/snapshots/{id}", Scope::SnapshotRead, get(snapshots::get))
        .add("/snapshots/{id}", Scope::SnapshotWrite, patch(snapshots::update))
        .add("/snapshots/{id}", Scope::SnapshotDelete, delete(snapshots::delete))
        .add("/snapshots/{id}/fork", Scope::SnapshotWrite, post(snapshots::fork_snapshot))
        .add("/instances/{id}/auto-standby/status", Scope::InstanceRead, get(auto_standby::status))
        .add("/instances/{id}/auto-standby/hold", Scope::InstanceWrite, post(auto_standby::hold))
        .add("/instances/{id}/wait", Scope::InstanceRead, get(wait::wait_for_state))
        .add("/instances/{id}/logs", Scope::InstanceRead, get(logs::logs))
        .add("/instances/{id}/exec", Scope::InstanceWrite, get(exec::exec))
        .add("/instances/{id}/cp", Scope::InstanceWrite, get(cp::cp))
        .add("/instances/{id}/stats", Scope::InstanceRead, get(stats::stats))
        .add("/instances/{id}/stat", Scope::InstanceRead, get(stat::stat))
        .add("/volumes", Scope::VolumeRead, get(volumes::list))
        .add("/volumes", Scope::VolumeWrite, post(volumes::create))
        .add("/volumes/{id}", Scope::VolumeRead, get(volumes::get))
        .add("/volumes/{id}", Scope::VolumeDelete, delete(volumes::delete))
        .add("/instances/{id}/volumes/{volume}", Scope::VolumeWrite, post(volumes::attach))
        .add("/instances/{id}/volumes/{volume}", Scope::VolumeWrite, delete(volumes::detach))
        .add("/ingresses", Scope::IngressRead, get(ingresses::list))
        .add("/ingresses", Scope::IngressWrite, post(ingresses::create))
        .add("/ingresses/{id}", Scope::IngressRead, get(ingresses::get))
        .add("/ingresses/{id}", Scope::IngressDelete, delete(ingresses::delete))
        .add("/images", Scope::ImageRead, get(images::list))
        .add("/images", Scope::ImageWrite, post(images::create))
        .add_unlimited("/images/import", Scope::ImageWrite, post(images::import))
        .add("/images/{*name}", Scope::ImageRead, get(images::get))
        .add("/images/{*name}", Scope::ImageDelete, delete(images::delete))
        .add("/images/{*name}", Scope::ImageWrite, post(images::tag));
    later::add(routes)
        .finish()
        .layer(DefaultBodyLimit::max(limits::BODY_BYTES_MAX))
        .layer(middleware::from_fn_with_state(state, server::admit))
}
