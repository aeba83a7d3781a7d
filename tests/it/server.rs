//! A whole server for black-box tests: the real API and store on a simulated host.
//!
//! The simulated host runs in real time here: its guests boot in 1.5 s.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use serde_json::Value;
use stead::api::{
    ApiConfig, ApiState, Audit, Backend, ImportStream, Imported, LogError, LogStream, RouteView,
    ServerLimits,
    auth::{Grant, Keys},
    router, routes, serve,
};
use stead::guest_channel::{AgentError, AgentStream};
use stead_controllers::daemon::{Controllers, Settings};
use stead_controllers::host::{HostError, HostErrorKind};
use stead_controllers::runtime::{NoBoundary, NoJournal};
use stead_controllers::sim::{SimRegistryImage, World};
use stead_controllers::store::{MemoryKv, PlainSealer, Store, StoreError};
use stead_controllers::vm::admission;
use stead_schemas::api::{
    Capabilities, HostView, ImagesView, InstanceDefaults, InstanceStats, NetworkModel, PushCredentials,
    Runtime, ServerView,
};
use stead_schemas::guest::Request;
use stead_schemas::health::{HealthOf, Tally};
use stead_schemas::image::ImageConfig;
use stead_schemas::instance::Hypervisor;
use stead_schemas::names::{Platform, Uid};
use stead_schemas::network::NetworkSpec;
use tokio::net::TcpListener;
use tokio::sync::{broadcast, watch};
use tokio::task::JoinSet;

/// The image that the simulated registry serves.
pub(crate) const IMAGE: &str = "registry.test/busybox:v1";
/// Port in use by another program.
pub(crate) const TAKEN_PORT: u16 = 4973;
pub(crate) const REQUESTS_MAX: usize = 8;
pub(crate) const CONNECTIONS_MAX: usize = 64;
pub(crate) const CONNECTIONS_PER_CLIENT_MAX: usize = 48;
pub(crate) const SOCKETS_MAX: usize = 4;

pub(crate) struct Server {
    pub(crate) base: String,
    pub(crate) address: SocketAddr,
    pub(crate) token: String,
    pub(crate) keys: Keys,
    pub(crate) store: Store,
    pub(crate) kv: MemoryKv,
    pub(crate) http: reqwest::Client,
    pub(crate) host: Arc<NoHost>,
    pub(crate) world: World,
    /// Data directory of the daemon.
    pub(crate) directory: tempfile::TempDir,
    pub(crate) routes: Vec<RouteView>,
    _tasks: JoinSet<()>,
    _shutdown: watch::Sender<bool>,
}

/// The state of the host that the test sets.
#[derive(Default)]
pub(crate) struct NoHost {
    pub(crate) store_failure: Mutex<Option<String>>,
    /// Kind of the failure of an import. Without a kind the failure is that the file is no archive.
    pub(crate) import_failure: Mutex<Option<HostErrorKind>>,
    /// Log of every instance. If there are no lines, there is no log.
    pub(crate) log: Mutex<Vec<String>>,
}

impl Backend for NoHost {
    fn keep_credentials(&self, _: &Uid, _: PushCredentials) {}
    fn asked_by(&self, _: &Uid, _: &Arc<str>) {}
    fn import(&self, _: &Arc<str>, _: ImportStream) -> BoxFuture<'_, Result<Imported, HostError>> {
        let kind = *self.import_failure.lock().expect("not poisoned");
        let failed = HostError::new(kind.unwrap_or(HostErrorKind::Permanent), "import", "an archive");
        Box::pin(std::future::ready(Err(failed.because("no archive"))))
    }
    fn log(
        &self,
        _: &Uid,
        _: &str,
        tail: usize,
        follows: bool,
    ) -> BoxFuture<'_, Result<LogStream, LogError>> {
        let log = self.log.lock().expect("not poisoned").clone();
        let found = if log.is_empty() {
            Err(LogError::Missing)
        } else {
            let last = log[log.len().saturating_sub(tail)..].to_vec();
            let last = futures::stream::once(std::future::ready(last));
            Ok(if follows { last.chain(futures::stream::pending()).boxed() } else { last.boxed() })
        };
        Box::pin(std::future::ready(found))
    }

    fn store_failure(&self) -> Option<String> {
        self.store_failure.lock().expect("not poisoned").clone()
    }

    fn backup(&self) -> BoxFuture<'_, Result<ImportStream, StoreError>> {
        Box::pin(async { Err(StoreError::Closed) })
    }

    fn usage(&self, _: &Uid, _: Option<u32>, _: Option<&str>) -> InstanceStats {
        InstanceStats::default()
    }

    fn health(&self, _: &Uid) -> Option<(HealthOf, Tally)> {
        None
    }

    fn can_listen(&self, port: u16) -> bool {
        port != TAKEN_PORT
    }

    fn open_stream<'a>(&'a self, _: &'a Uid, _: Request) -> BoxFuture<'a, Result<AgentStream, AgentError>> {
        Box::pin(async { Err(AgentError::NotReady) })
    }
}

/// An answer: status, headers, body as JSON (or null).
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: reqwest::header::HeaderMap,
    pub(crate) body: Value,
}

impl Server {
    pub(crate) async fn start() -> Self {
        Self::start_with(|_, _| {}).await
    }

    /// Starts with a changed configuration of the API, or of its listener.
    pub(crate) async fn start_with(adjust: impl FnOnce(&mut ApiConfig, &mut ServerLimits)) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let world = World::new(1);
        has(&world, 'a');
        let kv = MemoryKv::new();
        let kinds = stead_controllers::kinds();
        let host = Arc::new(world.clone());
        let (store, writer) =
            Store::open(kv.clone(), Arc::new(PlainSealer), host.clone(), host.clone(), kinds)
                .expect("opened");
        let mut tasks = JoinSet::new();
        tasks.spawn(writer.run(std::future::pending::<()>()));
        let spec = NetworkSpec {
            bridge: "simbr0".parse().expect("valid"),
            gateway: "10.9.0.1/24".parse().expect("valid"),
            dns: Vec::new(),
            table: "sim".to_owned(),
            reach: Default::default(),
            resolver: Default::default(),
            mtu: None,
        };
        store.transact(move |tx| admission::declare_network(tx, spec)).await.expect("declared");
        let resync = Duration::from_secs(60);
        let settings = Settings {
            store: store.clone(),
            clock: host,
            boundary: Arc::new(NoBoundary),
            resync,
            seed: 1,
            tap_prefix: "st".to_owned(),
            journal: Arc::new(NoJournal),
        };
        let (controllers, drifts) = Controllers::new(&world, &settings);
        let (shutdown, stopping) = watch::channel(false);
        tasks.spawn(controllers.run(stopping));
        let for_server = world.clone();
        tasks.spawn(async move {
            let mut changes = world.changes();
            loop {
                match changes.recv().await {
                    Ok(Some(uid)) => drifts.instances.object(uid),
                    Ok(None) | Err(broadcast::error::RecvError::Lagged(_)) => drifts.instances.everything(),
                    Err(broadcast::error::RecvError::Closed) => return,
                }
                drifts.images.everything();
            }
        });
        let keys = Keys::new(&[7; 32]);
        let backend = Arc::<NoHost>::default();
        let directory = tempfile::tempdir().expect("scratch");
        let mut config = api_config(&store, &keys, &backend, directory.path());
        let mut limits = ServerLimits {
            connections_max: CONNECTIONS_MAX,
            connections_per_client_max: CONNECTIONS_PER_CLIENT_MAX,
            stall_max: Duration::from_secs(2),
            header_timeout: Duration::from_secs(3),
            grace: Duration::from_secs(1),
        };
        adjust(&mut config, &mut limits);
        let state = ApiState::new(config);
        let routes = routes(state.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("bound");
        tasks.spawn(async move {
            serve(listener, router(state), limits, std::future::pending()).await.expect("served");
        });
        let http = reqwest::Client::new();
        let token = token(&keys, &["*"], 3600);
        let base = format!("http://{address}");
        Self {
            base,
            address,
            token,
            keys,
            store,
            kv,
            http,
            host: backend,
            world: for_server,
            directory,
            routes,
            _tasks: tasks,
            _shutdown: shutdown,
        }
    }

    pub(crate) async fn send(&self, method: &str, path: &str, body: Option<Value>) -> Answer {
        let text = body.map(|body| body.to_string());
        self.send_as(method, path, text, &self.token).await
    }

    pub(crate) async fn send_as(
        &self,
        method: &str,
        path: &str,
        body: Option<String>,
        token: &str,
    ) -> Answer {
        let method = method.parse().expect("a method");
        let mut request = self.http.request(method, format!("{}{path}", self.base));
        if !token.is_empty() {
            request = request.bearer_auth(token);
        }
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body);
        }
        let response = request.send().await.expect("an answer");
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let bytes = response.bytes().await.expect("a body");
        Answer { status, headers, body: serde_json::from_slice(&bytes).unwrap_or(Value::Null) }
    }

    /// Creates an instance that must be accepted.
    pub(crate) async fn create(&self, body: Value) -> Value {
        let answer = self.send("POST", "/instances", Some(body)).await;
        assert_eq!(answer.status, 201, "{}", answer.body);
        answer.body
    }
}

/// Makes the registry serve content whose digest consists of this digit.
pub(crate) fn has(world: &World, digit: char) {
    let config = ImageConfig { cmd: vec!["serve".to_owned()], ..ImageConfig::default() };
    let digest = format!("sha256:{}", digit.to_string().repeat(64)).parse().expect("valid");
    world.serve(&IMAGE.parse().expect("valid"), SimRegistryImage { digest, config });
}

/// Returns the API configuration of a store and a host.
fn api_config(store: &Store, keys: &Keys, backend: &Arc<NoHost>, directory: &Path) -> ApiConfig {
    ApiConfig {
        store: store.clone(),
        keys: keys.clone(),
        backend: backend.clone(),
        defaults: InstanceDefaults {
            platform: Platform::LinuxAmd64,
            hypervisor: Hypervisor::Qemu,
            hypervisors: &[Hypervisor::Qemu, Hypervisor::QemuMicrovm],
        },
        tap_prefix: "st".to_owned(),
        capabilities: capabilities(),
        requests_max: REQUESTS_MAX,
        sockets_max: SOCKETS_MAX,
        shows_secrets: false,
        requires_permissions: false,
        audit: Audit::open(directory).expect("opened"),
    }
}

/// Makes a token with these scopes that expires in this number of seconds.
pub(crate) fn token(keys: &Keys, scopes: &[&str], seconds: i64) -> String {
    let now = jiff::Timestamp::now();
    let ends = now + jiff::SignedDuration::from_secs(seconds);
    let scopes: Vec<String> = scopes.iter().map(ToString::to_string).collect();
    let id = format!("test-{seconds}");
    let grant = Grant { subject: "test", id: &id, scopes: &scopes, issued_at: now, expires_at: ends };
    keys.mint(&grant).expect("minted")
}

fn capabilities() -> Capabilities {
    let name = "qemu".to_owned();
    Capabilities {
        server: ServerView { version: "test".to_owned(), api_version: "0.3.0".to_owned() },
        host: HostView { os: "linux".to_owned(), arch: "amd64".to_owned(), cgroups: false },
        default_runtime: Runtime { name, available: true },
        runtimes: Vec::new(),
        network: NetworkModel {
            model: "bridge".to_owned(),
            guest_to_guest: false,
            gateway: None,
            subnet: None,
        },
        images: ImagesView {
            platforms: vec!["linux/amd64".to_owned()],
            default_platform: "linux/amd64".to_owned(),
        },
        features: Vec::new(),
    }
}
