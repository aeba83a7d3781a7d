//! The agent: the round trip of a program, against the same channel with less work.

use std::time::Instant;

use crate::daemon::Daemon;
use crate::stream::{exec, open};
use crate::{Figure, copies, logs, median};

const ROUNDS: usize = 100;

async fn times<Step: Future<Output = ()>>(step: impl Fn() -> Step) -> f64 {
    let mut seconds = Vec::new();
    for _ in 0..ROUNDS {
        let start = Instant::now();
        step().await;
        seconds.push(start.elapsed().as_secs_f64() * 1000.0);
    }
    median(seconds)
}

pub(crate) async fn agent() -> Vec<Figure> {
    let daemon = Daemon::start("stbench2", "10.239.252.1/24").await;
    daemon.import().await;
    daemon.post_with_disk("box", "1GB", "500MB").await;
    let busybox = "/bin/busybox";
    let round_trip = times(async || drop(exec(&daemon, &[busybox, "true"]).await)).await;
    let bare = times(async || drop(daemon.get("/instances/box/stat?path=/bin").await)).await;
    // This measures the cost of a start in the guest itself: its shell starts the same program a hundred times.
    let line = "i=0; while [ $i -lt 100 ]; do /bin/busybox true; i=$((i+1)); done";
    let start = Instant::now();
    exec(&daemon, &[busybox, "sh", "-c", line]).await;
    let process = (start.elapsed().as_secs_f64() * 1000.0 - round_trip) / 100.0;
    // This runs before the copies, which keep the host's disk busy for a while after they are done.
    let lines = logs::lines(&daemon, open(&daemon, "exec", logs::request()).await).await;
    let copies = copies::copies(&daemon).await;
    daemon.delete("box").await;
    let figure = |what: &str, ours, peer, unit, goal| Figure {
        what: what.to_owned(),
        ours,
        peer: Some(peer),
        unit,
        goal,
    };
    let exec = figure(
        "exec of `true`, median (peer: a stat's round trip and a process start in the guest)",
        round_trip,
        bare + process,
        "ms",
        "<= 3",
    );
    let line = "a key sent to a line of the console's log, followed (peer: its echo by exec)";
    let line = figure(line, lines.logged, lines.echoed, "ms", "");
    [vec![exec], copies, vec![line]].concat()
}
