//! Secrets and the log of the process.

use std::fmt::{Debug, Write};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http_body_util::Full;
use hyper::Request;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use crate::client::{ask, http2, secure};
use crate::origin::Origin;
use crate::world::{API, OTHER, TestAuthority, VALUE, World};

/// A subscriber that keeps everything at every level, also of other crates.
#[derive(Clone, Default)]
struct Everything(Arc<Mutex<String>>);

struct Fields<'a>(&'a mut String);

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        writeln!(self.0, "{}={value:?}", field.name()).expect("text grows");
    }
}

impl Subscriber for Everything {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, span: &Attributes<'_>) -> Id {
        span.record(&mut Fields(&mut self.0.lock().expect("not poisoned")));
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, values: &Record<'_>) {
        values.record(&mut Fields(&mut self.0.lock().expect("not poisoned")));
    }
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &Event<'_>) {
        event.record(&mut Fields(&mut self.0.lock().expect("not poisoned")));
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

#[tokio::test]
async fn row_56_neither_a_value_nor_a_key_is_logged_at_any_level() {
    let log = Everything::default();
    let guard = tracing::subscriber::set_default(log.clone());
    let world = World::new().await;
    let mut origin = world.origin(&["h2", "http/1.1"]).await;
    let mut stream =
        secure(world.captured().await, world.guest_roots(), API, &["http/1.1"]).await.expect("a handshake");
    for path in ["/", "/reflect"] {
        let request = format!("GET {path} HTTP/1.1\r\nHost: {API}:{}\r\n\r\n", origin.port);
        assert_eq!(ask(&mut stream, request).await.expect("an answer").status, 200);
    }
    let misdirected = format!("GET / HTTP/1.1\r\nHost: {OTHER}\r\n\r\n");
    assert_eq!(ask(&mut stream, misdirected).await.expect("an answer").status, 421);
    let seen_by_server =
        |origin: &Origin| origin.seen().iter().all(|seen| !seen.values("authorization").is_empty());
    let stream =
        secure(world.captured().await, world.guest_roots(), API, &["h2"]).await.expect("a handshake");
    let mut sender = http2(stream).await;
    let uri = format!("https://{API}:{}/", origin.port);
    let request = Request::builder().uri(uri).body(Full::<Bytes>::default()).expect("a request");
    assert_eq!(sender.send_request(request).await.expect("an answer").status(), 200);
    origin.wait_for(3).await;
    assert!(seen_by_server(&origin));
    // Failures are logged with their causes.
    let (certificate, key) = TestAuthority::new().certificate(&[API], |_| {});
    let foreign = Origin::https(certificate, key, &["http/1.1"]).await;
    world.capture_port(foreign.port);
    secure(world.captured().await, world.guest_roots(), API, &["http/1.1"]).await.expect_err("refused");
    let (certificate, key) = world.test_authority.certificate(&[API], |_| {});
    let broken = Origin::raw(certificate, key, b"nonsense\r\n\r\n").await;
    world.capture_port(broken.port);
    let mut stream =
        secure(world.captured().await, world.guest_roots(), API, &["http/1.1"]).await.expect("a handshake");
    let request = format!("GET / HTTP/1.1\r\nHost: {API}:{}\r\n\r\n", broken.port);
    assert_eq!(ask(&mut stream, request).await.expect("an answer").status, 502);
    drop(guard);
    let text = log.0.lock().expect("not poisoned").clone();
    assert!(text.contains("a handshake with a server failed"), "the log was not kept");
    assert!(!text.contains(VALUE), "the value was logged");
    let key = world.authority.key.0.lines().nth(1).expect("a key").to_owned();
    assert!(!text.contains(&key), "the key was logged");
    assert!(!format!("{:?}", world.policy()).contains(VALUE));
}
