//! Rounds of deaths and changes beside a guest that tries to reach the outside by itself all the time.

use reqwest::{Method, StatusCode};
use serde_json::json;
use stead_controllers::sim::Rng;

use super::outside::Outside;
use super::{box_with, carriers, start, works};
use crate::fixtures::{rounds, until};
use crate::harness::{BOOT, Harness};
use crate::invariants::settles;
use crate::namespace::in_namespace;

/// Number of rounds, unless `STEAD_TEST_ROUNDS` has another one.
const ROUNDS: u64 = 6;
const SEED: u64 = 20_261_128;

/// Sends datagrams and opens connections that are not carried, without end.
const NOISE: &str = "
import socket, time
while True:
    for port in (53, 443, 9999):
        try:
            socket.socket(2, 2).sendto(b'x', ('203.0.113.10', port))
        except OSError:
            pass
    for port in (22, 8443):
        with socket.socket() as sock:
            sock.settimeout(0.2)
            try:
                sock.connect(('203.0.113.10', port))
            except OSError:
                pass
    time.sleep(0.01)
";

async fn verb(site: &Harness, verb: &str, state: &str) {
    let answer = site.request(Method::POST, &format!("/instances/box/{verb}"), None).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}\n{}", site.daemon_log());
    site.until_state("box", state).await;
}

/// Plays one round. Returns what it did.
async fn play(site: &mut Harness, outside: &Outside, round: u64, choice: u64) -> &'static str {
    match choice {
        0 => {
            carriers().iter().for_each(|pid| drop(site.shell(&format!("kill -9 {pid} || true"))));
            "the process is killed"
        }
        1 => {
            site.kill().await;
            start(site, outside).await;
            "the daemon is killed"
        }
        2 => {
            site.kill().await;
            carriers().iter().for_each(|pid| drop(site.shell(&format!("kill -9 {pid} || true"))));
            start(site, outside).await;
            "both are killed"
        }
        3 => {
            site.shell("ip link del $BRIDGE");
            "the bridge is deleted"
        }
        4 => {
            site.shell("ip link del $TAP");
            "the TAP is deleted"
        }
        5 => {
            verb(site, "standby", "Standby").await;
            verb(site, "restore", "Running").await;
            "standby and restore"
        }
        6 => {
            let killed = site.vmms();
            killed.iter().for_each(|pid| drop(site.shell(&format!("kill -9 {pid} || true"))));
            let is_another = || site.vmms().iter().any(|pid| !killed.contains(pid));
            until("another VMM", BOOT, async || is_another().then_some(())).await;
            "the VMM is killed"
        }
        _ => {
            let patch = json!({ "env": { "REAL": format!("v4lue-of-round-{round}") } });
            let answer = site.request(Method::PATCH, "/instances/box", Some(patch)).await;
            assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
            "the value is changed"
        }
    }
}

#[test]
fn nothing_of_a_guest_is_seen_outside_whatever_ends_and_all_of_it_comes_back() {
    in_namespace(async || {
        let mut site = Harness::new().await;
        let outside = Outside::new(&site).await;
        start(&mut site, &outside).await;
        box_with(&site, &json!({ "cmd": ["python3", "-c", NOISE] })).await;
        works(&site).await;
        let mut rng = Rng::new(SEED);
        for round in 0..rounds(ROUNDS) {
            let choice = rng.below(8);
            let played = play(&mut site, &outside, round, choice).await;
            site.until_state("box", "Running").await;
            works(&site).await;
            assert!(!outside.seen().contains("stray"), "round {round}, {played}: {}", outside.seen());
        }
        site.delete("box").await;
        settles(&mut site, "rounds of mediated egress").await;
    });
}
