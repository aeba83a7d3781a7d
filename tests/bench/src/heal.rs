//! The time in which the daemon undoes changes of the host by others, from the change to its end.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::Figure;
use crate::daemon::Daemon;

const ROUNDS: usize = 5;
/// Time after which a change counts as never undone.
const DEADLINE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(2);

fn milliseconds(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1000.0
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().expect("it runs");
    assert!(output.status.success(), "{program} {arguments:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Returns the time from the death of a VMM until the daemon reports another process, or none.
async fn death(daemon: &Daemon) -> Duration {
    let before = daemon.get("/instances/web").await["vmm_pid"].clone();
    run("kill", &["-9", &before.to_string()]);
    let start = Instant::now();
    while daemon.get("/instances/web").await["vmm_pid"] == before {
        assert!(start.elapsed() < DEADLINE, "the death is not noticed");
        tokio::time::sleep(POLL).await;
    }
    let noticed = start.elapsed();
    let running = daemon.get("/instances/web/wait?state=Running&timeout=60s").await;
    assert_eq!(running["state"], "Running", "{running}");
    noticed
}

/// Returns the time from the removal of a TAP until it is on the bridge again.
async fn tap(bridge: &str) -> Duration {
    let links = run("ip", &["-br", "link", "show", "master", bridge]);
    let tap =
        links.lines().filter_map(|line| line.split([' ', '@']).next()).find(|tap| tap.starts_with("sb"));
    let tap = tap.expect("a running VM has a TAP");
    let bridged = PathBuf::from(format!("/sys/class/net/{tap}/master"));
    run("ip", &["link", "del", tap]);
    let start = Instant::now();
    while !bridged.exists() {
        assert!(start.elapsed() < DEADLINE, "{tap} does not come back");
        tokio::time::sleep(POLL).await;
    }
    start.elapsed()
}

pub(crate) async fn heal() -> Vec<Figure> {
    const BRIDGE: &str = "stbench8";
    let daemon = Daemon::start(BRIDGE, "10.239.248.1/24").await;
    daemon.import().await;
    daemon.post_with("web", serde_json::json!({ "network": { "enabled": true } })).await;
    let (mut deaths, mut taps) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        taps.push(tap(BRIDGE).await);
        deaths.push(death(&daemon).await);
    }
    daemon.delete("web").await;
    let figure = |what: &str, times: Vec<Duration>, goal: &'static str| Figure {
        what: what.to_owned(),
        ours: milliseconds(times),
        peer: None,
        unit: "ms",
        goal,
    };
    vec![
        figure("a VMM that is killed is noticed after", deaths, "< 1000"),
        figure("a TAP that is removed is on the bridge again after", taps, "< 2000"),
    ]
}
