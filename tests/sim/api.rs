//! The daemon's own API over a simulated host, without sockets: in virtual time.

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Request, header};
use futures::future::BoxFuture;
use serde_json::Value;
use stead::api::auth::{Grant, Keys};
use stead::api::{ApiConfig, ApiState, Audit, Backend, ImportStream, Imported, LogError, LogStream, router};
use stead::guest_channel::{AgentError, AgentStream};
use stead_controllers::host::{HostError, HostErrorKind};
use stead_controllers::store::{Store, StoreError};
use stead_schemas::api::{
    Capabilities, HostView, ImagesView, InstanceDefaults, InstanceStats, NetworkModel, PushCredentials,
    Runtime, ServerView,
};
use stead_schemas::guest;
use stead_schemas::health::{HealthOf, Tally};
use stead_schemas::instance::Hypervisor;
use stead_schemas::names::{Platform, Uid};
use tower::ServiceExt;

/// Limit on the length of an answer that is read, in bytes.
const ANSWER_MAX: usize = 1 << 20;

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
        let config = ApiConfig {
            store: store.clone(),
            keys,
            backend: host.clone(),
            defaults: InstanceDefaults {
                platform: Platform::LinuxAmd64,
                hypervisor: Hypervisor::Qemu,
                hypervisors: &[Hypervisor::Qemu, Hypervisor::QemuMicrovm],
            },
            tap_prefix: "st".to_owned(),
            capabilities: capabilities(),
            requests_max: 64,
            sockets_max: 1,
            shows_secrets: false,
            requires_permissions: false,
            audit: Audit::default(),
        };
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

/// A host that provides nothing, because the API needs nothing here.
#[derive(Default)]
struct NoHost {
    /// Images for which it was given credentials.
    credentials: Mutex<Vec<Uid>>,
}

impl Backend for NoHost {
    fn keep_credentials(&self, image: &Uid, _: PushCredentials) {
        self.credentials.lock().expect("not poisoned").push(image.clone());
    }
    fn asked_by(&self, _: &Uid, _: &Arc<str>) {}
    fn import(&self, _: &Arc<str>, _: ImportStream) -> BoxFuture<'_, Result<Imported, HostError>> {
        let error = HostError::new(HostErrorKind::Permanent, "import", "an archive");
        Box::pin(std::future::ready(Err(error)))
    }
    fn log(&self, _: &Uid, _: &str, _: usize, _: bool) -> BoxFuture<'_, Result<LogStream, LogError>> {
        Box::pin(std::future::ready(Err(LogError::Missing)))
    }
    fn backup(&self) -> BoxFuture<'_, Result<ImportStream, StoreError>> {
        Box::pin(std::future::ready(Err(StoreError::Closed)))
    }
    fn usage(&self, _: &Uid, _: Option<u32>, _: Option<&str>) -> InstanceStats {
        InstanceStats::default()
    }
    fn health(&self, _: &Uid) -> Option<(HealthOf, Tally)> {
        None
    }
    fn can_listen(&self, _: u16) -> bool {
        true
    }
    fn open_stream<'a>(
        &'a self,
        _: &'a Uid,
        _: guest::Request,
    ) -> BoxFuture<'a, Result<AgentStream, AgentError>> {
        Box::pin(std::future::ready(Err(AgentError::NotReady)))
    }
}

fn capabilities() -> Capabilities {
    let name = "qemu".to_owned();
    Capabilities {
        server: ServerView { version: "sim".to_owned(), api_version: "0.3.0".to_owned() },
        host: HostView { os: "linux".to_owned(), arch: "amd64".to_owned(), cgroups: false },
        default_runtime: Runtime { name, available: true },
        runtimes: Vec::new(),
        network: NetworkModel {
            model: "bridge".to_owned(),
            guest_to_guest: false,
            gateway: None,
            subnet: None,
        },
        images: ImagesView { platforms: Vec::new(), default_platform: "linux/amd64".to_owned() },
        features: Vec::new(),
    }
}
