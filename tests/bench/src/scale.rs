//! The cost of one more instance among ten and among 2,000, with real TAPs and firewall rules, and the cost of many
//! idle instances.
//!
//! Everything is in separate network and mount namespaces, so that thousands of interfaces do not burden the host and
//! none is left. The registry of the instances' image accepts connections and sends nothing, so that there is no VM:
//! the daemon, the kernel's network and `nft` are measured. An instance counts as created when its TAP exists.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream;
use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::{Figure, median};

/// Argument with which this program runs inside the namespaces.
pub(crate) const ARGUMENT: &str = "scale-inside";
/// Command that brings up loopback, shows the namespaces' interfaces in `/sys`, and runs this program.
const FIRST: &str = "ip link set lo up && mount -t sysfs sysfs /sys && exec \"$0\" scale-inside";
/// Address of the registry, and the configuration that allows it.
const REGISTRY: &str = "127.0.0.1:9";
const SETTINGS: [(&str, &str); 2] =
    [("STEAD_REGISTRY_ALLOW", "[\"127.0.0.1/32\"]"), ("STEAD_PLAIN_HTTP_HOSTS", "[\"127.0.0.1:9\"]")];
/// Number of instances created between two deletions of the image, which is abandoned half a minute after its
/// request.
const AT_ONCE: usize = 200;

const FEW: usize = 10;
const MANY: usize = 2000;
/// Number of instances in a store that a daemon is started on.
const STORED: usize = 10_000;
/// Number of instances created and deleted for one rate.
const BATCH: usize = 100;
/// Number of changes of one instance, for the cost of one.
const CHANGES: usize = 1000;
const CLIENTS: usize = 16;
const REPEATS: usize = 3;
const IDLE: Duration = Duration::from_secs(20);
/// Time limit for a batch on any machine.
const DEADLINE: Duration = Duration::from_secs(300);

/// Returns the figures of a run in namespaces.
pub(crate) fn scale() -> Vec<Figure> {
    let own = std::env::current_exe().expect("this program has a path");
    let output = Command::new("unshare")
        .args(["--net", "--mount", "--", "sh", "-c", FIRST])
        .arg(own)
        .envs(SETTINGS)
        .stderr(Stdio::inherit())
        .output()
        .expect("unshare (package util-linux) runs");
    assert!(output.status.success(), "the run in namespaces failed");
    let seen: Value = serde_json::from_slice(&output.stdout).expect("figures");
    let of = |name: &str| seen[name].as_f64().unwrap_or(f64::NAN);
    let among = |what: &str, name: &str, unit, goal| Figure {
        what: format!("{what} among {MANY} (peer: among {FEW})"),
        ours: of(&format!("{name}_many")),
        peer: Some(of(&format!("{name}_few"))),
        unit,
        goal,
    };
    let alone =
        |what: String, name: &str, unit, goal| Figure { what, ours: of(name), peer: None, unit, goal };
    vec![
        among("instances with a network made", "create", "instances/s", "1, 20/s"),
        among("instances with a network deleted", "delete", "instances/s", "1, 20/s"),
        among("processor time for one made and deleted, with nft", "cost", "ms", "1"),
        alone(format!("bridges of {MANY} instances, each with a TAP"), "bridges", "", ""),
        alone(format!("daemon's processor time, idle with {MANY} instances"), "idle", "% of a core", "< 0.5"),
        alone(format!("resync of {MANY} instances, processor time"), "resync", "s", ""),
        Figure {
            what: format!("processor time of a change of one instance among {STORED} (peer: among {FEW})"),
            ours: of("change_many"),
            peer: Some(of("change_few")),
            unit: "ms",
            goal: "1",
        },
        alone(format!("SIGKILL to the first answer with {STORED} instances"), "restart", "s", "< 2"),
    ]
}

/// Runs inside the namespaces and prints the measurements.
pub(crate) async fn run() {
    let mut seen = serde_json::Map::new();
    tokio::spawn(registry());
    let daemon = Daemon::start("stscale", "10.200.0.1/16").await;
    fill(&daemon, "keep", 0..FEW, true).await;
    let mut few = rates(&daemon, FEW).await;
    fill(&daemon, "keep", FEW..MANY, true).await;
    let many = rates(&daemon, MANY).await;
    seen.insert("bridges".to_owned(), json!(links("stscale")));
    seen.insert("idle".to_owned(), json!(idle(&daemon).await));
    seen.insert("resync".to_owned(), json!(resync(&daemon).await));
    empty(&daemon, "keep", FEW..MANY, FEW).await;
    few.extend(rates(&daemon, FEW).await);
    drop(daemon);
    for (rates, among) in [(few, "few"), (many, "many")] {
        let column = |pick: fn(&Rates) -> f64| json!(median(rates.iter().map(pick).collect()));
        seen.insert(format!("create_{among}"), column(|rates| rates.create));
        seen.insert(format!("delete_{among}"), column(|rates| rates.delete));
        seen.insert(format!("cost_{among}"), column(|rates| rates.cost));
    }
    let mut daemon = Daemon::start("stscale", "10.200.0.1/16").await;
    fill(&daemon, "stored", 0..FEW, false).await;
    seen.insert("change_few".to_owned(), json!(change(&daemon).await));
    fill(&daemon, "stored", FEW..STORED, false).await;
    seen.insert("change_many".to_owned(), json!(change(&daemon).await));
    let mut restarts = Vec::new();
    for _ in 0..REPEATS {
        restarts.push(daemon.restart().await);
    }
    seen.insert("restart".to_owned(), json!(median(restarts)));
    let text = Value::Object(seen).to_string();
    std::io::stdout().write_all(text.as_bytes()).expect("reported");
}

/// Holds every connection and answers none.
async fn registry() {
    let listener = tokio::net::TcpListener::bind(REGISTRY).await.expect("nobody else is here");
    let mut held = Vec::new();
    while let Ok(connection) = listener.accept().await {
        held.push(connection);
    }
}

/// The measurements of one batch that was created and deleted.
struct Rates {
    /// Number of instances created per second.
    create: f64,
    delete: f64,
    /// Processor time for one instance, created and deleted, in milliseconds.
    cost: f64,
}

async fn rates(daemon: &Daemon, among: usize) -> Vec<Rates> {
    let mut all = Vec::new();
    for round in 0..REPEATS {
        let name = format!("batch{round}");
        forget_image(daemon).await;
        let (before, start) = (daemon.processor_seconds(), Instant::now());
        fill(daemon, &name, 0..BATCH, true).await;
        let create = per_second(start);
        let start = Instant::now();
        empty(daemon, &name, 0..BATCH, among).await;
        let delete = per_second(start);
        let cost = (daemon.processor_seconds() - before) * 1000.0 / per(BATCH);
        all.push(Rates { create, delete, cost });
    }
    all
}

fn per(count: usize) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}

fn per_second(start: Instant) -> f64 {
    per(BATCH) / start.elapsed().as_secs_f64()
}

/// Creates instances. Those with a network count as created when all TAPs are up.
async fn fill(daemon: &Daemon, name: &str, numbers: std::ops::Range<usize>, has_network: bool) {
    let mut numbers = numbers.collect::<Vec<_>>();
    while numbers.len() > AT_ONCE {
        let rest = numbers.split_off(AT_ONCE);
        fill_at_once(daemon, name, numbers, has_network).await;
        forget_image(daemon).await;
        numbers = rest;
    }
    fill_at_once(daemon, name, numbers, has_network).await;
}

/// Makes the next instance request the image again. Existing instances that wait for it have then been handled.
async fn forget_image(daemon: &Daemon) {
    daemon.delete_image(&format!("{REGISTRY}%2Fnone:v1")).await;
    quiet(daemon).await;
}

async fn fill_at_once(daemon: &Daemon, name: &str, numbers: Vec<usize>, has_network: bool) {
    let taps = links("sb") + numbers.len();
    let create = |number| {
        let body = json!({
            "name": format!("{name}-{number}"), "image": format!("{REGISTRY}/none:v1"), "size": "128MB",
            "overlay_size": "16MB", "network": { "enabled": has_network },
        });
        async move { daemon.ask("/instances", body).await }
    };
    stream::iter(numbers).map(create).buffer_unordered(CLIENTS).for_each(async |_| ()).await;
    if has_network {
        until_taps(taps).await;
    }
}

/// Deletes instances until `left` TAPs are left.
async fn empty(daemon: &Daemon, name: &str, numbers: std::ops::Range<usize>, left: usize) {
    let delete = |number| async move { daemon.delete(&format!("{name}-{number}")).await };
    stream::iter(numbers).map(delete).buffer_unordered(CLIENTS).for_each(async |()| ()).await;
    until_taps(left).await;
}

async fn until_taps(count: usize) {
    let deadline = Instant::now() + DEADLINE;
    while links("sb") != count {
        assert!(Instant::now() < deadline, "{} TAPs instead of {count}", links("sb"));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Counts the interfaces in these namespaces whose name has this prefix.
fn links(prefix: &str) -> usize {
    let entries = fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix)).count()
}

/// Returns the processor time while nothing happens, in percent of a core, once the daemon is idle.
async fn idle(daemon: &Daemon) -> f64 {
    forget_image(daemon).await;
    let before = daemon.processor_seconds();
    tokio::time::sleep(IDLE).await;
    (daemon.processor_seconds() - before) / IDLE.as_secs_f64() * 100.0
}

/// Returns the processor time of one change of an instance, with all that it causes, in milliseconds.
async fn change(daemon: &Daemon) -> f64 {
    forget_image(daemon).await;
    let before = daemon.processor_seconds();
    for number in 0..CHANGES {
        daemon.change("/instances/stored-0", json!({ "ttl": format!("{}m", 100 + number) })).await;
    }
    quiet(daemon).await;
    (daemon.processor_seconds() - before) * 1000.0 / per(CHANGES)
}

/// Waits until the daemon has used almost no processor time for a second.
async fn quiet(daemon: &Daemon) {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let before = daemon.processor_seconds();
        tokio::time::sleep(Duration::from_secs(1)).await;
        if daemon.processor_seconds() - before < 0.04 {
            return;
        }
        assert!(Instant::now() < deadline, "the daemon does not become quiet");
    }
}

/// Returns the processor time of a pass over everything. A foreign change of our tables costs as much.
async fn resync(daemon: &Daemon) -> f64 {
    let before = daemon.processor_seconds();
    let touched = Command::new("nft").args(["add", "chain", "inet", "stscale", "stranger"]).status();
    assert!(touched.is_ok_and(|status| status.success()), "nft runs");
    quiet(daemon).await;
    daemon.processor_seconds() - before
}
