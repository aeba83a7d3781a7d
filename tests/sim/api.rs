//! The daemon's own API over a simulated host, without sockets: in virtual time.

use std::sync::Arc;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Request, header};
use serde_json::Value;
use stead::api::auth::{Grant, Keys};
use stead::api::{ApiConfig, ApiState, router};
use stead_controllers::store::Store;
use stead_schemas::names::Uid;
use tower::ServiceExt;

use crate::no_host::{NoHost, api_config};

/// Limit on the length of an answer that is read, in bytes.
const ANSWER_MAX: usize = 1 << 20;
/// Number of requests that are answered at the same time.
const REQUESTS_MAX: usize = 64;

/// The API of one life of the daemon.
#[derive(Clone)]
pub(crate) struct Api {
    router: Router,
    token: String,
    host: Arc<NoHost>,
}

/// Status and body.
pub(crate) type Answer = (u16, Value);

impl Api {
    pub(crate) fn of(store: &Store) -> Self {
        let host = Arc::<NoHost>::default();
        let keys = Keys::new(&[7; 32]);
        let now = jiff::Timestamp::now();
        let expires_at = now + jiff::SignedDuration::from_hours(24);
        let scopes = ["*".to_owned()];
        let grant = Grant { subject: "sim", id: "sim", scopes: &scopes, issued_at: now, expires_at };
        let token = keys.mint(&grant).expect("minted");
        let config = ApiConfig { requests_max: REQUESTS_MAX, ..api_config(store, &keys, &host) };
        Self { router: router(ApiState::new(config)), token, host }
    }

    /// Returns the images whose credentials were passed on.
    pub(crate) fn credentials(&self) -> Vec<Uid> {
        self.host.credentials.lock().expect("not poisoned").clone()
    }

    pub(crate) async fn send(&self, method: &str, path: &str, body: Value) -> Answer {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::AUTHORIZATION, format!("Bearer {}", self.token))
            .header(header::CONTENT_TYPE, "application/json")
            .body(if body.is_null() { Body::empty() } else { Body::from(body.to_string()) });
        let answer = self.router.clone().oneshot(request.expect("a request")).await.expect("an answer");
        let status = answer.status().as_u16();
        let bytes = to_bytes(answer.into_body(), ANSWER_MAX).await.expect("a body");
        (status, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
    }
}
