//! Memory: a server with 10,000 stored instances, a daemon with ten VMs; processor time when idle.

use std::time::Duration;

use futures::StreamExt;
use futures::stream;

use crate::Figure;
use crate::bare::Bare;
use crate::daemon::Daemon;

const INSTANCES: u64 = 10_000;
const VMS: u32 = 10;
const IDLE: Duration = Duration::from_secs(20);

fn figure(what: impl Into<String>, ours: f64, unit: &'static str, goal: &'static str) -> Figure {
    Figure { what: what.into(), ours, peer: None, unit, goal }
}

pub(crate) async fn stored() -> Vec<Figure> {
    let scratch = tempfile::tempdir_in("/var/tmp").expect("scratch");
    let bare = Bare::start(&scratch.path().join("stead"));
    let before = bare.resident();
    let http = reqwest::Client::new();
    let send = |number| {
        let request =
            http.post(format!("{}/instances", bare.base)).bearer_auth(&bare.token).json(&Bare::body(number));
        async move { request.send().await.expect("answered").error_for_status().expect("accepted").bytes().await }
    };
    let mut sent = stream::iter(0..INSTANCES).map(send).buffer_unordered(64);
    while sent.next().await.is_some() {}
    vec![
        figure("server's resident memory, empty store", before, "MiB", ""),
        figure("server's resident memory, 10,000 instances and their disks", bare.resident(), "MiB", ""),
    ]
}

pub(crate) async fn running() -> Vec<Figure> {
    let daemon = Daemon::start("stbench1", "10.239.251.1/24").await;
    daemon.import().await;
    for number in 0..VMS {
        daemon.post(&format!("w{number}"), "160MB").await;
    }
    let (resident, before) = (daemon.resident(), daemon.processor_seconds());
    tokio::time::sleep(IDLE).await;
    let busy = daemon.processor_seconds() - before;
    for number in 0..VMS {
        daemon.delete(&format!("w{number}")).await;
    }
    vec![
        figure(format!("daemon's resident memory with {VMS} VMs"), resident, "MiB", ""),
        figure(
            format!("daemon's processor time, idle with {VMS} VMs"),
            busy / IDLE.as_secs_f64() * 100.0,
            "% of a core",
            "event-driven",
        ),
    ]
}
