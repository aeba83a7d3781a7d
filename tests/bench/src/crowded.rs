//! The cost of hostile clients and a hostile registry for an honest client: its slowest answers with and without
//! them, and the daemon's memory.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::Figure;
use crate::crowd::{Crowd, Target};
use crate::daemon::Daemon;

/// Number of requests of each kind, with the crowd and without. It is large enough for a 99th percentile.
const REQUESTS: usize = 500;
/// Time for the crowd to get to work.
const ARRIVAL: Duration = Duration::from_secs(10);
const PER_CENT: usize = 99;

/// Returns the times within which 99 of 100 requests were answered, in seconds: for reads, and for writes, which are
/// then on disk.
async fn slowest(daemon: &Daemon) -> [f64; 2] {
    let (mut reads, mut writes) = (Vec::new(), Vec::new());
    for number in 0..REQUESTS {
        let start = Instant::now();
        daemon.get("/instances/web").await;
        reads.push(start.elapsed().as_secs_f64());
        let start = Instant::now();
        daemon.change("/instances/web", json!({ "ttl": format!("{}m", 100 + number) })).await;
        writes.push(start.elapsed().as_secs_f64());
    }
    [reads, writes].map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[REQUESTS * PER_CENT / 100]
    })
}

/// Argument with which this program becomes the crowd. It is a separate process, so that its work is not the honest
/// client's.
pub(crate) const ARGUMENT: &str = "crowd";

/// Runs a crowd in its own process until standard input ends. Prints how much it did.
pub(crate) async fn run([address, token, bomb]: [&str; 3]) {
    let target = Target {
        address: address.parse().expect("an address"),
        token: token.to_owned(),
        instance: "web".to_owned(),
        bomb: Arc::new(std::fs::read(bomb).expect("an archive")),
    };
    let crowd = Crowd::start(&target).await;
    let ended = tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new()));
    let _ = ended.await;
    let (connections, answers) = crowd.counts();
    writeln!(std::io::stdout(), "{connections} hostile connections and {answers} answers").expect("reported");
}

/// Makes an archive of a file with 512 MiB of zeros.
fn make_bomb(directory: &Path) {
    let line = "truncate -s 512M zeros && tar -cf - zeros | gzip -1 > bomb; rm zeros";
    let made = Command::new("sh").args(["-c", line]).current_dir(directory).status();
    assert!(made.is_ok_and(|status| status.success()), "tar and gzip run");
}

pub(crate) async fn crowded() -> Vec<Figure> {
    let daemon = Daemon::start("stbench9", "10.239.247.1/24").await;
    daemon.import().await;
    daemon.post("web", "256MB").await;
    make_bomb(daemon.dir.path());
    let quiet = slowest(&daemon).await;
    let own = std::env::current_exe().expect("this program has a path");
    let mut command = Command::new(own);
    command.args([ARGUMENT, daemon.base.trim_start_matches("http://"), &daemon.token_of("hostile")]);
    command.arg(daemon.dir.path().join("bomb")).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut crowd = command.spawn().expect("this program runs");
    tokio::time::sleep(ARRIVAL).await;
    let crowded = slowest(&daemon).await;
    drop(crowd.stdin.take());
    let reported = crowd.wait_with_output().expect("it ends").stdout;
    let reported = String::from_utf8_lossy(&reported).trim().to_owned();
    let peak = daemon.peak();
    daemon.delete("web").await;
    let of = |what: &str, index: usize| Figure {
        what: format!("{what}, 99 of 100, beside a crowd of hostile clients; peer: without it"),
        ours: crowded[index] * 1000.0,
        peer: Some(quiet[index] * 1000.0),
        unit: "ms",
        goal: "< 4",
    };
    let size = Figure {
        what: format!("daemon's memory at most, with {reported}"),
        ours: peak,
        peer: None,
        unit: "MiB",
        goal: "< 256",
    };
    vec![of("a read", 0), of("a write", 1), size]
}
