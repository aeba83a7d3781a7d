//! The modes of mediated egress, its list of hosts, its clients, and forks.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use super::outside::Outside;
use super::{VALUES, asks, attempt, box_with, carrier_log, start, works};
use crate::fixtures::until;
use crate::harness::{Harness, MOMENT};
use crate::invariants::settles;
use crate::namespace::in_namespace;
use crate::socket::{run, shell};

fn egress(fields: &Value) -> Value {
    let mut egress = json!({ "enabled": true });
    egress.as_object_mut().expect("an object").extend(fields.as_object().expect("an object").clone());
    json!({ "network": { "egress": egress } })
}

/// Requests that programs make by the proxy of their environment, each with its own library for TLS and HTTP.
const CLIENTS: [&str; 4] = [
    "curl -sSf -H \"Authorization: Bearer $KEY\" https://api.example.com/curl",
    "curl -sSf --http1.1 -H \"Authorization: Bearer $KEY\" https://api.example.com/old",
    "/usr/bin/wget -qO- --header \"Authorization: Bearer $KEY\" https://api.example.com/wget",
    "python3 -c 'import os, urllib.request as r; \
         print(r.urlopen(r.Request(\"https://api.example.com/python\", \
         headers={\"Authorization\": \"Bearer \" + os.environ[\"KEY\"]})).status)'",
];

/// Returns a line that sends a datagram outside.
pub(super) fn send(port: u16) -> String {
    format!("python3 -c 'import socket; socket.socket(2, 2).sendto(b\"x\", (\"203.0.113.10\", {port}))'")
}

#[test]
fn clients_with_and_without_the_proxy_have_the_value_and_a_fork_has_it_too() {
    in_namespace(async || {
        let mut site = Harness::new().await;
        let outside = Outside::new(&site).await;
        start(&mut site, &outside).await;
        box_with(&site, &json!({})).await;
        let no_proxy = "unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY";
        let mut asked = 0;
        for client in CLIENTS {
            for before in ["true", no_proxy] {
                let answer = attempt(&site, &format!("{before}; {client} 2>&1")).await;
                assert_eq!(answer.0, 0, "{client}: {answer:?}\n{}\n{}", outside.seen(), carrier_log(&site));
                asked += 1;
                let seen = outside.seen();
                let with_value = seen.matches(&format!("api.example.com Bearer {}", VALUES[0])).count();
                assert_eq!(with_value, asked, "{client}: {seen}");
            }
        }
        assert!(!outside.seen().contains("mock-KEY"), "{}", outside.seen());
        // The certificate is found by tools that know no environment.
        shell(&site, "box", "env -i openssl verify -CApath /etc/ssl/certs /run/stead-egress/authority.pem")
            .await;

        let fork = json!({ "name": "copy", "from_running": true });
        let answer = site.request(Method::POST, "/instances/box/fork", Some(fork)).await;
        assert_eq!(answer.status, StatusCode::CREATED, "{answer:?}");
        site.until_state("copy", "Running").await;
        let line = "curl -sSf --noproxy '*' -H \"Authorization: Bearer $KEY\" https://api.example.com/fork";
        let (output, end) = run(&site, "copy", json!({ "command": ["sh", "-c", line] }), b"").await;
        assert_eq!(end, json!({ "exitCode": 0 }), "{}", String::from_utf8_lossy(&output));
        let with_value = format!("api.example.com Bearer {}", VALUES[0]);
        assert_eq!(outside.seen().matches(&with_value).count(), asked + 1, "{}", outside.seen());
        works(&site).await;
        site.delete("box").await;
        site.delete("copy").await;
        settles(&mut site, "clients of mediated egress").await;
    });
}

#[test]
fn only_listed_hosts_are_reached_or_even_asked_for() {
    in_namespace(async || {
        let mut site = Harness::new().await;
        let outside = Outside::new(&site).await;
        start(&mut site, &outside).await;
        box_with(&site, &egress(&json!({ "allow_hosts": ["api.example.com"] }))).await;
        works(&site).await;
        for line in [
            "curl -sSf --noproxy '*' http://other.example.com/",
            "curl -sSf http://other.example.com/",
            "curl -sSf https://other.example.com/",
            "curl -sSf --noproxy '*' --resolve other.example.com:443:203.0.113.10 https://other.example.com/",
            "curl -sSf --noproxy '*' http://203.0.113.10/",
            "curl -sSfk --noproxy '*' https://203.0.113.10/",
        ] {
            let answer = attempt(&site, &format!("{line} 2>&1")).await;
            assert_ne!(answer.0, 0, "{line}: {answer:?}");
        }
        let seen = outside.seen();
        assert!(!seen.contains("name other") && !seen.contains("stray"), "{seen}");
        let log = site.cli("logs --source egress --tail 1000 box");
        assert!(log.contains("host_not_allowed"), "{log}");
        site.delete("box").await;
        settles(&mut site, "a list of hosts").await;
    });
}

#[test]
fn web_traffic_is_mediated_and_the_rest_is_not_and_an_observer_changes_nothing() {
    in_namespace(async || {
        let mut site = Harness::new().await;
        let outside = Outside::new(&site).await;
        start(&mut site, &outside).await;
        let mode = |word: &str| egress(&json!({ "enforcement": { "mode": word } }));
        box_with(&site, &mode("http_https_only")).await;
        works(&site).await;
        let answer = asks(&site, "https://api.example.com/").await;
        assert_eq!(answer.0, 0, "{answer:?}");
        assert!(outside.seen().contains(VALUES[0]), "{}", outside.seen());
        // QUIC is refused, and whatever else leaves by itself.
        shell(&site, "box", &send(443)).await;
        assert!(!outside.seen().contains("protocol 17 port 443"), "{}", outside.seen());
        until("a packet outside", MOMENT, async || {
            shell(&site, "box", &send(9999)).await;
            outside.seen().contains("protocol 17 port 9999").then_some(())
        })
        .await;
        attempt(&site, "nc -w 5 203.0.113.10 8443 </dev/null").await;
        assert!(outside.seen().contains("protocol 6 port 8443"), "{}", outside.seen());
        site.delete("box").await;
        until("the name to be free", MOMENT, async || {
            (site.get("box").await["code"] == "not_found").then_some(())
        })
        .await;

        let before = outside.seen().len();
        let mut observed = mode("observe");
        observed["network"]["egress"]["allow_hosts"] = json!(["api.example.com"]);
        box_with(&site, &observed).await;
        for url in ["https://api.example.com/o", "http://other.example.com/o"] {
            let answer =
                attempt(&site, &format!("curl -sSfk -H \"Authorization: Bearer $KEY\" {url} 2>&1")).await;
            assert_eq!(answer.0, 0, "{url}: {answer:?}\n{}", carrier_log(&site));
        }
        let seen = outside.seen()[before..].to_owned();
        assert!(seen.contains("api.example.com Bearer mock-KEY") && !seen.contains(VALUES[0]), "{seen}");
        let report: Value = serde_json::from_str(&site.cli("egress report box -o json")).expect("JSON");
        let hosts = &report["policy"]["network"]["egress"]["allow_hosts"];
        assert_eq!(hosts, &json!(["api.example.com", "other.example.com"]), "{report:#}");
        site.delete("box").await;
        settles(&mut site, "modes of mediated egress").await;
    });
}
