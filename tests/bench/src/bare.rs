//! A server on a real data directory without reconcilers, in its own process: only the path of a write is measured,
//! not the cost of the load.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use stead::api::{
    ApiConfig, ApiState, ServerLimits,
    auth::{Grant, Keys},
    router, serve,
};
use stead_controllers::network::admission;
use stead_controllers::sim::observe_node;
use stead_controllers::store::Store;
use stead_schemas::network::NetworkSpec;
use tokio::net::TcpListener;

use crate::no_host::api_config;

/// Number of requests that the server admits at the same time: more than any measurement sends.
const REQUESTS_MAX: usize = 512;
/// Argument with which this program becomes such a server.
pub(crate) const ARGUMENT: &str = "bare-server";

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
        let reported = child.stdout.take().expect("piped");
        BufReader::new(reported).read_line(&mut line).expect("it says where it is");
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
        mediator: None,
    };
    store.transact(move |tx| admission::declare_network(tx, spec)).await.expect("declared");
    observe_node(&store).await;
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
        stream_idle_max: Duration::from_secs(15),
        ping_interval: Duration::from_secs(20),
        silence_max: Duration::from_secs(70),
        sender_silence_max: Duration::from_secs(300),
    };
    let router = router(state(&store, &keys));
    tokio::spawn(async move {
        serve(vec![listener.into()], router, limits, std::future::pending()).await.expect("served");
    });
    writeln!(std::io::stdout(), "http://{address} {token}").expect("reported");
    let ended = tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new()));
    let _ = ended.await;
}

fn state(store: &Store, keys: &Keys) -> ApiState {
    let config = api_config(store, keys, &Arc::default());
    ApiState::new(ApiConfig { requests_max: REQUESTS_MAX, sockets_max: REQUESTS_MAX, ..config })
}
