//! Standby, restore and forks, against the same calls made manually; compression against a program.
//!
//! In the manual case the RAM is a file on the same disk that QEMU maps: it is at its final path when the VM stops,
//! and with one fsync it is durable, as ours is.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::hand::{self, Hand, Tap};
use crate::qmp::Qmp;
use crate::{Figure, median};

const ROUNDS: usize = 9;
const FORKS: usize = 15;
const POLL: Duration = Duration::from_millis(1);

pub(crate) async fn standby() -> Vec<Figure> {
    let daemon = Daemon::start("stbench2", "10.239.252.1/24").await;
    daemon.import().await;
    daemon.post("box", "256MB").await;
    let mut figures = rounds(&daemon).await;
    figures.extend(forks(&daemon).await);
    figures.extend(compression(&daemon).await);
    figures
}

async fn timed(daemon: &Daemon, path: &str, body: Value) -> (f64, Value) {
    let start = Instant::now();
    let answer = daemon.ask(path, body).await;
    (start.elapsed().as_secs_f64() * 1000.0, answer)
}

/// Runs interleaved rounds: our save and restore, and the manual ones.
async fn rounds(daemon: &Daemon) -> Vec<Figure> {
    let directory = daemon.dir.path().join("hand");
    let overlay = daemon.dir.path().join("hand.ext4");
    let ram = daemon.dir.path().join("hand.ram");
    let pid = daemon.get("/instances/box").await["vmm_pid"].as_u64().expect("a process");
    let tap = Tap::make("stbenchhand");
    let arguments: Vec<String> = hand::arguments(pid, &overlay, &directory, Some(&tap))
        .into_iter()
        .map(|word| match word.strip_prefix("memory-backend-memfd") {
            Some(rest) => format!("memory-backend-file{rest},mem-path={}", ram.display()),
            None => word,
        })
        .collect();
    hand::make_overlay(&overlay);
    let mut vm = Hand::boot(&arguments, &directory, &["/bin/busybox", "sleep", "100000"]);
    let [mut saves, mut restores, mut hand_saves, mut hand_durable, mut hand_restores] =
        [const { Vec::new() }; 5];
    for _ in 0..ROUNDS {
        saves.push(timed(daemon, "/instances/box/standby", json!({})).await.0);
        let (save, durable) = save_by_hand(vm, &directory, &ram);
        hand_saves.push(save);
        hand_durable.push(durable);
        restores.push(timed(daemon, "/instances/box/restore", json!({})).await.0);
        let start = Instant::now();
        vm = restore_by_hand(&arguments, &directory);
        hand_restores.push(start.elapsed().as_secs_f64() * 1000.0);
    }
    let of = |what: &str, ours: &Vec<f64>, peer: Vec<f64>, goal| Figure {
        what: what.to_owned(),
        ours: median(ours.clone()),
        peer: Some(median(peer)),
        unit: "ms",
        goal,
    };
    vec![
        of(
            "standby of 256 MB, durable (peer: stop, migrate, fsync, quit by hand)",
            &saves,
            hand_durable,
            "<= 1.25",
        ),
        of("the same (peer: without the fsync)", &saves, hand_saves, ""),
        of(
            "restore to the guest's answer (peer: the same calls by hand)",
            &restores,
            hand_restores,
            "<= 1.25",
        ),
    ]
}

/// Saves manually. Returns the times without and with the sync that makes the file durable.
fn save_by_hand(vm: Hand, directory: &Path, ram: &Path) -> (f64, f64) {
    let state = directory.with_file_name("hand.state");
    let start = Instant::now();
    let mut qmp = Qmp::connect(&directory.join("qmp.sock"));
    qmp.call("stop", json!({}));
    qmp.leave_ram_out();
    qmp.call("migrate", json!({ "uri": format!("exec:cat > {}", state.display()) }));
    qmp.until_migrated();
    qmp.call("quit", json!({}));
    vm.wait();
    let save = start.elapsed().as_secs_f64() * 1000.0;
    for path in [ram, &state] {
        File::open(path).and_then(|file| file.sync_all()).expect("durable");
    }
    (save, start.elapsed().as_secs_f64() * 1000.0)
}

fn restore_by_hand(arguments: &[String], directory: &Path) -> Hand {
    let state = directory.with_file_name("hand.state");
    let more = ["-incoming", "defer", "-S"].map(ToOwned::to_owned);
    let arguments: Vec<String> = arguments.iter().cloned().chain(more).collect();
    Hand::go_on(&arguments, directory, || {
        let mut qmp = Qmp::connect(&directory.join("qmp.sock"));
        qmp.leave_ram_out();
        qmp.call("migrate-incoming", json!({ "uri": format!("exec:cat {}", state.display()) }));
        qmp.until_migrated();
        qmp.call("cont", json!({}));
    })
}

fn proportional_mib(pid: &Value) -> f64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("it lives");
    let line = rollup.lines().find(|line| line.starts_with("Pss:")).expect("a figure");
    line.split_whitespace().nth(1).and_then(|word| word.parse::<f64>().ok()).expect("a number") / 1024.0
}

async fn forks(daemon: &Daemon) -> Vec<Figure> {
    let snapshot = daemon.ask("/instances/box/snapshots", json!({ "kind": "Standby" })).await;
    let id = snapshot["id"].as_str().expect("an id").to_owned();
    let path = format!("/snapshots/{id}/fork");
    // This VM has booted, and has not been restored.
    daemon.post("cold", "256MB").await;
    let cold = proportional_mib(&daemon.get("/instances/cold").await["vmm_pid"]);
    let (mut cold_forks, mut pids) = (Vec::new(), Vec::new());
    for number in 0..FORKS {
        let (millis, fork) = timed(daemon, &path, json!({ "name": format!("f{number}") })).await;
        assert_eq!(fork["state"], "Running", "{fork}");
        cold_forks.push(millis);
        pids.push(fork["vmm_pid"].clone());
    }
    let memory = median(pids.iter().map(proportional_mib).collect());
    for number in 0..FORKS {
        daemon.delete(&format!("f{number}")).await;
    }
    let (mut pooled, size) = (Vec::new(), 2);
    daemon.change(&format!("/snapshots/{id}"), json!({ "pool_size": size })).await;
    for number in 0..FORKS {
        while daemon.get(&format!("/snapshots/{id}")).await["pool_ready"] != size {
            tokio::time::sleep(POLL).await;
        }
        let (millis, fork) = timed(daemon, &path, json!({ "name": format!("p{number}") })).await;
        assert_eq!(fork["state"], "Running", "{fork}");
        pooled.push(millis);
        daemon.delete(&format!("p{number}")).await;
    }
    daemon.change(&format!("/snapshots/{id}"), json!({ "pool_size": 0 })).await;
    let plain =
        |what: &str, ours: f64| Figure { what: what.to_owned(), ours, peer: None, unit: "ms", goal: "" };
    vec![
        plain("fork of a snapshot to Running, p50", median(cold_forks.clone())),
        plain("fork of a snapshot to Running, p95", p95(cold_forks)),
        plain("fork from a warm pool to Running, p50", median(pooled.clone())),
        plain("fork from a warm pool to Running, p95", p95(pooled)),
        Figure {
            what: "memory of an idle fork, shared pages shared out (peer: a VM that booted)".to_owned(),
            ours: memory,
            peer: Some(cold),
            unit: "MiB",
            goal: "< 0.25",
        },
    ]
}

fn p95(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[(values.len() * 95).div_ceil(100) - 1]
}

/// Compresses a snapshot's RAM with our code, and the same file with the program `zstd` and as many threads.
async fn compression(daemon: &Daemon) -> Vec<Figure> {
    let (mut ours, mut program) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let plain = daemon.ask("/instances/box/snapshots", json!({ "kind": "Standby" })).await;
        let uid = plain["id"].as_str().expect("an id");
        let ram = daemon.dir.path().join("data/snapshots").join(uid).join("saved/ram");
        let bytes = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&ram).expect("there")) * 512;
        let megabytes = f64::from(u32::try_from(bytes >> 10).expect("less than 4 TB")) / 1000.0;
        let start = Instant::now();
        let done = Command::new("zstd")
            .args(["-q", "-f", "-1", "-T2", "--no-sparse"])
            .arg(&ram)
            .arg("-o")
            .arg(daemon.dir.path().join("ram.zst"))
            .stdout(Stdio::null())
            .status();
        File::open(daemon.dir.path().join("ram.zst")).and_then(|file| file.sync_all()).expect("durable");
        assert!(done.is_ok_and(|status| status.success()), "zstd runs: deploy/setup installs it");
        program.push(megabytes / start.elapsed().as_secs_f64());
        let compression = json!({ "enabled": true, "algorithm": "zstd", "level": 1 });
        let body = json!({ "kind": "Standby", "compression": compression });
        let compressed = daemon.ask("/instances/box/snapshots", body).await;
        let start = Instant::now();
        let path = format!("/snapshots/{}", compressed["id"].as_str().expect("an id"));
        while daemon.get(&path).await["compression_state"] != "compressed" {
            tokio::time::sleep(POLL).await;
        }
        ours.push(megabytes / start.elapsed().as_secs_f64());
    }
    vec![Figure {
        what: "compression of a snapshot's RAM, zstd 1 (peer: zstd -1 -T2, fsync)".to_owned(),
        ours: median(ours),
        peer: Some(median(program)),
        unit: "MB/s",
        goal: "",
    }]
}
