//! The rates that a guest has under limits of its network and its disks. The peer of each figure is the limit itself.
//!
//! The measurements are made in one VM, whose limits are changed while it runs. They are long enough that bursts are
//! over before they begin.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::daemon::{DEADLINE, Daemon};
use crate::{Figure, median};

const ROUNDS: usize = 3;
/// Ports of the guest: one that takes bytes, one that sends them, and one that runs a script.
const TAKES: u16 = 7000;
const SENDS: u16 = 7001;
const RUNS: u16 = 7002;
/// Limits of the network in Mbit/s, and of the disks in MB/s.
const NETWORK: [u64; 3] = [10, 100, 1000];
const DISK: [u64; 3] = [20, 100, 300];
/// Time of one measurement at the limit.
const LENGTH: Duration = Duration::from_secs(4);
/// Largest number of bytes that wait on their way through the network.
const BUFFERED: u64 = 1 << 20;
/// Size of the files on the disks, in megabytes.
const FILE: u64 = 128;

fn program() -> String {
    let servers = [
        (TAKES, "sh -c '$b dd of=/dev/null bs=65536 2>/dev/null; $b echo end'"),
        (SENDS, "dd if=/dev/zero bs=65536"),
        (RUNS, "sh"),
    ];
    let servers = servers.map(|(port, line)| format!("$b nc -ll -p {port} -e $b {line} 2>/dev/null &"));
    format!(
        "export b=/bin/busybox; $b --install -s /bin; {} while true; do $b sleep 1; done",
        servers.join(" ")
    )
}

fn connect(address: &str, port: u16) -> TcpStream {
    let start = Instant::now();
    loop {
        match TcpStream::connect((address, port)) {
            Ok(connection) => return connection,
            Err(_) if start.elapsed() < DEADLINE => std::thread::sleep(Duration::from_millis(100)),
            Err(error) => panic!("{address}:{port}: {error}"),
        }
    }
}

/// Sends bytes to the guest until all have arrived. Returns their rate in Mbit/s.
fn download(address: &str, bytes: u64) -> f64 {
    let mut connection = connect(address, TAKES);
    let block = vec![0; 1 << 16];
    let start = Instant::now();
    let mut left = bytes;
    while left > 0 {
        let count = left.min(block.len() as u64);
        connection.write_all(&block[..usize::try_from(count).expect("small")]).expect("sent");
        left -= count;
    }
    connection.shutdown(Shutdown::Write).expect("ended");
    connection.read_to_end(&mut Vec::new()).expect("answered");
    megabits(bytes, start)
}

/// Takes bytes from the guest, after those that may have been sent before the limit was met.
fn upload(address: &str, bytes: u64) -> f64 {
    let mut connection = connect(address, SENDS);
    let mut take = |bytes: u64| {
        let (mut buffer, mut left) = (vec![0; 1 << 16], bytes);
        while left > 0 {
            let count = connection.read(&mut buffer).expect("read") as u64;
            assert!(count > 0, "the guest sends on");
            left = left.saturating_sub(count);
        }
    };
    take(BUFFERED);
    let start = Instant::now();
    take(bytes);
    megabits(bytes, start)
}

fn megabits(bytes: u64, start: Instant) -> f64 {
    bytes as f64 * 8e-6 / start.elapsed().as_secs_f64()
}

/// Runs a script in the guest to its end.
fn run(address: &str, script: &str) {
    let mut connection = connect(address, RUNS);
    connection.write_all(format!("{script}; exit\n").as_bytes()).expect("sent");
    connection.read_to_end(&mut Vec::new()).expect("ended");
}

/// Moves megabytes on the root disk and a volume, half on each at the same time. Returns their rate in MB/s.
fn move_bytes(address: &str, megabytes: u64, is_read: bool) -> f64 {
    let one = |dir: &str| {
        let line = match is_read {
            true => format!("dd if={dir}/file of=/dev/null bs=1M iflag=direct"),
            false => format!("dd if=/dev/zero of={dir}/file bs=1M count={FILE} oflag=direct conv=notrunc"),
        };
        let times = (megabytes / 2).div_ceil(FILE);
        format!("(i=0; while [ $i -lt {times} ]; do {line} 2>/dev/null; i=$((i+1)); done) &")
    };
    let moved = 2 * FILE * (megabytes / 2).div_ceil(FILE);
    let start = Instant::now();
    run(address, &format!("{} {} wait", one("/root"), one("/data")));
    (moved << 20) as f64 / 1e6 / start.elapsed().as_secs_f64()
}

pub(crate) async fn limits() -> Vec<Figure> {
    let daemon = Daemon::start("stbench9", "10.239.247.1/24").await;
    daemon.import().await;
    daemon.ask("/volumes", json!({ "name": "data", "size_gb": 1 })).await;
    let body = json!({
        "name": "w", "image": "bench.test/busybox:v1", "size": "256MB", "vcpus": 1, "overlay_size": "512MB",
        "cmd": ["/bin/busybox", "sh", "-c", program()],
        "volumes": [{ "volume_id": "data", "mount_path": "/data" }],
    });
    daemon.verb("/instances", &body).await;
    let running = daemon.get("/instances/w/wait?state=Running&timeout=60s").await;
    assert_eq!(running["state"], "Running", "{running}");
    let seen = daemon.get("/instances/w").await;
    let address = seen["network"]["ip"].as_str().expect("an address");
    let mut figures = network(&daemon, address).await;
    figures.extend(disks(&daemon, address).await);
    daemon.delete("w").await;
    figures
}

async fn network(daemon: &Daemon, address: &str) -> Vec<Figure> {
    let mut figures = Vec::new();
    for limit in NETWORK {
        let rate = format!("{limit}Mbps");
        let both = json!({ "network": { "bandwidth_download": rate, "bandwidth_upload": rate } });
        daemon.change("/instances/w", both).await;
        let bytes = limit * 1_000_000 / 8 * LENGTH.as_secs();
        for (what, measure) in
            [("to the guest", download as fn(&str, u64) -> f64), ("from the guest", upload)]
        {
            let rounds = (0..ROUNDS).map(|_| measure(address, bytes)).collect();
            figures.push(figure(format!("{limit} Mbit/s {what}"), median(rounds), limit, "Mbit/s"));
        }
    }
    let none = json!({ "network": { "bandwidth_download": "0", "bandwidth_upload": "0" } });
    daemon.change("/instances/w", none).await;
    figures
}

async fn disks(daemon: &Daemon, address: &str) -> Vec<Figure> {
    run(address, "mkdir -p /root");
    move_bytes(address, 2 * FILE, false);
    let mut figures = Vec::new();
    for limit in DISK {
        daemon.change("/instances/w", json!({ "disk_io_bps": format!("{limit}MB/s") })).await;
        for (what, is_read) in [("reads", true), ("writes", false)] {
            // The burst is over when four times the rate was used for three seconds.
            move_bytes(address, limit * 13, is_read);
            let rounds =
                (0..ROUNDS).map(|_| move_bytes(address, limit * LENGTH.as_secs(), is_read)).collect();
            let what = format!("{limit} MB/s of {what} on the root disk and a volume together");
            figures.push(figure(what, median(rounds), limit, "MB/s"));
        }
    }
    figures
}

fn figure(what: String, ours: f64, limit: u64, unit: &'static str) -> Figure {
    Figure {
        what: format!("limit: {what} (peer: the limit)"),
        ours,
        peer: Some(limit as f64),
        unit,
        goal: "0.9 to 1.1",
    }
}
