//! Ingresses on real VMs: requests from the host's side to programs in guests, standby and restore by a request,
//! crashes, and ports that are in use.

use std::net::TcpListener;
use std::time::Duration;

use futures::future::join_all;
use reqwest::{Client, Method, StatusCode};
use serde_json::{Value, json};
use stead_schemas::limits::PENDING_CONNECTIONS_MAX;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::sleep;

use crate::crash::{EDGES, OF_INGRESS};
use crate::fixtures::{patience, timeout, until};
use crate::harness::{BOOT, Harness, LISTEN, MOMENT, image};
use crate::invariants::settles;
use crate::namespace::in_namespace;

/// Server with a page, a program that switches to another protocol, and a program that sends a part of its answer and
/// waits.
const SERVER: &str = r#"mkdir -p /www; echo here >/www/index.html
    for port in 80 8000 8001 8002 8003; do httpd -p $port -h /www; done
    skip='while read -r line; do [ ${#line} -le 1 ] && break; done'
    echo "$skip; printf 'HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n'; exec cat" >/upgrade
    echo "$skip; printf 'HTTP/1.1 200 OK\r\n\r\none'; read -r line; sleep 1000" >/part
    nc -ll -p 81 -e sh /upgrade & nc -ll -p 82 -e sh /part &
    echo serving; while true; do sleep 1000; done"#;
const SECRET: &str = "0123456789abcdef0123456789abcdef";
/// Number of connections that exceeds the first packets that a wake listener keeps.
const CROWD: usize = 2 * PENDING_CONNECTIONS_MAX;
/// Ports that the connections of the crowd go to. The kernel resets connections of a server whose queue overflows, and
/// that of busybox holds nine.
const CROWD_PORTS: [u16; 4] = [8000, 8001, 8002, 8003];
const _: () = assert!(CROWD / CROWD_PORTS.len() <= 9);
/// Time that is longer than the idle timeout and than any poll of the connection table.
const LONG: Duration = Duration::from_secs(6);

async fn serving(site: &Harness, more: Value) -> String {
    let mut body = json!({ "cmd": ["sh", "-c", SERVER] });
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    let id = site.create("web", &image("busybox"), body).await;
    site.until_console(&id, "serving").await;
    id
}

fn rule(hostname: &str, port: u16, instance: &str, target: u16) -> Value {
    json!({ "match": { "hostname": hostname, "port": port }, "target": { "instance": instance, "port": target } })
}

async fn ingress(site: &Harness, name: &str, rules: &[Value]) -> Value {
    let body = json!({ "name": name, "rules": rules, "tags": { "by": "test" } });
    let answer = site.request(Method::POST, "/ingresses", Some(body)).await;
    assert_eq!(answer.status, StatusCode::CREATED, "{answer:?}");
    answer.body
}

async fn refused(site: &Harness, rules: &[Value]) -> (u16, String) {
    let answer =
        site.request(Method::POST, "/ingresses", Some(json!({ "name": "no", "rules": rules }))).await;
    (answer.status.as_u16(), answer.body["code"].as_str().unwrap_or_default().to_owned())
}

fn is_ready(seen: &Value) -> bool {
    let conditions = seen["conditions"].as_array().cloned().unwrap_or_default();
    conditions.iter().any(|one| one["type"] == "Ready" && one["status"] == "True")
}

async fn until_ingress(site: &Harness, name: &str, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
    let path = format!("/ingresses/{name}");
    until(what, BOOT, async || {
        Some(site.request(Method::GET, &path, None).await.body).filter(|seen| is_so(seen))
    })
    .await
}

struct Asked {
    status: u16,
    headers: reqwest::header::HeaderMap,
    body: String,
}

/// Sends one request to a port of this host. Returns `None` when no process listens there.
async fn ask(port: u16, host: &str, more: &[(&str, &str)]) -> Option<Asked> {
    let client = Client::builder().timeout(patience(BOOT)).build().expect("a client");
    let mut request = client.get(format!("http://127.0.0.1:{port}/")).header("host", host);
    for (name, value) in more {
        request = request.header(*name, *value);
    }
    let response = request.send().await.ok()?;
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    Some(Asked { status, headers, body: response.text().await.expect("a body") })
}

async fn code(port: u16, host: &str, more: &[(&str, &str)]) -> (u16, String) {
    let asked = ask(port, host, more).await.expect("an answer");
    let body: Value = serde_json::from_str(&asked.body).unwrap_or_else(|_| panic!("{}", asked.body));
    (asked.status, body["code"].as_str().expect("a code").to_owned())
}

async fn page(port: u16, host: &str) {
    let asked = ask(port, host, &[]).await.expect("an answer");
    assert_eq!((asked.status, asked.body.trim()), (200, "here"), "{host}:{port}");
}

/// Opens a connection that switches to the protocol `echo`.
async fn tunnel(port: u16, host: &str) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.expect("open");
    let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(timeout(BOOT, stream.read_u8()).await.expect("in time").expect("a head"));
    }
    let head = String::from_utf8(head).expect("text");
    assert!(head.starts_with("HTTP/1.1 101 ") && head.contains("upgrade: echo"), "{head}");
    stream
}

async fn echoes(stream: &mut TcpStream, text: &str) {
    stream.write_all(text.as_bytes()).await.expect("sent");
    let mut bytes = vec![0; text.len()];
    timeout(MOMENT, stream.read_exact(&mut bytes)).await.expect("in time").expect("echoed");
    assert_eq!(bytes, text.as_bytes());
}

async fn conflicting_rules_are_refused(site: &Harness) {
    let missing = rule("c.test", 80, "nobody", 80);
    assert_eq!(refused(site, &[missing]).await, (400, "instance_not_found".to_owned()));
    let again = rule("{x}.vm.test", 80, "{x}", 80);
    assert_eq!(refused(site, &[again]).await, (409, "hostname_in_use".to_owned()));
    for taken in [8080, 5000] {
        let taken = rule("c.test", taken, "web", 80);
        assert_eq!(refused(site, &[taken]).await, (409, "port_in_use".to_owned()));
    }
    let mut tls = rule("c.test", 80, "web", 80);
    tls["tls"] = json!(true);
    assert_eq!(refused(site, &[tls]).await, (400, "not_supported".to_owned()));
}

/// Checks that the first part of an answer arrives before the rest is produced.
async fn an_answer_arrives_in_parts() {
    let mut part = TcpStream::connect("127.0.0.1:8081").await.expect("open");
    part.write_all(b"GET / HTTP/1.1\r\nHost: part.test\r\n\r\n").await.expect("sent");
    let mut seen = String::new();
    while !seen.contains("one") {
        let byte = timeout(MOMENT, part.read_u8()).await.expect("in time").expect("it goes on");
        seen.push(char::from(byte));
    }
    assert!(seen.starts_with("HTTP/1.1 200 OK"), "{seen}");
}

#[test]
fn requests_reach_programs_in_a_vm_by_the_name_of_their_host() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        let id = serving(&site, json!({})).await;
        let mut locked = rule("locked.test", 80, "web", 80);
        locked["request_header_auth"] = json!({ "header": "X-Key", "value": SECRET });
        let made = ingress(
            &site,
            "first",
            &[
                rule("a.test", 80, "web", 80),
                rule("{instance}.vm.test", 80, "{instance}", 80),
                rule("up.test", 8081, &id, 81),
                rule("part.test", 8081, &id, 82),
                locked,
            ],
        )
        .await;
        assert!(is_ready(&made), "{made:#}");
        for host in ["a.test", "A.test.:80", "web.vm.test", &format!("{id}.vm.test")] {
            page(80, host).await;
        }
        assert_eq!(ask(80, "locked.test", &[("x-key", SECRET)]).await.expect("an answer").status, 200);
        assert_eq!(code(80, "locked.test", &[]).await, (403, "forbidden".to_owned()));
        assert_eq!(code(80, "b.test", &[]).await, (404, "not_found".to_owned()));
        assert_eq!(code(80, "other.vm.test", &[]).await, (404, "instance_not_found".to_owned()));
        assert_eq!(code(80, "10-185-0-1.vm.test", &[]).await.0, 404, "only instances are reached");
        let mut open = tunnel(8081, "up.test").await;
        echoes(&mut open, "through and back").await;
        an_answer_arrives_in_parts().await;

        conflicting_rules_are_refused(&site).await;
        let shown = site.cli("ingress list");
        assert!(shown.contains("{instance}.vm.test:80 -> {instance}:80"), "{shown}");
        let shown = site.cli("ingress create second --rule 'd.test:8082=web:80'");
        assert!(shown.contains("yes"), "{shown}");
        page(8082, "d.test").await;
        let client = format!(
            "STEAD_INGRESS_SECRET={SECRET} STEAD_BASE_URL=http://{LISTEN} STEAD_API_KEY={} {}",
            site.token(),
            env!("CARGO_BIN_EXE_stead")
        );
        let shown =
            site.shell(&format!("{client} ingress create third --rule e.test=web:80 --auth-header X-Key"));
        assert!(shown.contains("(with a header)") && !shown.contains(SECRET), "{shown}");
        assert_eq!(code(80, "e.test", &[]).await.0, 403);
        assert_eq!(ask(80, "e.test", &[("x-key", SECRET)]).await.expect("an answer").status, 200);

        // The answer reports that an instance is down or gone; the ingress stays.
        let stopped = site.request(Method::POST, "/instances/web/stop", None).await;
        assert_eq!(stopped.status, StatusCode::OK, "{stopped:?}");
        let asked = ask(80, "a.test", &[]).await.expect("an answer");
        assert!(asked.status == 503 && asked.body.contains("Stopped"), "{} {}", asked.status, asked.body);
        assert!(asked.headers.contains_key("retry-after"));
        site.delete("web").await;
        assert_eq!(code(80, "a.test", &[]).await, (404, "instance_not_found".to_owned()));
        serving(&site, json!({})).await;
        page(80, "a.test").await;

        let log = site.daemon_log();
        assert!(!log.contains(SECRET), "{log}");
        assert_eq!(site.cli("ingress delete second").trim(), "second");
        assert!(ask(8082, "d.test", &[]).await.is_none(), "nobody wants the port any more");
        page(80, "a.test").await;
        site.delete("web").await;
        settles(&mut site, "ingresses").await;
    });
}

#[test]
fn a_request_wakes_an_instance_in_standby_and_an_open_one_keeps_it_up() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        let policy = |wakes: bool| json!({ "auto_standby": { "enabled": true, "idle_timeout": "4s", "wake_on_traffic": wakes } });
        let id = serving(&site, policy(true)).await;
        ingress(&site, "g", &[rule("a.test", 80, "web", 80), rule("up.test", 80, "web", 81)]).await;
        let crowd = CROWD_PORTS.map(|port| rule(&format!("{port}.test"), 80, "web", port));
        ingress(&site, "crowd", &crowd).await;
        for round in 0..2 {
            site.until_state("web", "Standby").await;
            assert_eq!(site.vmms(), [0; 0]);
            page(80, "a.test").await;
            let awake = site.until_state("web", "Running").await;
            assert_eq!(awake["power_by"], "traffic", "round {round}: {awake:#}");
        }
        // A large number of connections is answered too: first packets that are not kept are repeated.
        site.until_state("web", "Standby").await;
        let hosts = CROWD_PORTS.map(|port| format!("{port}.test"));
        join_all((0..CROWD).map(|number| page(80, &hosts[number % hosts.len()]))).await;
        // An open connection keeps the instance running, through the ingress as in any other way.
        let mut open = tunnel(80, "up.test").await;
        sleep(LONG).await;
        echoes(&mut open, "still").await;
        assert_eq!(site.get("web").await["state"], "Running");
        drop(open);
        site.until_state("web", "Standby").await;
        // If the instance must not be woken, the client gets an error at once.
        let answer = site.request(Method::PATCH, "/instances/web", Some(policy(false))).await;
        assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
        let asked = ask(80, "a.test", &[]).await.expect("an answer");
        assert!(asked.status == 503 && asked.body.contains("Standby"), "{} {}", asked.status, asked.body);
        assert_eq!((asked.headers.contains_key("retry-after"), site.vmms()), (true, Vec::new()));
        let console = site.console(&id);
        assert_eq!(console.matches("serving").count(), 1, "it is the same run: {console}");
        settles(&mut site, "standby behind an ingress").await;
    });
}

#[test]
fn a_crash_at_any_step_is_healed_and_a_taken_port_is_reported_and_used_when_it_is_free() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        serving(&site, json!({})).await;
        let [(kind, open), (_, close)] = OF_INGRESS;
        let body =
            json!({ "name": "g", "rules": [rule("a.test", 80, "web", 80), rule("a.test", 81, "web", 80)] });
        for edge in EDGES {
            site.stop().await;
            let failpoint = format!("{kind}/{open}/{edge}");
            site.spawn(Some(&failpoint));
            site.answers().await;
            site.attempt(Method::POST, "/ingresses", Some(body.clone())).await;
            site.crashed(&failpoint).await;
            site.start().await;
            until_ingress(&site, "g", "served again", is_ready).await;
            page(80, "a.test").await;
            page(81, "a.test").await;
            site.stop().await;

            let failpoint = format!("{kind}/{close}/{edge}");
            site.spawn(Some(&failpoint));
            site.answers().await;
            until_ingress(&site, "g", "served", is_ready).await;
            site.attempt(Method::DELETE, "/ingresses/g", None).await;
            site.crashed(&failpoint).await;
            site.start().await;
            until("the ingress to be gone", MOMENT, async || {
                let answer = site.request(Method::GET, "/ingresses", None).await;
                (answer.body == json!([])).then_some(())
            })
            .await;
            assert!(ask(80, "a.test", &[]).await.is_none() && ask(81, "a.test", &[]).await.is_none());
        }

        let made = site.request(Method::POST, "/ingresses", Some(body)).await;
        assert_eq!(made.status, StatusCode::CREATED, "{made:?}");
        site.kill().await;
        let foreign = TcpListener::bind("127.0.0.1:80").expect("nobody has it");
        site.start().await;
        let reported = until_ingress(&site, "g", "told", |seen| seen.to_string().contains("PortInUse")).await;
        assert!(!is_ready(&reported) && reported.to_string().contains("port 80: in use"), "{reported:#}");
        // The other port is not delayed by it, and the daemon works as before.
        page(81, "a.test").await;
        assert_eq!(refused(&site, &[rule("b.test", 80, "web", 80)]).await, (409, "port_in_use".to_owned()));
        drop(foreign);
        until_ingress(&site, "g", "served when the port is free", is_ready).await;
        page(80, "a.test").await;
        settles(&mut site, "all these crashes").await;
    });
}
