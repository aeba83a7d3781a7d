//! The life of an instance from POST until nothing is left, and the network access of its VM.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use reqwest::{Method, StatusCode};
use serde_json::json;

use crate::fixtures::{patience, timeout};
use crate::harness::{GATEWAY, Harness, MOMENT, image};
use crate::invariants::settles;
use crate::namespace::in_namespace;

#[test]
fn after_a_deletion_and_the_daemons_end_only_the_declared_network_is_left() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        let body = json!({ "cmd": ["sh", "-c", "while true; do sleep 1; done"] });
        let id = site.create("box", &image("busybox"), body.clone()).await;
        let seen = site.until_state("box", "Running").await;
        assert_eq!(site.vmms().len(), 1);
        let address = seen["network"]["ip"].as_str().expect("an address").to_owned();
        site.delete("box").await;
        // The answer came when everything of the instance was gone.
        assert_eq!((site.taps(), site.vmms()), (0, Vec::new()));
        assert_eq!(site.instance_files(), [""; 0].map(std::path::PathBuf::from));
        assert_eq!(
            site.shell(
                "ls -d /sys/fs/cgroup/*/stead-$BRIDGE /sys/fs/cgroup/stead-$BRIDGE 2>/dev/null || true"
            ),
            ""
        );
        let answer = site.request(Method::GET, &format!("/instances/{id}"), None).await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND);
        // The name is free at once.
        site.create("box", &image("busybox"), body).await;
        site.delete("box").await;
        settles(&mut site, "a deletion").await;
        assert_eq!((site.taps(), site.vmms()), (0, Vec::new()));
        assert_eq!(site.instance_files(), [""; 0].map(std::path::PathBuf::from));
        assert!(!site.shell("nft list ruleset").contains(&address), "no rule of it is left");
        // The configuration declares the network, not an instance: it stays.
        assert!(site.shell("ip -br addr show $BRIDGE").contains(GATEWAY));
    });
}

#[test]
fn a_guest_reaches_its_host_and_not_its_neighbour() {
    in_namespace(async || {
        let mut site = Harness::new().await;
        site.shell(
            "ip link add up0 type veth; ip link set up0 mtu 1400 up; ip addr add 198.51.100.2/24 dev up0; \
             ip route add default via 198.51.100.1",
        );
        site.start().await;
        let serve = "echo welcome > /tmp/index.html; httpd -f -p 80 -h /tmp";
        site.create("server", &image("busybox"), json!({ "cmd": ["sh", "-c", serve] })).await;
        let server = site.until_state("server", "Running").await;
        let server = server["network"]["ip"].as_str().expect("an address").to_owned();
        // The server that a neighbour must not reach exists, as its host can tell.
        let reported = crate::fixtures::until("the guest's server", MOMENT, async || fetch(&server)).await;
        assert!(reported.contains("welcome"), "{reported}");

        let listener = TcpListener::bind((GATEWAY, 8081)).expect("the bridge has its address");
        // This is a service of the host that guests may not use.
        let _closed = TcpListener::bind(("0.0.0.0", 8082)).expect("the port is free");
        let ask = format!(
            "ping -c 1 -W 5 {GATEWAY} >/dev/null && echo ping-host-yes || echo ping-host-no
             echo hello from $(hostname) | nc -w 5 {GATEWAY} 8081
             nc -w 3 {GATEWAY} 8082 </dev/null && echo closed-port-yes || echo closed-port-no
             ping -c 2 -W 2 {server} >/dev/null && echo ping-neighbour-yes || echo ping-neighbour-no
             nc -w 3 {server} 80 </dev/null && echo tcp-neighbour-yes || echo tcp-neighbour-no
             grep -E 'search|options' /etc/resolv.conf
             echo mtu $(cat /sys/class/net/eth0/mtu)
             echo asked"
        );
        let body = json!({ "cmd": ["sh", "-c", ask] });
        let id = site.create("client", &image("busybox"), body).await;
        let received = tokio::task::spawn_blocking(move || {
            let (mut stream, from) = listener.accept().expect("accepted");
            let mut text = String::new();
            stream.read_to_string(&mut text).expect("read");
            (text, from.ip().to_string())
        });
        let (received, from) = timeout(crate::harness::BOOT, received).await.expect("called").expect("ran");
        assert_eq!(received, "hello from client\n");
        let client = site.get("client").await;
        assert_eq!(client["network"]["ip"], from.as_str());
        let console = site.until_console(&id, "asked").await;
        for answer in [
            "ping-host-yes",
            "closed-port-no",
            "ping-neighbour-no",
            "tcp-neighbour-no",
            "search a.test b.test",
            "options ndots:2",
            // This is the uplink's MTU.
            "mtu 1400",
        ] {
            assert!(console.contains(answer), "{answer}:\n{console}");
        }
        // All files of the daemon and its VMMs belong to the daemon alone; the kernel's copy is the test's. VMMs read the
        // kernel and the initial root in the cache by a path, as users of their own.
        let run_dir = site.run_dir().display().to_string();
        let open = format!(
            "find $DATA {run_dir} -path '*/kernel' -prune -o -path '*/cache/*' -prune -o ! -type l -perm /077 -print"
        );
        let open = site.shell(&open);
        assert_eq!(open, "", "open to group or others");
        settles_when_ended(&mut site).await;
    });
}

async fn settles_when_ended(site: &mut Harness) {
    site.until("client", "ended", |seen| seen["state"] == "Stopped" && seen["exit_code"] == 0).await;
    settles(site, "two VMs").await;
}

fn fetch(address: &str) -> Option<String> {
    let mut stream = TcpStream::connect((address, 80)).ok()?;
    stream.set_read_timeout(Some(patience(MOMENT))).ok()?;
    stream.write_all(b"GET /index.html HTTP/1.0\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}

/// Checks that a host route that conflicts with the subnet is named in the conditions of waiting instances, which
/// continue when it is gone.
#[test]
fn a_route_that_overlaps_the_subnet_is_named_by_the_instances_that_wait_for_it() {
    in_namespace(async || {
        let mut site = Harness::new().await;
        site.shell("ip link set lo up; ip route add 10.185.0.0/16 dev lo");
        site.start().await;
        site.create(
            "waits",
            &image("busybox"),
            json!({ "cmd": ["sh", "-c", "while true; do sleep 1; done"] }),
        )
        .await;
        let is_reported = |seen: &serde_json::Value| {
            seen["conditions"].to_string().contains("overlaps the host's route to 10.185.0.0/16")
        };
        site.until("waits", "the network's reason", is_reported).await;
        site.shell("ip route del 10.185.0.0/16 dev lo");
        site.until_state("waits", "Running").await;
        site.delete("waits").await;
        settles(&mut site, "a route that overlapped").await;
    });
}
