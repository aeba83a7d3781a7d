//! ARP entries on the host's side and on the guest's, after a restore and a fork: no client waits for an outdated
//! entry to expire.

use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::fixtures::{run, timeout, until};
use crate::harness::{BOOT, GATEWAY, Harness, MOMENT, image, runtime};
use crate::invariants::settles;
use crate::namespace::{bridge, in_namespace};
use crate::socket::shell;

const SERVER: &str = "mkdir -p /www; echo here >/www/index.html; httpd -p 80 -h /www; echo serving; \
                      while true; do sleep 1000; done";
/// Time after which a client repeats its first packet.
const FIRST_TRY: Duration = Duration::from_millis(990);
/// Number of rounds. A busy machine may delay one of them.
const ROUNDS: usize = 3;

/// The addresses by which the host knows an instance.
struct Known {
    ip: String,
    mac: String,
    tap: String,
}

async fn known(site: &Harness, name: &str) -> Known {
    let seen = site.get(name).await;
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let record = runtime(&site.run_dir(), &text(&seen["id"])).join("machine.json");
    let record: Value = serde_json::from_slice(&std::fs::read(record).expect("read")).expect("whole");
    let network = &seen["network"];
    Known { ip: text(&network["ip"]), mac: text(&network["mac"]), tap: text(&record["tap"]) }
}

/// Returns `true` if the page is served on a connection made by its first packet.
async fn is_served_at_once(ip: &str) -> bool {
    let Ok(Ok(mut stream)) = tokio::time::timeout(FIRST_TRY, TcpStream::connect((ip, 80))).await else {
        return false;
    };
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await.expect("written");
    let mut page = String::new();
    timeout(MOMENT, stream.read_to_string(&mut page)).await.expect("in time").expect("read");
    assert!(page.contains("here"), "{page}");
    true
}

/// Checks that the tables of the host and of the guest are right.
async fn is_known_right(site: &Harness, name: &str) {
    let Known { ip, mac, tap } = known(site, name).await;
    let neighbour = run("ip", &["neigh", "show", &ip, "dev", &bridge()]);
    assert!(neighbour.contains(&format!("lladdr {mac} ")), "{name}: {neighbour}");
    let forwarded = run("bridge", &["fdb", "show", "br", &bridge()]);
    let mut entries = forwarded.lines().filter(|line| line.starts_with(&format!("{mac} ")));
    let entry = entries.next().unwrap_or_default();
    assert!(
        entry.starts_with(&format!("{mac} dev {tap} ")) && entries.next().is_none(),
        "{name}: {forwarded}"
    );
    let bridge_mac = std::fs::read_to_string(format!("/sys/class/net/{}/address", bridge())).expect("read");
    let guest_arp = shell(site, name, &format!("grep '^{GATEWAY} ' /proc/net/arp")).await;
    assert!(guest_arp.contains(bridge_mac.trim()), "{name}: {guest_arp}, and the gateway has {bridge_mac}");
    assert_eq!(shell(site, name, "cat /sys/class/net/eth0/address").await, mac);
}

async fn post(site: &Harness, path: &str, body: Option<Value>) {
    let answer = site.request(Method::POST, path, body).await;
    assert!(answer.status.is_success(), "{path}: {answer:?}\n{}", site.daemon_log());
}

#[test]
fn the_first_packet_after_a_restore_and_to_a_fork_arrives_and_every_table_has_the_right_address() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        let body = json!({ "size": "128MB", "cmd": ["sh", "-c", SERVER] });
        let id = site.create("box", &image("busybox"), body).await;
        site.until_console(&id, "serving").await;
        site.until_state("box", "Running").await;
        let ip = known(&site, "box").await.ip;
        until("the page", BOOT, async || is_served_at_once(&ip).await.then_some(())).await;
        is_known_right(&site, "box").await;

        let mut in_time = 0;
        for round in 0..ROUNDS {
            post(&site, "/instances/box/standby", None).await;
            if round == ROUNDS - 1 {
                // Meanwhile the host forgot the entry, and the bridge its port.
                until("no TAP", MOMENT, async || (site.taps() == 0).then_some(())).await;
                run("ip", &["neigh", "flush", "dev", &bridge()]);
            }
            post(&site, "/instances/box/restore", None).await;
            in_time += usize::from(is_served_at_once(&ip).await);
            until("the page", BOOT, async || is_served_at_once(&ip).await.then_some(())).await;
            is_known_right(&site, "box").await;
        }
        assert!(in_time > 0, "no first packet after a restore was answered");

        let mut in_time = 0;
        for round in 0..ROUNDS {
            let name = format!("fork-{round}");
            post(&site, "/instances/box/fork", Some(json!({ "name": name, "from_running": true }))).await;
            let ip = known(&site, &name).await.ip;
            in_time += usize::from(is_served_at_once(&ip).await);
            until("the page of the fork", BOOT, async || is_served_at_once(&ip).await.then_some(())).await;
            is_known_right(&site, &name).await;
        }
        assert!(in_time > 0, "no first packet to a fork was answered");
        // None of the forks took over the source's address.
        assert!(is_served_at_once(&ip).await || is_served_at_once(&ip).await);
        is_known_right(&site, "box").await;

        // An instance with the address of a deleted one is not taken for it.
        let gone = known(&site, "fork-0").await;
        let forced = site.request(Method::DELETE, "/instances/fork-0?graceful_shutdown=false", None).await;
        assert_eq!(forced.status, StatusCode::NO_CONTENT, "{forced:?}");
        post(&site, "/instances/box/fork", Some(json!({ "name": "next", "from_running": true }))).await;
        let next = known(&site, "next").await;
        assert_eq!(next.ip, gone.ip, "the first address that is free");
        until("the page of the next", BOOT, async || is_served_at_once(&next.ip).await.then_some(())).await;
        is_known_right(&site, "next").await;
        settles(&mut site, "neighbours").await;
    });
}
