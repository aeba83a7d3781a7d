//! Messages that are framed in odd ways, from guests and from servers.

use stead_schemas::egress::Decision;
use tokio::io::AsyncWriteExt;

use crate::client::{ask, read_to_end, secure};
use crate::origin::Origin;
use crate::world::{API, VALUE, World};

/// Requests that a server and a proxy could frame differently, after a request line and `Host`.
const ODD: &[&str] = &[
    "Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "Content-Length: 5, 6\r\n\r\nhello",
    "Content-Length: -5\r\n\r\nhello",
    "Content-Length: +5\r\n\r\nhello",
    "Content-Length: 0x5\r\n\r\nhello",
    "Content-Length: 5 5\r\n\r\nhello",
    "Content-Length: 99999999999999999999999\r\n\r\nhello",
    "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "Transfer-Encoding: gzip\r\n\r\n0\r\n\r\n",
    "Transfer-Encoding: identity\r\n\r\n",
    "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "Transfer-Encoding\t: chunked\r\n\r\n0\r\n\r\n",
    "X-A: 1\r\n Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "X-A: 1\r\n\tfolded\r\n\r\n",
    "X A: 1\r\n\r\n",
    ": 1\r\n\r\n",
    "X-A\r\n\r\n",
    "X-A: a\rb\r\n\r\n",
    "X-A: a\0b\r\n\r\n",
    "X-\u{0}A: a\r\n\r\n",
    "X(A): a\r\n\r\n",
];

/// Chunked bodies that are malformed.
const ODD_CHUNKS: &[&str] = &[
    "-1\r\nx\r\n0\r\n\r\n",
    "g\r\nx\r\n0\r\n\r\n",
    "1\r\nxx\r\n0\r\n\r\n",
    "ffffffffffffffffff\r\nx",
    " 1\r\nx\r\n0\r\n\r\n",
    "\r\n1\r\nx\r\n0\r\n\r\n",
];

#[tokio::test]
async fn row_42_requests_that_can_be_framed_in_two_ways_reach_no_server() {
    let mut world = World::new().await;
    let origin = world.origin(&["http/1.1"]).await;
    for odd in ODD {
        let mut stream = secure(world.captured().await, world.guest_roots(), API, &["http/1.1"])
            .await
            .expect("a handshake");
        let request = format!("POST / HTTP/1.1\r\nHost: {API}:{}\r\n{odd}", origin.port);
        let answer = ask(&mut stream, request).await;
        assert!(answer.as_ref().is_none_or(|answer| answer.status == 400), "{odd:?}: {answer:?}");
        assert!(read_to_end(&mut stream).await.is_empty(), "{odd:?}: the connection goes on");
        let line = world.line().await;
        assert_eq!((line.decision, line.injected), (Decision::Refused, false), "{odd:?}: {line:?}");
    }
    assert!(origin.seen().is_empty(), "{:?}", origin.seen());
}

#[tokio::test]
async fn row_42_a_body_with_a_malformed_chunk_does_not_arrive_whole() {
    let world = World::new().await;
    let origin = world.origin(&["http/1.1"]).await;
    for odd in ODD_CHUNKS {
        let mut stream = secure(world.captured().await, world.guest_roots(), API, &["http/1.1"])
            .await
            .expect("a handshake");
        let request = format!(
            "POST / HTTP/1.1\r\nHost: {API}:{0}\r\nTransfer-Encoding: chunked\r\n\r\n{odd}GET /smuggled HTTP/1.1\r\nHost: {API}:{0}\r\n\r\n",
            origin.port
        );
        let _ = stream.write_all(request.as_bytes()).await;
        let _ = stream.shutdown().await;
        read_to_end(&mut stream).await;
    }
    assert!(origin.seen().is_empty(), "{:?}", origin.seen());
}

#[tokio::test]
async fn row_42_a_length_beside_a_transfer_coding_is_dropped_and_ends_the_connection() {
    let world = World::new().await;
    let mut origin = world.origin(&["http/1.1"]).await;
    let orders = [
        "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
    ];
    for fields in orders {
        let mut stream = secure(world.captured().await, world.guest_roots(), API, &["http/1.1"])
            .await
            .expect("a handshake");
        let request = format!(
            "POST / HTTP/1.1\r\nHost: {API}:{0}\r\n{fields}\r\n5\r\nhello\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: {API}:{0}\r\n\r\n",
            origin.port
        );
        let _ = ask(&mut stream, request).await;
        read_to_end(&mut stream).await;
    }
    // The server gets one unambiguous request of each connection, and nothing that was smuggled after it.
    origin.wait_for(orders.len()).await;
    for seen in origin.seen() {
        assert_eq!((seen.uri.as_str(), seen.body.as_slice()), ("/", &b"hello"[..]));
        assert!(seen.values("content-length").is_empty());
    }
    assert_eq!(origin.seen().len(), orders.len());
}

#[tokio::test]
async fn row_42_trailers_cannot_carry_fields_of_a_head() {
    let world = World::new().await;
    let mut origin = world.origin(&["http/1.1"]).await;
    let mut stream =
        secure(world.captured().await, world.guest_roots(), API, &["http/1.1"]).await.expect("a handshake");
    let request = format!(
        "POST / HTTP/1.1\r\nHost: {API}:{}\r\nTransfer-Encoding: chunked\r\nTrailer: Host, Authorization, X-Sum\r\n\r\n1\r\nx\r\n0\r\nHost: evil.example\r\nAuthorization: Bearer evil\r\nX-Sum: 1\r\n\r\n",
        origin.port
    );
    assert_eq!(ask(&mut stream, request).await.expect("an answer").status, 200);
    origin.wait_for(1).await;
    let seen = &origin.seen()[0];
    let trailers = seen.trailers.clone().unwrap_or_default();
    assert!(!trailers.contains_key("host") && !trailers.contains_key("authorization"), "{trailers:?}");
    assert_eq!(trailers.get("x-sum").expect("other trailers pass"), "1");
    assert_eq!(seen.values("authorization"), [format!("Bearer {VALUE}")]);
}

#[tokio::test]
async fn row_63_answers_of_malicious_servers_end_the_connection() {
    let long: &'static str =
        Box::leak(format!("HTTP/1.1 200 OK\r\nX-A: {}\r\n\r\n", "a".repeat(100 << 10)).into_boxed_str());
    let many: &'static str =
        Box::leak(format!("HTTP/1.1 200 OK\r\n{}\r\n", "X-A: a\r\n".repeat(200)).into_boxed_str());
    let answers: [&'static [u8]; 10] = [
        b"nonsense\r\n\r\n",
        b"HTTP/0.9 200 OK\r\n\r\n",
        b"<html>HTTP/0.9</html>",
        b"HTTP/1.1 200 OK\r\nX-A: a\0b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: xchunked\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: other\r\n\r\n",
        b"",
        long.as_bytes(),
        many.as_bytes(),
    ];
    for answer in answers {
        let mut world = World::new().await;
        let (certificate, key) = world.test_authority.certificate(&[API], |_| {});
        let origin = Origin::raw(certificate, key, answer).await;
        world.capture_port(origin.port);
        let mut stream = secure(world.captured().await, world.guest_roots(), API, &["http/1.1"])
            .await
            .expect("a handshake");
        let request = format!("GET / HTTP/1.1\r\nHost: {API}:{}\r\n\r\n", origin.port);
        let got = ask(&mut stream, request).await;
        let shown = String::from_utf8_lossy(&answer[..answer.len().min(60)]).into_owned();
        assert!(got.as_ref().is_none_or(|got| got.status == 502), "{shown:?}: {got:?}");
        let line = world.line().await;
        assert!(line.reason.is_some(), "{shown:?}: {line:?}");
        assert!(origin.bytes().windows(VALUE.len()).any(|window| window == VALUE.as_bytes()));
    }
}

#[tokio::test]
async fn row_63_a_body_that_is_cut_short_is_cut_for_the_guest_too() {
    let mut world = World::new().await;
    let (certificate, key) = world.test_authority.certificate(&[API], |_| {});
    let origin = Origin::raw(certificate, key, b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort").await;
    world.capture_port(origin.port);
    let mut stream =
        secure(world.captured().await, world.guest_roots(), API, &["http/1.1"]).await.expect("a handshake");
    let request = format!("GET / HTTP/1.1\r\nHost: {API}:{}\r\n\r\n", origin.port);
    stream.write_all(request.as_bytes()).await.expect("sent");
    let bytes = read_to_end(&mut stream).await;
    let text = String::from_utf8_lossy(&bytes);
    assert!(text.starts_with("HTTP/1.1 200") && text.ends_with("short"), "{text}");
    let line = world.line().await;
    assert_eq!(line.bytes_down, 5);
    assert!(line.reason.is_some(), "{line:?}");
}

#[tokio::test]
async fn row_63_more_bytes_than_announced_are_no_second_answer() {
    let mut world = World::new().await;
    let (certificate, key) = world.test_authority.certificate(&[API], |_| {});
    let answer =
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil";
    let origin = Origin::raw(certificate, key, answer).await;
    world.capture_port(origin.port);
    let mut stream =
        secure(world.captured().await, world.guest_roots(), API, &["http/1.1"]).await.expect("a handshake");
    let request = format!("GET / HTTP/1.1\r\nHost: {API}:{}\r\n\r\n", origin.port);
    assert_eq!(ask(&mut stream, &request).await.expect("an answer").body, "ok");
    let second = ask(&mut stream, &request).await;
    assert!(second.as_ref().is_none_or(|second| second.status == 502), "{second:?}");
    assert!(world.line().await.injected);
}

/// Whole requests to the intercepted host, `@` in place of its authority. Each may be refused or normalised.
const VECTORS: &[&str] = &[
    "GET / HTTP/1.1\nHost: @\n\n",
    "GET / HTTP/1.1\r\nHost: @\n\r\n",
    "\r\n\r\nGET / HTTP/1.1\r\nHost: @\r\n\r\n",
    "\n\nGET / HTTP/1.1\r\nHost: @\r\n\r\n",
    "GET  / HTTP/1.1\r\nHost: @\r\n\r\n",
    "GET /  HTTP/1.1\r\nHost: @\r\n\r\n",
    "GET\t/ HTTP/1.1\r\nHost: @\r\n\r\n",
    "GET / HTTP/1.1 \r\nHost: @\r\n\r\n",
    "GET / HTTP/1.2\r\nHost: @\r\n\r\n",
    "GET / HTTP/2.0\r\nHost: @\r\n\r\n",
    "GET / http/1.1\r\nHost: @\r\n\r\n",
    "GET /\r\nHost: @\r\n\r\n",
    "GET / HTTP/1.0\r\nHost: @\r\nConnection: keep-alive\r\n\r\n",
    "GET / HTTP/1.0\r\nHost: @\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "GET / HTTP/1.1\r\n Host: @\r\n\r\n",
    "GET / HTTP/1.1\r\nHost : @\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: @\r\nHost: @\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: @\0\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: \t@\t\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: @\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: @\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    "POST / HTTP/1.1\r\nHost: @\r\nContent-Length: 005\r\n\r\nhello",
    "POST / HTTP/1.1\r\nHost: @\r\nContent-Length: \t5 \r\n\r\nhello",
    "POST / HTTP/1.1\r\nHost: @\r\nContent-Length: 5\r\nTransfer-Encoding: identity\r\n\r\nhello",
    "POST / HTTP/1.1\r\nHost: @\r\nTransfer-Encoding: Chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: @\r\nTransfer-Encoding: \tchunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: @\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: @\r\nTransfer-Encoding: chunked, chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: @\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0;c\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: @\r\nTransfer-Encoding: chunked\r\n\r\n5;a=\"\nb\"\r\nhello\r\n0\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: @\r\nTransfer-Encoding: chunked\r\n\r\n0005\r\nhello\r\n00\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: @\r\nTransfer-Encoding: chunked\r\n\r\n5 \r\nhello\r\n0\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: @\r\nTransfer-Encoding: chunked\r\n\r\n5\nhello\n0\n\n",
    "POST / HTTP/1.1\r\nHost: @\r\nTransfer-Encoding: chunked\r\n\r\n0x5\r\nhello\r\n0\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: @\r\nConnection: Content-Length\r\nContent-Length: 5\r\n\r\nhello",
    "POST / HTTP/1.1\r\nHost: @\r\nConnection: Transfer-Encoding, Host\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: @\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\nhello",
    "GET / HTTP/1.1\r\nHost: @\r\nUpgrade: websocket\r\nConnection: upgrade\r\nContent-Length: 5\r\n\r\nhello",
    "HEAD / HTTP/1.1\r\nHost: @\r\nContent-Length: 5\r\n\r\nhello",
];

#[tokio::test]
async fn row_42_a_server_reads_no_request_that_was_not_checked() {
    let world = World::new().await;
    let origin = world.origin(&["http/1.1"]).await;
    let authority = format!("{API}:{}", origin.port);
    for vector in VECTORS {
        let before = origin.seen().len();
        let mut stream = secure(world.captured().await, world.guest_roots(), API, &["http/1.1"])
            .await
            .expect("a handshake");
        // If both sides framed the first request differently, the server would read this one, which names
        // another host and is refused otherwise.
        let smuggled = "GET /smuggled HTTP/1.1\r\nHost: evil.example\r\n\r\n";
        let _ = stream.write_all(format!("{}{smuggled}", vector.replace('@', &authority)).as_bytes()).await;
        let _ = stream.shutdown().await;
        read_to_end(&mut stream).await;
        let seen = origin.seen().split_off(before);
        assert!(seen.len() <= 1, "{vector:?}: {seen:?}");
        for seen in seen {
            assert_eq!(
                (seen.uri.as_str(), seen.values("host")),
                ("/", vec![authority.clone()]),
                "{vector:?}"
            );
            assert_eq!(seen.values("authorization"), [format!("Bearer {VALUE}")], "{vector:?}");
            let body = String::from_utf8_lossy(&seen.body).into_owned();
            assert!(body.is_empty() || body == "hello", "{vector:?}: {body}");
        }
    }
    // Those that every server reads in the same way do pass.
    assert!(origin.seen().len() > 10, "{}", origin.seen().len());
}
