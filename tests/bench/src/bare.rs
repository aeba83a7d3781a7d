//! A server on a real data directory without reconcilers, in its own process: only the path of a write is measured,
//! not the cost of the load.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use serde_json::{Value, json};
use stead::api::{
    ApiConfig, ApiState, Backend, ImportStream, Imported, LogError, LogStream, ServerLimits,
    auth::{Grant, Keys},
    router, serve,
};
use stead::guest_channel::{AgentError, AgentStream};
use stead_controllers::host::{HostError, HostErrorKind};
use stead_controllers::store::{Store, StoreError};
use stead_controllers::vm::admission;
use stead_schemas::api::{
    Capabilities, HostView, ImagesView, InstanceDefaults, InstanceStats, NetworkModel, PushCredentials,
    Runtime, ServerView,
};
use stead_schemas::guest::Request;
use stead_schemas::health::{HealthOf, Tally};
use stead_schemas::instance::Hypervisor;
use stead_schemas::names::{Platform, Uid};
use stead_schemas::network::NetworkSpec;
use tokio::net::TcpListener;

/// Argument with which this program becomes such a server.
pub(crate) const ARGUMENT: &str = "bare-server";

struct NoHost;

impl Backend for NoHost {
    fn keep_credentials(&self, _: &Uid, _: PushCredentials) {}
    fn asked_by(&self, _: &Uid, _: &Arc<str>) {}
    fn import(&self, _: &Arc<str>, _: ImportStream) -> BoxFuture<'_, Result<Imported, HostError>> {
        Box::pin(async { Err(HostError::new(HostErrorKind::Unsupported, "import", "here")) })
    }
    fn log(&self, _: &Uid, _: &str, _: usize, _: bool) -> BoxFuture<'_, Result<LogStream, LogError>> {
        Box::pin(async { Err(LogError::Missing) })
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
    fn can_listen(&self, _: u16) -> bool {
        true
    }

    fn open_stream<'a>(&'a self, _: &'a Uid, _: Request) -> BoxFuture<'a, Result<AgentStream, AgentError>> {
        Box::pin(async { Err(AgentError::NotReady) })
    }
}

/// The server as seen from outside. It is ended when the value is dropped.
pub(crate) struct Bare {
    child: Child,
    pub(crate) base: String,
    pub(crate) token: String,
}

impl Bare {
    pub(crate) fn start(dir: &Path) -> Self {
        let own = std::env::current_exe().expect("this program has a path");
        let mut command = Command::new(own);
        command.arg(ARGUMENT).arg(dir).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("this program runs");
        let mut line = String::new();
        let said = child.stdout.take().expect("piped");
        BufReader::new(said).read_line(&mut line).expect("it says where it is");
        let (base, token) = line.trim().split_once(' ').expect("address and token");
        Self { base: base.to_owned(), token: token.to_owned(), child }
    }

    pub(crate) fn resident(&self) -> f64 {
        crate::daemon::resident(self.child.id())
    }

    pub(crate) fn body(number: u64) -> Value {
        json!({
            "name": format!("i{number}"), "image": "registry.test/app:v1", "size": "1GB", "vcpus": 2,
            "env": {"PORT": "3000", "NODE_ENV": "production"}, "cmd": ["serve", "--port", "3000"],
            // The bridge's 1,023 ports would end the run.
            "network": {"enabled": false}, "tags": {"team": "backend", "env": "staging"},
        })
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Serves in the server's own process until standard input ends.
pub(crate) async fn run(dir: &Path) {
    let opened = stead::store::open(dir, stead_controllers::kinds()).expect("opened");
    let (store, _lock) = (opened.store, opened.lock);
    tokio::spawn(opened.writer.run(std::future::pending::<()>()));
    let spec = NetworkSpec {
        bridge: "bench0".parse().expect("valid"),
        gateway: "10.0.0.1/8".parse().expect("valid"),
        dns: Vec::new(),
        table: "bench".to_owned(),
        reach: Default::default(),
        resolver: Default::default(),
        mtu: None,
    };
    store.transact(move |tx| admission::declare_network(tx, spec)).await.expect("declared");
    let keys = Keys::new(&[7; 32]);
    let now = jiff::Timestamp::now();
    let ends = now + jiff::SignedDuration::from_hours(1);
    let scopes = ["*".to_owned()];
    let grant = Grant { subject: "bench", id: "bench", scopes: &scopes, issued_at: now, expires_at: ends };
    let token = keys.mint(&grant).expect("minted");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("bound");
    let limits = ServerLimits {
        connections_max: 256,
        connections_per_client_max: 256,
        stall_max: Duration::from_secs(120),
        header_timeout: Duration::from_secs(10),
        grace: Duration::from_secs(1),
    };
    let router = router(state(store, keys));
    tokio::spawn(async move {
        serve(listener, router, limits, std::future::pending()).await.expect("served");
    });
    writeln!(std::io::stdout(), "http://{address} {token}").expect("told");
    let ended = tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new()));
    let _ = ended.await;
}

fn state(store: Store, keys: Keys) -> ApiState {
    let text = |word: &str| word.to_owned();
    ApiState::new(ApiConfig {
        store,
        keys,
        backend: Arc::new(NoHost),
        defaults: InstanceDefaults {
            platform: Platform::LinuxAmd64,
            hypervisor: Hypervisor::Qemu,
            hypervisors: &[Hypervisor::Qemu, Hypervisor::QemuMicrovm],
        },
        tap_prefix: text("st"),
        capabilities: Capabilities {
            server: ServerView { version: text("bench"), api_version: text("0.3.0") },
            host: HostView { os: text("linux"), arch: text("amd64"), cgroups: false },
            default_runtime: Runtime { name: text("qemu"), available: true },
            runtimes: Vec::new(),
            network: NetworkModel {
                model: text("bridge"),
                guest_to_guest: false,
                gateway: None,
                subnet: None,
            },
            images: ImagesView { platforms: Vec::new(), default_platform: text("linux/amd64") },
            features: Vec::new(),
        },
        requests_max: 512,
        sockets_max: 512,
        shows_secrets: false,
        requires_permissions: false,
        audit: stead::api::Audit::default(),
    })
}
