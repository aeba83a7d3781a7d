//! Durable writes over HTTP: `POST /instances` against etcd's JSON gateway, on the same file system.
//!
//! Our server validates a spec, allocates and stores three objects in each request; etcd stores one value of the
//! request's size. Both answer after the data is on disk. Both run in separate processes, beside this one with the
//! load.

use std::net::TcpListener as Reserve;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::future::join_all;
use serde_json::json;

use crate::bare::Bare;
use crate::{Figure, median};

const SECONDS: f64 = 3.0;
const REPEATS: usize = 3;

/// An etcd on a directory. It is ended when the value is dropped.
struct Etcd {
    child: Child,
    base: String,
}

impl Etcd {
    async fn start(dir: &Path) -> Self {
        let port =
            || Reserve::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port").port();
        let (client, peer) = (format!("http://127.0.0.1:{}", port()), format!("http://127.0.0.1:{}", port()));
        let child = Command::new("etcd")
            .args(["--log-level", "error", "--data-dir"])
            .arg(dir)
            .args([
                "--listen-client-urls",
                &client,
                "--advertise-client-urls",
                &client,
                "--listen-peer-urls",
                &peer,
            ])
            .args(["--initial-advertise-peer-urls", &peer, "--initial-cluster", &format!("default={peer}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd runs: `make bench` installs it");
        let etcd = Self { child, base: client };
        let http = reqwest::Client::new();
        let deadline = Instant::now() + Duration::from_secs(20);
        while put(&http, &etcd.base, 0).await.is_err() {
            assert!(Instant::now() < deadline, "etcd does not answer");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        etcd
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns the base64 form of any text with this length, because only its size matters.
fn encoded(bytes: usize) -> String {
    "QUFB".repeat(bytes.div_ceil(3))
}

async fn put(http: &reqwest::Client, base: &str, number: u64) -> Result<(), String> {
    let key = format!("{number:08}").bytes().map(|byte| char::from(byte - b'0' + b'A')).collect::<String>();
    let value = encoded(Bare::body(number).to_string().len());
    let body = json!({"key": key, "value": value});
    let answer =
        http.post(format!("{base}/v3/kv/put")).json(&body).send().await.map_err(|error| error.to_string())?;
    let status = answer.status();
    let _ = answer.bytes().await;
    if status.is_success() { Ok(()) } else { Err(status.to_string()) }
}

async fn post(http: &reqwest::Client, base: &str, token: &str, number: u64) -> Result<(), String> {
    let request = http.post(format!("{base}/instances")).bearer_auth(token).json(&Bare::body(number));
    let answer = request.send().await.map_err(|error| error.to_string())?;
    let status = answer.status();
    let _ = answer.bytes().await;
    if status.is_success() { Ok(()) } else { Err(status.to_string()) }
}

/// Returns the number of requests answered per second with this number of clients.
async fn load<Answer: Future<Output = Result<(), String>> + Send>(
    clients: u64,
    send: impl Fn(u64) -> Answer + Sync,
) -> f64 {
    let next = AtomicU64::new(1);
    let start = Instant::now();
    let client = || async {
        let mut done = 0u32;
        while start.elapsed().as_secs_f64() < SECONDS {
            let number = next.fetch_add(1, Ordering::Relaxed);
            send(number).await.expect("answered");
            done += 1;
        }
        done
    };
    let done: u32 = join_all((0..clients).map(|_| client())).await.into_iter().sum();
    f64::from(done) / start.elapsed().as_secs_f64()
}

pub(crate) async fn posts() -> Vec<Figure> {
    let mut figures = Vec::new();
    for clients in [1u64, 64] {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..REPEATS {
            let scratch = tempfile::tempdir_in("/var/tmp").expect("scratch");
            let bare = Bare::start(&scratch.path().join("stead"));
            let http = reqwest::Client::new();
            ours.push(load(clients, |number| post(&http, &bare.base, &bare.token, number)).await);
            drop(bare);
            let etcd = Etcd::start(&scratch.path().join("etcd")).await;
            theirs.push(load(clients, |number| put(&http, &etcd.base, number)).await);
        }
        figures.push(Figure {
            what: format!(
                "durable POST /instances, {clients} clients (peer: etcd put over its JSON gateway)"
            ),
            ours: median(ours),
            peer: Some(median(theirs)),
            unit: "requests/s",
            goal: if clients == 64 { ">= 2" } else { "" },
        });
    }
    figures
}
