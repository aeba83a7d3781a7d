//! Resources that one client cannot take from others: answers, connections, `/health`.

use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpSocket, TcpStream};

use crate::server::{Answer, CONNECTIONS_MAX, CONNECTIONS_PER_CLIENT_MAX, IMAGE, REQUESTS_MAX, Server};

/// Time limit for changes that take seconds on a busy machine.
const MOMENT: Duration = Duration::from_secs(60);

/// Repeats a request until the answer has this status.
async fn comes_to(status: u16, mut ask: impl AsyncFnMut() -> Answer) -> Answer {
    let deadline = tokio::time::Instant::now() + MOMENT;
    loop {
        let answer = ask().await;
        if answer.status == status {
            return answer;
        }
        assert!(tokio::time::Instant::now() < deadline, "never {status}: {} {}", answer.status, answer.body);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A request whose body never comes.
const UNFINISHED: &str = "POST /volumes HTTP/1.1\r\nContent-Length: 100";

/// Sends an incomplete request, or a request whose answer is not read.
async fn begins(server: &Server, head: &str) -> TcpStream {
    let mut stream = TcpStream::connect(server.address).await.expect("connected");
    let head = format!("{head}\r\nHost: x\r\nAuthorization: Bearer {}\r\n\r\n", server.token);
    stream.write_all(head.as_bytes()).await.expect("sent");
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn waits_and_unfinished_bodies_keep_out_only_their_like() {
    let server = Server::start().await;
    server.create(json!({"name": "web", "image": IMAGE, "size": "256MB"})).await;
    let wait = "GET /instances/web/wait?state=Paused&timeout=5m HTTP/1.1";
    let (mut held, mut bodies) = (Vec::new(), Vec::new());
    for _ in 0..REQUESTS_MAX {
        held.push(begins(&server, wait).await);
        bodies.push(begins(&server, UNFINISHED).await);
    }
    // A request that did not begin in time on a busy machine is replaced.
    let refused = comes_to(503, async || {
        held.push(begins(&server, wait).await);
        server.send("GET", "/instances/web/wait?state=Paused&timeout=1ms", None).await
    });
    let refused = refused.await;
    assert_eq!(refused.body["code"], "overloaded");
    assert!(refused.headers.contains_key("retry-after"));
    let body = json!({"name": "refused"});
    comes_to(503, async || {
        bodies.push(begins(&server, UNFINISHED).await);
        server.send("POST", "/volumes", Some(body.clone())).await
    })
    .await;
    // Requests that are answered at once, and the host's verbs, are not delayed by them.
    assert_eq!(server.send("GET", "/health", None).await.status, 200);
    assert_eq!(server.send("GET", "/instances/web", None).await.status, 200);
    assert_eq!(server.send("DELETE", "/instances/web", None).await.status, 204);
    drop((held, bodies));
    comes_to(400, async || server.send("POST", "/volumes", Some(body.clone())).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_failed_is_reported_by_health() {
    let server = Server::start().await;
    assert_eq!(server.send_as("GET", "/health", None, "").await.body, json!({"status": "ok"}));
    *server.host.store_failure.lock().expect("not poisoned") = Some("the disk is gone".to_owned());
    let answer = server.send_as("GET", "/health", None, "").await;
    assert_eq!((answer.status, answer.body["message"].as_str()), (503, Some("the disk is gone")));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_address_has_its_share_of_connections_and_gets_them_back() {
    let server = Server::start().await;
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS_PER_CLIENT_MAX {
        let mut stream = begins(&server, "GET /health HTTP/1.1").await;
        // Only an answered request is certainly counted.
        let mut head = [0; 12];
        stream.read_exact(&mut head).await.expect("an answer");
        assert_eq!(&head, b"HTTP/1.1 200");
        held.push(stream);
    }
    let mut refused = TcpStream::connect(server.address).await.expect("taken by the kernel");
    let mut answer = String::new();
    refused.read_to_string(&mut answer).await.expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("\"overloaded\""), "{answer}");
    held.clear();
    let again = async {
        loop {
            let health = server.http.get(format!("{}/health", server.base)).send().await;
            if health.is_ok_and(|answer| answer.status() == 200) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(MOMENT, again).await.expect("the share comes back");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_over_which_nothing_is_asked_make_room_for_one_that_asks() {
    let server = Server::start_with(|_, limits| limits.header_timeout = Duration::from_secs(3600)).await;
    let mut idle = Vec::new();
    for number in 0..CONNECTIONS_MAX {
        let socket = TcpSocket::new_v4().expect("made");
        let from = [127, 0, 0, 2 + u8::from(number % 2 == 0)];
        socket.bind((from, 0).into()).expect("an address of loopback");
        let mut stream = socket.connect(server.address).await.expect("taken by the kernel");
        // Some were answered before, and some were never sent; the last few wait for a permit.
        if number % 3 == 0 {
            stream.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("sent");
            let mut head = [0; 12];
            stream.read_exact(&mut head).await.expect("an answer");
        }
        idle.push(stream);
    }
    for _ in 0..3 {
        let own = reqwest::Client::new();
        let answer = own.get(format!("{}/health", server.base)).send();
        let answer = tokio::time::timeout(MOMENT, answer).await.expect("room is made");
        assert_eq!(answer.expect("an answer").status(), 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tokens_of_one_subject_leave_watches_to_others() {
    use stead::api::auth::Grant;
    let server = Server::start().await;
    let watch = "GET /instances?watch=true HTTP/1.1";
    let mut held = Vec::new();
    let refused = loop {
        let mut stream = begins(&server, watch).await;
        let mut head = [0; 12];
        stream.read_exact(&mut head).await.expect("an answer");
        held.push(stream);
        if &head != b"HTTP/1.1 200" {
            break head;
        }
    };
    assert_eq!((&refused, held.len() - 1), (b"HTTP/1.1 503", REQUESTS_MAX / 2));
    let now = jiff::Timestamp::now();
    let ends = now + jiff::SignedDuration::from_hours(1);
    let scopes = ["*".to_owned()];
    let other = Grant { subject: "other", id: "other", scopes: &scopes, issued_at: now, expires_at: ends };
    let token = server.keys.mint(&other).expect("minted");
    let answer = server.http.get(format!("{}/instances?watch=true", server.base)).bearer_auth(token).send();
    assert_eq!(answer.await.expect("an answer").status(), 200);
    drop(held);
    let again = async {
        loop {
            let mut stream = begins(&server, watch).await;
            let mut head = [0; 12];
            stream.read_exact(&mut head).await.expect("an answer");
            if &head == b"HTTP/1.1 200" {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(MOMENT, again).await.expect("the share comes back");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_without_a_permit_or_room_is_refused_with_the_reason() {
    use stead_controllers::host::HostErrorKind;
    let server = Server::start().await;
    let upload =
        async || server.send("POST", "/images/import?name=localhost/x", Some(json!("an archive"))).await;
    assert_eq!(upload().await.status, 400);
    for (kind, status, code) in [
        (HostErrorKind::Transient, 503, "overloaded"),
        (HostErrorKind::Exhausted, 507, "insufficient_storage"),
    ] {
        *server.host.import_failure.lock().expect("not poisoned") = Some(kind);
        let refused = upload().await;
        assert_eq!((refused.status, refused.body["code"].as_str()), (status, Some(code)));
        assert!(refused.headers.contains_key("retry-after"), "it may be sent again");
        assert!(refused.body["message"].as_str().is_some_and(|text| text.contains("no archive")));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_asks_and_never_reads_is_let_go() {
    let server = Server::start().await;
    let mut stream = TcpStream::connect(server.address).await.expect("connected");
    let asks = async {
        // The loop ends when the connection is closed: unread answers block further ones.
        while stream.write_all(b"GET /spec.json HTTP/1.1\r\nHost: x\r\n\r\n").await.is_ok() {}
    };
    tokio::time::timeout(MOMENT, asks).await.expect("it is let go");
}

/// Starts a server whose streams are idle for a moment only.
async fn with_short_pauses() -> Server {
    Server::start_with(|_, limits| limits.stream_idle_max = Duration::from_millis(10)).await
}

/// Reads lines of a stream until some of them contain a text.
async fn some_come(stream: &mut BufReader<TcpStream>, count: usize, text: &str) {
    let lines = async {
        let mut left = count;
        while left > 0 {
            let mut line = String::new();
            assert!(stream.read_line(&mut line).await.expect("read") > 0, "the stream ends before {text}");
            left -= usize::from(line.contains(text));
        }
    };
    tokio::time::timeout(MOMENT, lines).await.expect("they come");
}

/// Number of lines that no stream sends within [`MOMENT`] if its pauses have another length than the test gave them.
const IDLE_LINES: usize = 8;

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_sends_bookmarks_while_nothing_changes_and_the_next_change_after_them() {
    let server = with_short_pauses().await;
    let mut watch = BufReader::new(begins(&server, "GET /instances?watch=true HTTP/1.1").await);
    some_come(&mut watch, IDLE_LINES, r#""type":"bookmark""#).await;
    server.create(json!({"name": "web", "image": IMAGE, "size": "256MB"})).await;
    some_come(&mut watch, 1, r#""type":"added""#).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_is_followed_sends_lines_while_nothing_is_written_to_it() {
    let server = with_short_pauses().await;
    server.create(json!({"name": "web", "image": IMAGE, "size": "256MB"})).await;
    *server.host.log.lock().expect("not poisoned") = vec!["ready".to_owned()];
    let mut log = BufReader::new(begins(&server, "GET /instances/web/logs?follow=true HTTP/1.1").await);
    some_come(&mut log, 1, r#"data: "ready""#).await;
    some_come(&mut log, IDLE_LINES, ": still here").await;
}
