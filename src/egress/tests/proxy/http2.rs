//! HTTP/2 from end to end.

use bytes::Bytes;
use http_body_util::{BodyExt, Full, channel::Channel};
use hyper::header::{HeaderMap, HeaderValue};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use stead_schemas::egress::{Reason, TlsUse};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::client::{Http2, http2, secure};
use crate::origin::Origin;
use crate::world::{API, OTHER, VALUE, World};

const BOTH: &[&str] = &["h2", "http/1.1"];

async fn world() -> (World, Origin, Http2) {
    let world = World::new().await;
    let origin = world.origin(BOTH).await;
    let stream = secure(world.captured().await, world.guest_roots(), API, BOTH).await.expect("a handshake");
    let sender = http2(stream).await;
    (world, origin, sender)
}

fn request(method: Method, uri: &str, fields: &[(&str, &str)], body: &'static [u8]) -> Request<Full<Bytes>> {
    let mut builder = Request::builder().method(method).uri(uri);
    for (name, value) in fields {
        builder = builder.header(*name, *value);
    }
    builder.body(Full::from(body)).expect("a request")
}

#[tokio::test]
async fn a_credential_is_injected_over_http2_on_both_sides() {
    let (mut world, mut origin, mut sender) = world().await;
    let uri = format!("https://{API}:{}/v1?q=1", origin.port);
    let fields = [("authorization", "Bearer mock-KEY"), ("authorization", "more")];
    let response =
        sender.send_request(request(Method::POST, &uri, &fields, b"body")).await.expect("an answer");
    assert_eq!(response.status(), 200);
    assert_eq!(response.into_body().collect().await.expect("a body").to_bytes(), "body");
    origin.wait_for(1).await;
    let seen = &origin.seen()[0];
    assert_eq!(seen.values("authorization"), [format!("Bearer {VALUE}")]);
    assert_eq!((seen.uri.as_str(), seen.body.as_slice()), (uri.as_str(), &b"body"[..]));
    assert!(seen.values("host").is_empty());
    let line = world.line().await;
    assert_eq!(
        (line.version.as_deref(), line.tls, line.path.as_deref()),
        (Some("2"), TlsUse::Intercept, Some("/v1"))
    );
    assert!(line.injected && line.bytes_up == 4 && line.bytes_down == 4, "{line:?}");
}

#[tokio::test]
async fn streams_of_one_connection_use_one_connection_to_the_server() {
    let (world, mut origin, sender) = world().await;
    let uri = format!("https://{API}:{}/", origin.port);
    let send = |number: usize| {
        let (mut sender, uri) = (sender.clone(), uri.clone());
        async move {
            let path = format!("{uri}{number}");
            sender.send_request(request(Method::GET, &path, &[], b"")).await.expect("an answer").status()
        }
    };
    let mut set = tokio::task::JoinSet::new();
    for number in 0..100 {
        set.spawn(send(number));
    }
    assert!(set.join_all().await.iter().all(|status| *status == 200));
    origin.wait_for(100).await;
    assert_eq!(origin.connections(), 1);
    drop(world);
}

#[tokio::test]
async fn trailers_pass_and_are_masked() {
    let (_world, origin, mut sender) = world().await;
    let uri = format!("https://{API}:{}/trailers", origin.port);
    let fields = [("te", "trailers"), ("content-type", "application/grpc")];
    let response = sender.send_request(request(Method::POST, &uri, &fields, b"")).await.expect("an answer");
    let collected = response.into_body().collect().await.expect("a body");
    let trailers = collected.trailers().expect("trailers").clone();
    assert_eq!(trailers.get("grpc-status").expect("a status"), "0");
    assert_eq!(trailers.get("x-echo").expect("a field"), "Bearer mock-KEY");
    assert_eq!(collected.to_bytes(), "message");
    assert_eq!(origin.seen()[0].values("te"), ["trailers"]);
}

#[tokio::test]
async fn a_server_without_http2_makes_the_guest_use_http1() {
    let world = World::new().await;
    let _origin = world.origin(&["http/1.1"]).await;
    let stream = secure(world.captured().await, world.guest_roots(), API, BOTH).await.expect("a handshake");
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    let _origin = world.origin(&[]).await;
    let stream = secure(world.captured().await, world.guest_roots(), API, BOTH).await.expect("a handshake");
    assert_eq!(stream.get_ref().1.alpn_protocol(), None);
}

#[tokio::test]
async fn rows_46_47_requests_for_other_hosts_are_misdirected() {
    let (mut world, origin, mut sender) = world().await;
    let port = origin.port;
    for (uri, fields) in [
        (format!("https://{OTHER}:{port}/"), vec![]),
        (format!("https://{OTHER}/"), vec![]),
        (format!("https://{API}:{port}/"), vec![("host", OTHER)]),
        (format!("https://www.example.com:{port}/"), vec![]),
    ] {
        let response =
            sender.send_request(request(Method::GET, &uri, &fields, b"")).await.expect("an answer");
        assert_eq!(response.status(), StatusCode::MISDIRECTED_REQUEST, "{uri} {fields:?}");
        let line = world.line().await;
        assert_eq!((line.reason, line.injected), (Some(Reason::Misdirected), false));
    }
    let connect = request(Method::CONNECT, &format!("{OTHER}:443"), &[], b"");
    let response = sender.send_request(connect).await.expect("an answer");
    assert_eq!(response.status(), StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(world.line().await.reason, Some(Reason::MethodNotAllowed));
    assert!(origin.seen().is_empty());
}

/// Returns a frame of HTTP/2.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("small").to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Returns a field in HPACK, as a literal without an index.
fn literal(name: &str, value: &str) -> Vec<u8> {
    let size = |text: &str| u8::try_from(text.len()).expect("short");
    [&[0, size(name)], name.as_bytes(), &[size(value)], value.as_bytes()].concat()
}

/// Sends one request with these fields over a connection of its own. Returns the types of the frames that end
/// the stream or the connection: 3 (reset) or 7 (goaway), or 1 for an answer.
async fn outcome(world: &World, fields: &[(&str, &str)]) -> (u8, bool) {
    let mut stream =
        secure(world.captured().await, world.guest_roots(), API, &["h2"]).await.expect("a handshake");
    let block: Vec<u8> = fields.iter().flat_map(|(name, value)| literal(name, value)).collect();
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(4, 0, 0, &[]));
    // HEADERS with END_STREAM and END_HEADERS.
    bytes.extend(frame(1, 5, 1, &block));
    stream.write_all(&bytes).await.expect("sent");
    let mut is_extended_connect_offered = false;
    loop {
        let mut head = [0; 9];
        if stream.read_exact(&mut head).await.is_err() {
            return (7, is_extended_connect_offered);
        }
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; usize::try_from(length).expect("small")];
        stream.read_exact(&mut payload).await.expect("a payload");
        if head[3] == 4 {
            is_extended_connect_offered |= payload.chunks(6).any(|setting| setting.starts_with(&[0, 8]));
        }
        if matches!(head[3], 1 | 3 | 7) {
            return (head[3], is_extended_connect_offered);
        }
    }
}

#[tokio::test]
async fn rows_46_50_malformed_requests_of_http2_end_their_stream() {
    let world = World::new().await;
    let mut origin = world.origin(&["h2"]).await;
    let authority = format!("{API}:{}", origin.port);
    let good = [(":method", "GET"), (":scheme", "https"), (":path", "/"), (":authority", authority.as_str())];
    let (kind, is_extended_connect_offered) = outcome(&world, &good).await;
    assert_eq!((kind, is_extended_connect_offered), (1, false));
    origin.wait_for(1).await;
    let with = |more: &[(&'static str, &'static str)]| {
        good.iter().copied().chain(more.iter().copied()).collect::<Vec<(&str, &str)>>()
    };
    for fields in [
        with(&[(":authority", "evil.example")]),
        with(&[("x-a", "1"), (":path", "/other")]),
        with(&[("X-Upper", "1")]),
        with(&[("x-a", "a\r\nb: c")]),
        with(&[("x-a", "a\0b")]),
        with(&[("te", "gzip")]),
        with(&[("transfer-encoding", "chunked")]),
        with(&[("connection", "close")]),
        with(&[(":protocol", "websocket")]),
        with(&[(":unknown", "x")]),
    ] {
        let (kind, _) = outcome(&world, &fields).await;
        assert!(matches!(kind, 3 | 7) || origin.seen().len() == 1, "{fields:?} got {kind}");
    }
    for seen in origin.seen() {
        assert!(seen.values("transfer-encoding").is_empty() && seen.values("b").is_empty(), "{seen:?}");
        assert_ne!(seen.values("te"), ["gzip"]);
        assert_eq!(seen.uri, format!("https://{authority}/"));
    }
}

/// Writes bytes over a connection of its own, and returns `true` when the proxy ends the connection.
async fn is_ended(world: &World, bytes: &[u8]) -> bool {
    let stream =
        secure(world.captured().await, world.guest_roots(), API, &["h2"]).await.expect("a handshake");
    let (mut reader, mut writer) = tokio::io::split(stream);
    let write = async {
        // The proxy may close before it has everything.
        let _ = writer.write_all(bytes).await;
        let _ = writer.flush().await;
        std::future::pending::<()>().await;
    };
    let read = async {
        let mut head = [0; 9];
        while reader.read_exact(&mut head).await.is_ok() {
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; usize::try_from(length).expect("small")];
            if head[3] == 7 || reader.read_exact(&mut payload).await.is_err() {
                break;
            }
        }
        true
    };
    tokio::select! {
        () = write => false,
        is_ended = read => is_ended,
    }
}

#[tokio::test]
async fn row_48_floods_of_frames_end_the_connection() {
    let world = World::new().await;
    let origin = world.origin(&["h2"]).await;
    let authority = format!("{API}:{}", origin.port);
    let fields =
        [(":method", "GET"), (":scheme", "https"), (":path", "/"), (":authority", authority.as_str())];
    let block: Vec<u8> = fields.iter().flat_map(|(name, value)| literal(name, value)).collect();
    let begin = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frame(4, 0, 0, &[])].concat();
    let reset = |stream: u32| [frame(1, 5, stream, &block), frame(3, 0, stream, &[0, 0, 0, 8])].concat();
    let resets: Vec<u8> = (0..2_000).flat_map(|number| reset(2 * number + 1)).collect();
    assert!(is_ended(&world, &[begin.clone(), resets].concat()).await, "rapid resets");
    let more = literal("x-a", &"a".repeat(100)).repeat(100);
    let mut continued = frame(1, 0, 1, &block);
    for _ in 0..2_000 {
        continued.extend(frame(9, 0, 1, &more));
    }
    assert!(is_ended(&world, &[begin.clone(), continued].concat()).await, "continuations without an end");
    let wrong = frame(8, 0, 0, &[0; 4]);
    assert!(is_ended(&world, &[begin, wrong].concat()).await, "a window update of nothing");
    assert!(origin.seen().len() < 2_000, "{} requests", origin.seen().len());
}

#[tokio::test]
async fn trailers_of_a_request_cannot_carry_fields_of_a_head() {
    let world = World::new().await;
    let mut origin = world.origin(BOTH).await;
    let stream = secure(world.captured().await, world.guest_roots(), API, BOTH).await.expect("a handshake");
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .expect("begun");
    tokio::spawn(connection);
    let (mut parts, body) = Channel::<Bytes>::new(2);
    let mut trailers = HeaderMap::new();
    for name in ["authorization", "host", "cookie", "x-sum"] {
        trailers.insert(name, HeaderValue::from_static("1"));
    }
    parts.send_data(Bytes::from_static(b"message")).await.expect("taken");
    parts.send_trailers(trailers).await.expect("taken");
    drop(parts);
    let uri = format!("https://{API}:{}/", origin.port);
    let request = Request::builder().method(Method::POST).uri(uri).body(body).expect("a request");
    assert_eq!(sender.send_request(request).await.expect("an answer").status(), 200);
    origin.wait_for(1).await;
    let seen = &origin.seen()[0];
    let names: Vec<String> =
        seen.trailers.iter().flat_map(HeaderMap::keys).map(ToString::to_string).collect();
    assert_eq!((names, seen.body.as_slice()), (vec!["x-sum".to_owned()], &b"message"[..]));
    assert_eq!(seen.values("authorization"), [format!("Bearer {VALUE}")]);
}
