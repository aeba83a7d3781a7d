//! Memory of a server with 10,000 stored instances.

use std::fs;

use futures::StreamExt;
use futures::stream;

use crate::Figure;
use crate::posts::Bare;

const INSTANCES: u64 = 10_000;

/// Resident set of this process in MiB.
fn resident() -> f64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or("0");
    line.split_whitespace().next().and_then(|word| word.parse::<f64>().ok()).unwrap_or(0.0) / 1024.0
}

pub(crate) async fn stored() -> Vec<Figure> {
    let scratch = tempfile::tempdir_in("/var/tmp").expect("scratch");
    let bare = Bare::start(&scratch.path().join("stead")).await;
    let before = resident();
    let http = reqwest::Client::new();
    let send = |number| {
        let request =
            http.post(format!("{}/instances", bare.base)).bearer_auth(&bare.token).json(&Bare::body(number));
        async move { request.send().await.expect("answered").error_for_status().expect("accepted").bytes().await }
    };
    let mut sent = stream::iter(0..INSTANCES).map(send).buffer_unordered(64);
    while sent.next().await.is_some() {}
    let figure = |what: &str, ours| Figure { what: what.to_owned(), ours, peer: None, unit: "MiB", goal: "" };
    vec![
        figure("resident memory, empty store (server and load in one process)", before),
        figure("resident memory, 10,000 instances and their disks", resident()),
    ]
}
