//! The HTTP API: conversion between wire and store.
//!
//! Guarantees: a request is validated whole before anything is stored; the response to a write is sent after
//! the write is durable; every error has the same shape; bodies, headers, connections and concurrent
//! requests are bounded, and overload is answered with 503 and `Retry-After`; requests that wait do not
//! block those that do not, and `/health` answers whatever the load.
//! Never: touches the host; what it needs of the host it gets through the traits of `backend`.

mod arrivals;
mod audit;
pub mod auth;
mod auto_standby;
mod backend;
mod client;
mod cp;
mod error;
mod exec;
mod images;
mod ingresses;
mod instances;
mod json;
mod listener;
mod local;
mod logs;
mod lookup;
mod mounts;
mod openapi;
mod operation;
mod pace;
mod pools;
mod reclaim;
mod refusals;
mod resources;
mod route;
mod rule;
mod schedules;
mod scope;
mod seats;
mod secrets;
mod server;
mod snapshots;
mod socket;
mod stat;
mod stats;
mod system;
mod table;
mod tags;
pub mod tls;
mod token_signing;
pub mod tokens;
mod unsupported;
mod volumes;
mod wait;
mod waiters;
mod watch;

#[cfg(test)]
mod silence_tests;

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware;
use stead_controllers::store::Store;
use stead_schemas::limits;

pub use audit::Audit;
pub use backend::{Backend, ImportStream, Imported, LogError, LogStream, PrepareError, PreparedVolume};
pub use error::ApiError;
pub use listener::Listener;
pub use local::{Account, LocalUsers};
pub use route::RouteView;
pub use server::{ServerLimits, serve};

use auth::Keys;
use pools::Pools;
use refusals::Refusals;
use waiters::Waiters;
use watch::Watches;

/// The state that every handler may use; cheap to clone.
#[derive(Clone)]
pub struct ApiState(Arc<Inner>);

struct Inner {
    store: Store,
    keys: Keys,
    backend: Arc<dyn Backend>,
    tap_prefix: String,
    pools: Pools,
    waiters: Arc<Waiters>,
    watches: Watches,
    shows_secrets: bool,
    requires_permissions: bool,
    audit: Audit,
}

/// The parts that the API is made of.
pub struct ApiConfig {
    pub store: Store,
    pub keys: Keys,
    pub backend: Arc<dyn Backend>,
    pub tap_prefix: String,
    /// Number of concurrent requests of each pool: requests that are being sent, short requests, requests
    /// that wait for a state, verbs, and streams. Tokens of one subject get at most half of each pool.
    pub requests_max: usize,
    /// Number of concurrent sessions of exec and cp.
    pub sockets_max: usize,
    /// True if responses to all tokens contain secrets.
    pub shows_secrets: bool,
    /// True if a token that names no permissions is refused; otherwise it has all permissions, as with the
    /// peer.
    pub requires_permissions: bool,
    /// The audit log that changes are recorded in; by default none.
    pub audit: Audit,
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
    /// Makes the state. Must be called within a runtime, because it spawns a task.
    #[must_use]
    pub fn new(config: ApiConfig) -> Self {
        let ApiConfig {
            store,
            keys,
            backend,
            tap_prefix,
            requests_max,
            sockets_max,
            shows_secrets,
            requires_permissions,
            audit,
        } = config;
        let pools = Pools::new(requests_max, sockets_max);
        let waiters = Waiters::of(&store);
        Self(Arc::new(Inner {
            store,
            keys,
            backend,
            tap_prefix,
            pools,
            waiters,
            watches: Watches::default(),
            shows_secrets,
            requires_permissions,
            audit,
        }))
    }

    fn store(&self) -> &Store {
        &self.0.store
    }
}

/// Returns the router of all routes, with the layers in front of them.
pub fn router(state: ApiState) -> Router {
    table::routes(state)
        .finish()
        .layer(DefaultBodyLimit::max(limits::BODY_BYTES_MAX))
        .layer(middleware::from_fn_with_state(Arc::<Refusals>::default(), server::observe))
}

/// Returns the table of routes with the scopes that each of them needs.
#[must_use]
pub fn routes(state: ApiState) -> Vec<RouteView> {
    table::routes(state).views()
}
