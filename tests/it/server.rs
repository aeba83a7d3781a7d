//! A whole server for black-box tests: the real API and store on a simulated host.
//!
//! The simulated host runs in real time here: its guests boot in 1.5 s.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use stead::api::tls::Tls;
use stead::api::{
    ApiConfig, ApiState, Audit, Listener, LocalUsers, RouteView, ServerLimits,
    auth::{Grant, Keys},
    router, routes, serve,
};
use stead_controllers::daemon::{Controllers, Drifts, Settings};
use stead_controllers::mediator;
use stead_controllers::network::admission;
use stead_controllers::node;
use stead_controllers::runtime::{NoBoundary, NoJournal};
use stead_controllers::sim::{AMPLE, SimRegistryImage, World, mediator_settings, network_spec, node_spec};
use stead_controllers::store::{MemoryKv, PlainSealer, Store};
use stead_schemas::image::ImageConfig;
use stead_schemas::node::Resources;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{broadcast, watch};
use tokio::task::JoinSet;

pub(crate) use crate::no_host::TAKEN_PORT;
use crate::no_host::{NoHost, api_config};

/// The image that the simulated registry serves.
pub(crate) const IMAGE: &str = "registry.test/busybox:v1";
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
    /// Unix socket of the API.
    pub(crate) socket: PathBuf,
    /// Data directory of the daemon.
    pub(crate) directory: tempfile::TempDir,
    pub(crate) routes: Vec<RouteView>,
    _tasks: JoinSet<()>,
    _shutdown: watch::Sender<bool>,
}

/// An answer: status, headers, body as JSON (or null).
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: reqwest::header::HeaderMap,
    pub(crate) body: Value,
}

fn server_limits() -> ServerLimits {
    ServerLimits {
        connections_max: CONNECTIONS_MAX,
        connections_per_client_max: CONNECTIONS_PER_CLIENT_MAX,
        stall_max: Duration::from_secs(2),
        header_timeout: Duration::from_secs(3),
        grace: Duration::from_secs(1),
        stream_idle_max: Duration::from_secs(15),
        ping_interval: Duration::from_secs(20),
        silence_max: Duration::from_secs(70),
        sender_silence_max: Duration::from_secs(300),
    }
}

impl Server {
    pub(crate) async fn start() -> Self {
        Self::start_with(|_, _| {}).await
    }

    /// Starts with a changed configuration of the API, or of its listener.
    pub(crate) async fn start_with(adjust: impl FnOnce(&mut ApiConfig, &mut ServerLimits)) -> Self {
        Self::start_at(None, LocalUsers::default(), adjust).await
    }

    /// Starts with a certificate of the TCP listener, and with users who need no token at the Unix socket.
    pub(crate) async fn start_at(
        tls: Option<Tls>,
        users: LocalUsers,
        adjust: impl FnOnce(&mut ApiConfig, &mut ServerLimits),
    ) -> Self {
        Self::start_on(AMPLE, tls, users, adjust).await
    }

    /// Starts on a host of this size.
    pub(crate) async fn start_sized(
        capacity: Resources,
        adjust: impl FnOnce(&mut ApiConfig, &mut ServerLimits),
    ) -> Self {
        Self::start_on(capacity, None, LocalUsers::default(), adjust).await
    }

    async fn start_on(
        capacity: Resources,
        tls: Option<Tls>,
        users: LocalUsers,
        adjust: impl FnOnce(&mut ApiConfig, &mut ServerLimits),
    ) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let world = World::new(1);
        world.set_capacity(capacity);
        has(&world, 'a');
        let kv = MemoryKv::new();
        let (kinds, host) = (stead_controllers::kinds(), Arc::new(world.clone()));
        let opened = Store::open(kv.clone(), Arc::new(PlainSealer), host.clone(), host.clone(), kinds);
        let (store, writer) = opened.expect("opened");
        let mut tasks = JoinSet::new();
        tasks.spawn(writer.run(std::future::pending::<()>()));
        store.transact(move |tx| admission::declare_network(tx, network_spec())).await.expect("declared");
        store.transact(|tx| node::admission::declare(tx, node_spec())).await.expect("declared");
        store.transact(|tx| mediator::admission::declare(tx, mediator_settings())).await.expect("declared");
        let settings = Settings {
            store: store.clone(),
            clock: host,
            boundary: Arc::new(NoBoundary),
            resync: Duration::from_secs(60),
            seed: 1,
            tap_prefix: "st".to_owned(),
            journal: Arc::new(NoJournal),
        };
        let (controllers, drifts) = Controllers::new(&world, &settings);
        let (shutdown, stopping) = watch::channel(false);
        tasks.spawn(controllers.run(stopping));
        node::observed(&store).await;
        let for_server = world.clone();
        tasks.spawn(listen(world, drifts));
        let keys = Keys::new(&[7; 32]);
        let backend = Arc::<NoHost>::default();
        let directory = tempfile::tempdir().expect("scratch");
        let mut config = ApiConfig {
            requests_max: REQUESTS_MAX,
            sockets_max: SOCKETS_MAX,
            audit: Audit::open(directory.path()).expect("opened"),
            ..api_config(&store, &keys, &backend)
        };
        let mut limits = server_limits();
        adjust(&mut config, &mut limits);
        let state = ApiState::new(config);
        let routes = routes(state.clone());
        let (listeners, base, address, socket) = sockets(tls, users, directory.path()).await;
        tasks.spawn(async move {
            serve(listeners, router(state), limits, std::future::pending()).await.expect("served");
        });
        let http = reqwest::Client::new();
        let token = token(&keys, &["*"], 3600);
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
            socket,
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

/// Makes the sockets of a server. Returns also the URL, the address, and the path of the Unix socket.
async fn sockets(
    tls: Option<Tls>,
    users: LocalUsers,
    directory: &Path,
) -> (Vec<Listener>, String, SocketAddr, PathBuf) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("bound");
    let base = format!("{}://{address}", if tls.is_some() { "https" } else { "http" });
    let socket = directory.join("stead.sock");
    let local = UnixListener::bind(&socket).expect("bound");
    (vec![Listener::Tcp { listener, tls }, Listener::Local { listener: local, users }], base, address, socket)
}

/// Acts as the monitors do.
async fn listen(world: World, drifts: Drifts) {
    let mut changes = world.changes();
    loop {
        match changes.recv().await {
            Ok(Some(uid)) => drifts.instances.object(uid),
            Ok(None) | Err(broadcast::error::RecvError::Lagged(_)) => drifts.instances.everything(),
            Err(broadcast::error::RecvError::Closed) => return,
        }
        drifts.images.everything();
    }
}

/// Makes the registry serve content whose digest consists of this digit.
pub(crate) fn has(world: &World, digit: char) {
    let config = ImageConfig { cmd: vec!["serve".to_owned()], ..ImageConfig::default() };
    let digest = format!("sha256:{}", digit.to_string().repeat(64)).parse().expect("valid");
    world.serve(&IMAGE.parse().expect("valid"), SimRegistryImage { digest, config });
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
