//! Standby without connections, and restore on a connection, on real VMs.

use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::sleep;

use crate::crash::{EDGES, OF_IDLENESS};
use crate::fixtures::{patience, timeout, until};
use crate::harness::{BOOT, Harness, MOMENT, image};
use crate::invariants::settles;
use crate::namespace::{in_namespace, in_namespace_alone};

/// Program of the guest: pages on two ports, and an echo server that keeps connections open.
const SERVER: &str = "mkdir -p /www; echo here >/www/index.html; httpd -p 80 -h /www; httpd -p 8080 -h /www; \
                      nc -ll -p 81 -e cat & echo serving; while true; do sleep 1000; done";
const IDLE: Duration = Duration::from_secs(4);
/// Time that is longer than the idle timeout and than any poll of the connection table.
const LONG: Duration = Duration::from_secs(6);
/// Time for a first packet and two repetitions.
const FOLLOWED: Duration = Duration::from_secs(4);
/// Number of attempts, of which one must be in time.
const ROUNDS: u32 = 3;
const LESS_THAN_A_REPETITION: Duration = Duration::from_millis(500);
/// Time after which a client repeats its first packet.
const FIRST_TRY: Duration = Duration::from_millis(990);

fn policy(more: Value) -> Value {
    let mut policy = json!({ "enabled": true, "idle_timeout": "4s", "wake_on_traffic": true });
    let fields = more.as_object().expect("an object").clone();
    policy.as_object_mut().expect("an object").extend(fields);
    policy
}

async fn serving(site: &Harness, policy: Value) -> String {
    let body = json!({ "cmd": ["sh", "-c", SERVER], "auto_standby": policy });
    let id = site.create("box", &image("busybox"), body).await;
    site.until_console(&id, "serving").await;
    id
}

async fn address(site: &Harness) -> String {
    site.get("box").await["network"]["ip"].as_str().expect("an address").to_owned()
}

async fn connect(address: &str, port: u16, within: Duration) -> Option<TcpStream> {
    tokio::time::timeout(within, TcpStream::connect((address, port))).await.ok()?.ok()
}

/// Fetches the page over a connection that succeeds with its first packet. Returns the time it took.
async fn fetch(address: &str, within: Duration) -> Duration {
    let began = Instant::now();
    let stream = connect(address, 80, within).await;
    let took = began.elapsed();
    let mut stream = stream.unwrap_or_else(|| panic!("no answer within {within:?}"));
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await.expect("written");
    let mut page = String::new();
    timeout(MOMENT, stream.read_to_string(&mut page)).await.expect("in time").expect("read");
    assert!(page.contains("200 OK") && page.contains("here"), "{page}");
    took
}

/// Checks that the first packet is kept, and answered when the VM is back: no later than a client that requests the
/// restore gets its answer. A lost packet would be repeated after one second, then after two. A busy machine may
/// delay either, so one success is enough.
async fn the_first_packet_is_answered(site: &Harness, address: &str) {
    let mut seen = Vec::new();
    for _ in 0..ROUNDS {
        let asked_at = Instant::now();
        let answer = site.request(Method::POST, "/instances/box/restore", None).await;
        assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
        let restored = asked_at.elapsed();
        site.until_state("box", "Standby").await;
        let took = fetch(address, patience(MOMENT)).await;
        if took < restored + LESS_THAN_A_REPETITION {
            return;
        }
        seen.push((restored, took));
        site.until("box", "asleep again", asleep).await;
    }
    panic!("restored and answered after {seen:?}");
}

/// Returns `true` if the VM is in standby again after it was woken.
fn asleep(seen: &Value) -> bool {
    seen["state"] == "Standby" && seen["power_by"] == "idle"
}

/// Connects repeatedly until it succeeds, even across a daemon's death.
async fn let_in(address: String) {
    let began = Instant::now();
    loop {
        if connect(&address, 80, FOLLOWED).await.is_some() {
            return;
        }
        assert!(began.elapsed() < patience(BOOT) * 2, "{address} was never reached");
        // A refused connection would otherwise be repeated without a pause.
        sleep(Duration::from_millis(50)).await;
    }
}

async fn status(site: &Harness) -> Value {
    site.request(Method::GET, "/instances/box/auto-standby/status", None).await.body
}

async fn until_status(site: &Harness, what: &str) -> Value {
    until(what, BOOT, async || Some(status(site).await).filter(|seen| seen["status"] == what)).await
}

async fn patch(site: &Harness, policy: Value) {
    let body = json!({ "auto_standby": policy });
    let answer = site.request(Method::PATCH, "/instances/box", Some(body)).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    assert_eq!(answer.body["auto_standby"]["enabled"], policy["enabled"], "{answer:?}");
}

/// Checks that a client that the policy ignores does not wake the VM.
async fn ignored_clients_do_not_wake(site: &Harness, address: &str) {
    site.until("box", "asleep", asleep).await;
    assert!(connect(address, 8080, FIRST_TRY).await.is_none(), "an ignored port was answered");
    patch(site, policy(json!({ "ignore_source_cidrs": ["10.185.0.0/16", "2001:db8::/32"] }))).await;
    assert!(connect(address, 80, FIRST_TRY).await.is_none(), "an ignored source was answered");
    assert_eq!((&site.get("box").await["state"], site.vmms()), (&json!("Standby"), Vec::new()));
    patch(site, policy(json!({ "wake_on_traffic": false }))).await;
    assert!(connect(address, 80, FIRST_TRY).await.is_none(), "nobody was at the door");
    assert_eq!((&site.get("box").await["state"], site.vmms()), (&json!("Standby"), Vec::new()));
}

#[test]
fn an_instance_sleeps_when_nobody_is_connected_and_the_first_packet_wakes_it() {
    in_namespace_alone(async || {
        let mut site = Harness::running().await;
        serving(&site, policy(json!({ "ignore_destination_ports": [8080] }))).await;
        let address = address(&site).await;
        // An open connection keeps the VM running, however long it lasts.
        let mut echo =
            until("the echo to listen", MOMENT, async || connect(&address, 81, MOMENT).await).await;
        until_status(&site, "active").await;
        sleep(LONG).await;
        let seen = status(&site).await;
        assert_eq!((&seen["status"], &seen["active_inbound_connections"]), (&json!("active"), &json!(1)));
        echo.write_all(b"still").await.expect("written");
        let mut bytes = [0; 5];
        echo.read_exact(&mut bytes).await.expect("echoed");
        assert_eq!(site.get("box").await["state"], "Running");
        // The end of the connection starts the countdown.
        drop(echo);
        let closed_at = Instant::now();
        let seen = until_status(&site, "idle_countdown").await;
        assert!(seen["next_standby_at"].is_string() && seen["countdown_remaining"].is_string(), "{seen:#}");
        site.until_state("box", "Standby").await;
        assert!(closed_at.elapsed() >= IDLE, "after {:?}", closed_at.elapsed());
        // The steps after it, up to the wake listener, may take another pass.
        let kept = site
            .until("box", "told why", |seen| seen["conditions"].to_string().contains("nobody was connected"))
            .await;
        assert_eq!((&kept["power_by"], site.vmms()), (&json!("idle"), Vec::new()), "{kept:#}");
        let held = site.request(Method::POST, "/instances/box/auto-standby/hold", None).await;
        assert_eq!((held.status, &held.body["code"]), (StatusCode::CONFLICT, &json!("instance_in_standby")));

        the_first_packet_is_answered(&site, &address).await;
        let awake = site.until_state("box", "Running").await;
        assert_eq!(awake["power_by"], "traffic", "{awake:#}");
        let seen = status(&site).await;
        assert!(seen["woken_at"].is_string(), "{seen:#}");
        let shown = site.cli("describe box");
        assert!(shown.contains("woken by a connection"), "{shown}");

        // The VM stays in standby after the TAP disappears under its wake listener.
        site.until("box", "asleep", asleep).await;
        site.shell("ip link del $TAP");
        until("the TAP", MOMENT, async || (site.taps() == 1).then_some(())).await;
        until("an answer", BOOT, async || connect(&address, 80, FOLLOWED).await).await;

        ignored_clients_do_not_wake(&site, &address).await;
        // The wake-up works for any cause of the standby, and for any daemon that performed it.
        patch(&site, policy(json!({}))).await;
        until("an answer", BOOT, async || connect(&address, 80, FOLLOWED).await).await;
        site.until_state("box", "Running").await;
        let asked = site.request(Method::POST, "/instances/box/standby", None).await;
        assert_eq!((asked.status, &asked.body["state"]), (StatusCode::OK, &json!("Standby")), "{asked:?}");
        assert_eq!(asked.body["power_by"], "client");
        site.kill().await;
        site.start().await;
        until("the wake listener of the next daemon", MOMENT, async || connect(&address, 80, FOLLOWED).await)
            .await;

        // An instance that is deleted while its wake listener runs leaves nothing.
        site.until("box", "asleep", asleep).await;
        site.delete("box").await;
        settles(&mut site, "deleted in standby").await;
        assert_eq!((site.taps(), site.instance_files()), (0, Vec::new()));
    });
}

#[test]
fn a_hold_a_dead_daemon_and_a_policy_that_is_off_keep_an_instance_up() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        serving(&site, policy(json!({}))).await;
        until_status(&site, "idle_countdown").await;
        patch(&site, policy(json!({ "idle_timeout": "12s" }))).await;
        let held = site.request(Method::POST, "/instances/box/auto-standby/hold", None).await;
        assert_eq!(held.status, StatusCode::OK, "{held:?}");
        let until_time: jiff::Timestamp =
            held.body["hold_until"].as_str().expect("reported").parse().expect("a time");
        patch(&site, policy(json!({}))).await;
        sleep(LONG).await;
        assert_eq!(site.get("box").await["state"], "Running", "it is held");
        let kept = site.until_state("box", "Standby").await;
        assert!(jiff::Timestamp::now() >= until_time, "{kept:#}");
        // Connections that pass while no daemon runs do not count.
        let answer = site.request(Method::POST, "/instances/box/restore", None).await;
        assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
        until_status(&site, "idle_countdown").await;
        site.kill().await;
        sleep(LONG).await;
        let began = Instant::now();
        site.start().await;
        site.until("box", "asleep", asleep).await;
        assert!(began.elapsed() >= IDLE, "asleep {:?} after the start of a daemon", began.elapsed());
        // A disabled policy has no effect.
        site.request(Method::POST, "/instances/box/restore", None).await;
        patch(&site, json!({ "enabled": false })).await;
        sleep(LONG).await;
        let seen = status(&site).await;
        assert_eq!((&seen["status"], &seen["reason"]), (&json!("disabled"), &json!("policy_disabled")));
        assert_eq!(site.get("box").await["state"], "Running");
        let shown = site.cli("auto-standby status box");
        assert!(shown.contains("disabled"), "{shown}");
        settles(&mut site, "auto-standby").await;
    });
}

#[test]
fn a_crash_at_any_step_to_standby_by_itself_and_back_by_a_connection_is_healed() {
    in_namespace_alone(async || {
        let mut site = Harness::running().await;
        let id = serving(&site, policy(json!({ "idle_timeout": "1s" }))).await;
        let address = address(&site).await;
        for (kind, action) in OF_IDLENESS {
            for edge in EDGES {
                let failpoint = format!("{kind}/{action}/{edge}");
                site.until("box", "asleep", asleep).await;
                site.stop().await;
                site.spawn(Some(&failpoint));
                // The client meets either a wake listener or none, and keeps trying.
                let client = tokio::spawn(let_in(address.clone()));
                site.crashed(&failpoint).await;
                site.start().await;
                client.await.expect("let in");
            }
        }
        let console = site.console(&id);
        assert_eq!(console.matches("serving").count(), 1, "it is the same run: {console}");
        site.until_state("box", "Standby").await;
        settles(&mut site, "all these crashes").await;
    });
}
