//! Bodies that stream, and protocols that follow an upgrade.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::Request;
use hyper_util::rt::{TokioExecutor, TokioIo};
use stead_schemas::egress::TlsUse;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::client::{ask, field, read_to_end, secure};
use crate::world::{API, OTHER, VALUE, World};

#[tokio::test]
async fn each_event_arrives_before_the_next_is_sent_over_both_versions() {
    for protocol in ["http/1.1", "h2"] {
        let world = World::new().await;
        let origin = world.origin(&[protocol]).await;
        let stream =
            secure(world.captured().await, world.guest_roots(), API, &[protocol]).await.expect("a handshake");
        let uri = if protocol == "h2" {
            format!("https://{API}:{}/events", origin.port)
        } else {
            "/events".to_owned()
        };
        let request = Request::builder().uri(uri).header("accept", "text/event-stream");
        let response = if protocol == "h2" {
            let io = TokioIo::new(stream);
            let (mut sender, connection) =
                hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.expect("begun");
            tokio::spawn(connection);
            sender.send_request(request.body(Empty::<Bytes>::new()).expect("a request")).await
        } else {
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("begun");
            tokio::spawn(connection);
            let request = request.header("host", format!("{API}:{}", origin.port));
            sender.send_request(request.body(Empty::<Bytes>::new()).expect("a request")).await
        };
        let mut body = response.expect("an answer").into_body();
        for event in ["data: one\n\n", "data: two\n\n", "data: three\n\n"] {
            origin.events.send(event).await.expect("taken");
            let frame = body.frame().await.expect("a frame").expect("no error");
            assert_eq!(frame.into_data().expect("data"), event, "over {protocol}");
        }
        origin.events.send("end").await.expect("taken");
        assert!(
            body.frame()
                .await
                .is_none_or(|frame| frame.expect("no error").into_data().is_ok_and(|data| data.is_empty()))
        );
    }
}

#[tokio::test]
async fn trailers_of_http1_pass_and_are_masked() {
    let world = World::new().await;
    let origin = world.origin(&["http/1.1"]).await;
    let mut stream =
        secure(world.captured().await, world.guest_roots(), API, &["http/1.1"]).await.expect("a handshake");
    let request = format!(
        "GET /trailers HTTP/1.1\r\nHost: {API}:{}\r\nTE: trailers\r\nConnection: TE, close\r\n\r\n",
        origin.port
    );
    stream.write_all(request.as_bytes()).await.expect("sent");
    let answer = String::from_utf8(read_to_end(&mut stream).await).expect("text");
    let (_, trailers) = answer.split_once("\r\n0\r\n").expect("the last chunk");
    assert!(trailers.contains("grpc-status: 0\r\n"), "{answer}");
    assert!(trailers.contains("x-echo: Bearer mock-KEY\r\n"), "{answer}");
}

#[tokio::test]
async fn row_51_a_socket_is_a_tunnel_after_its_upgrade_and_nothing_is_injected_into_it() {
    let mut world = World::new().await;
    let mut origin = world.origin(&["http/1.1"]).await;
    let mut stream =
        secure(world.captured().await, world.guest_roots(), API, &["http/1.1"]).await.expect("a handshake");
    let request = format!(
        "GET /socket HTTP/1.1\r\nHost: {API}:{}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n",
        origin.port
    );
    let answer = ask(&mut stream, request).await.expect("an answer");
    assert_eq!((answer.status, field(&answer.head, "upgrade")), (101, Some("websocket")));
    origin.wait_for(1).await;
    let seen = &origin.seen()[0];
    assert_eq!(seen.values("authorization"), [format!("Bearer {VALUE}")]);
    assert_eq!(seen.values("sec-websocket-version"), ["13"]);
    // The server echoes; HTTP within the tunnel is bytes like any other.
    let inner = format!("GET / HTTP/1.1\r\nHost: {API}\r\nAuthorization: Bearer mock-KEY\r\n\r\n");
    stream.write_all(inner.as_bytes()).await.expect("sent");
    let mut echoed = vec![0; inner.len()];
    stream.read_exact(&mut echoed).await.expect("echoed");
    assert_eq!(echoed, inner.as_bytes());
    stream.shutdown().await.expect("ended");
    assert!(read_to_end(&mut stream).await.is_empty());
    let line = world.line().await;
    let length = u64::try_from(inner.len()).expect("small");
    assert_eq!((line.status, line.bytes_up, line.bytes_down), (Some(101), length, length));
    assert_eq!((line.tls, line.injected), (TlsUse::Intercept, true));
    assert_eq!(origin.seen().len(), 1);
}

#[tokio::test]
async fn a_large_upload_and_download_pass_whole() {
    let mut world = World::new().await;
    let origin = world.origin(&["http/1.1"]).await;
    let mut stream =
        secure(world.captured().await, world.guest_roots(), API, &["http/1.1"]).await.expect("a handshake");
    let body: String =
        (0..400_000u32).map(|number| char::from(b'a' + number.to_le_bytes()[0] % 26)).collect();
    let request = format!(
        "POST / HTTP/1.1\r\nHost: {API}:{}\r\nContent-Length: {}\r\n\r\n{body}",
        origin.port,
        body.len()
    );
    let answer = ask(&mut stream, request).await.expect("an answer");
    assert!(answer.status == 200 && answer.body == body, "{} bytes", answer.body.len());
    let line = world.line().await;
    assert_eq!((line.bytes_up, line.bytes_down), (400_000, 400_000));
}

#[tokio::test]
async fn row_64_a_guest_that_reads_nothing_stops_the_server() {
    let world = World::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let port = listener.local_addr().expect("bound").port();
    let sent = Arc::new(AtomicUsize::new(0));
    let counter = sent.clone();
    let (finished, mut stalled) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("a connection");
        let block = vec![7; 64 << 10];
        // Until the proxy ends the connection.
        while let Ok(length) = stream.write(&block).await {
            counter.fetch_add(length, Ordering::Relaxed);
        }
        let _ = finished.send(());
    });
    let mut stream = world.explicit().await;
    let connect = format!("CONNECT {OTHER}:{port} HTTP/1.1\r\nHost: {OTHER}:{port}\r\n\r\n");
    assert_eq!(ask(&mut stream, connect).await.expect("an answer").status, 200);
    stream.write_all(b"\x01").await.expect("sent");
    // What is not read stays in the buffers of the two sockets and of the tunnel; when the count stands still
    // over many turns of the scheduler, the server is stopped.
    let mut before = usize::MAX;
    let mut quiet = 0;
    while quiet < 2_000 {
        tokio::task::yield_now().await;
        let now = sent.load(Ordering::Relaxed);
        quiet = if now == before && now > 0 { quiet + 1 } else { 0 };
        before = now;
    }
    assert!(stalled.try_recv().is_err(), "the server is still writing");
    assert!(before < 64 << 20, "{before} bytes");
    let mut block = vec![0; 1 << 20];
    let mut read = 0;
    while read <= before {
        read += stream.read(&mut block).await.expect("read");
    }
    assert!(sent.load(Ordering::Relaxed) > before, "the server goes on when the guest reads");
    drop(stream);
    let _ = stalled.await;
}
