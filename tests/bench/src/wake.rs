//! The time from a client's first packet to the answer of a VM in standby, against a requested restore.
//!
//! Rounds are interleaved. The idle cost of ten VMs whose connections are counted is measured too.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::daemon::{DEADLINE, Daemon};
use crate::{Figure, median};

const ROUNDS: usize = 7;
const SERVER: &str = "/bin/busybox nc -ll -p 80 -e /bin/busybox cat";
const VMS: usize = 10;
const OBSERVED_FOR: Duration = Duration::from_secs(60);

async fn until(daemon: &Daemon, path: &str, is_so: impl Fn(&serde_json::Value) -> bool) {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let seen = daemon.get(path).await;
        if is_so(&seen) {
            return;
        }
        assert!(Instant::now() < deadline, "{path}: {seen}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub(crate) async fn wake() -> Vec<Figure> {
    let daemon = Daemon::start("stbench1", "10.239.251.1/24").await;
    daemon.import().await;
    let policy = json!({ "enabled": true, "idle_timeout": "1h", "wake_on_traffic": true });
    let body = json!({
        "name": "w", "image": "bench.test/busybox:v1", "size": "256MB", "vcpus": 1, "overlay_size": "256MB",
        "cmd": ["/bin/busybox", "sh", "-c", SERVER], "auto_standby": policy,
    });
    daemon.verb("/instances", &body).await;
    until(&daemon, "/instances/w", |seen| seen["state"] == "Running").await;
    let address = daemon.get("/instances/w").await["network"]["ip"].as_str().expect("one").to_owned();
    let deadline = Instant::now() + DEADLINE;
    while TcpStream::connect((address.as_str(), 80)).is_err() {
        assert!(Instant::now() < deadline, "the guest does not listen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let (mut ours, mut asked) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        daemon.verb("/instances/w/standby", &json!({})).await;
        let start = Instant::now();
        daemon.verb("/instances/w/restore", &json!({})).await;
        asked.push(start.elapsed().as_secs_f64() * 1000.0);
        daemon.verb("/instances/w/standby", &json!({})).await;
        // The packet is kept. A moment later the daemon reads the TAP.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let directory = (address.clone(), 80);
        let connect = move || {
            let start = Instant::now();
            TcpStream::connect(directory).expect("answered");
            start.elapsed().as_secs_f64() * 1000.0
        };
        ours.push(tokio::task::spawn_blocking(connect).await.expect("joined"));
        until(&daemon, "/instances/w", |seen| seen["state"] == "Running").await;
    }
    daemon.delete("w").await;
    let figure = Figure {
        what: "standby: first packet to its answer (peer: our own restore that is asked for)".to_owned(),
        ours: median(ours),
        peer: Some(median(asked)),
        unit: "ms",
        goal: "no slower",
    };
    vec![figure, idle(&daemon).await]
}

/// Measures the processor time while nothing changes, which is that of the polls of the connection table.
async fn idle(daemon: &Daemon) -> Figure {
    let policy = json!({ "auto_standby": { "enabled": true, "idle_timeout": "1h" } });
    for vm in 0..VMS {
        daemon.post(&format!("i{vm}"), "128MB").await;
        daemon.change(&format!("/instances/i{vm}"), policy.clone()).await;
    }
    tokio::time::sleep(Duration::from_secs(10)).await;
    let before = daemon.processor_seconds();
    tokio::time::sleep(OBSERVED_FOR).await;
    let spent = daemon.processor_seconds() - before;
    Figure {
        what: format!("daemon with {VMS} VMs whose connections are counted: processor time while idle"),
        ours: spent / OBSERVED_FOR.as_secs_f64() * 100.0,
        peer: None,
        unit: "% of a core",
        goal: "0.1",
    }
}
