//! Bounds on what a guest can make slow or many.

use stead_schemas::egress::{Decision, Reason};
use stead_schemas::limits::{EGRESS_CONNECTIONS_PER_GUEST_MAX, EGRESS_HANDSHAKES_PER_GUEST_MAX};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::client::{ask, read_to_end, secure};
use crate::origin::Origin;
use crate::world::{API, OTHER, World, bearer, connect_from, credential, uid};

/// Opens a tunnel that carries an unknown protocol, and waits until it does. Returns `None` when the proxy
/// closes the connection.
async fn tunnel(world: &World, origin: &Origin) -> Option<TcpStream> {
    let mut stream = world.explicit().await;
    let connect = format!("CONNECT {OTHER}:{0} HTTP/1.1\r\nHost: {OTHER}:{0}\r\n\r\n", origin.port);
    assert_eq!(ask(&mut stream, connect).await?.status, 200);
    stream.write_all(b"\x01").await.expect("sent");
    let mut byte = [0];
    stream.read_exact(&mut byte).await.expect("echoed");
    Some(stream)
}

#[tokio::test]
async fn row_29_a_guest_has_its_share_of_connections_and_another_guest_its_own() {
    let mut world = World::new().await;
    let origin = Origin::echo(b"").await;
    let mut held = Vec::new();
    while held.len() < EGRESS_CONNECTIONS_PER_GUEST_MAX {
        match tunnel(&world, &origin).await {
            Some(stream) => held.push(stream),
            // Connections above the rate of new ones are closed, and tried again.
            None => assert_eq!(world.line().await.reason, Some(Reason::TooManyHandshakes)),
        }
    }
    assert!(read_to_end(&mut world.explicit().await).await.is_empty(), "one more is closed");
    let line = world.line().await;
    assert_eq!((line.decision, line.reason), (Decision::Refused, Some(Reason::TooManyConnections)));
    let mut other = world.policy();
    (other.owner, other.address) = (uid('b'), "127.0.0.2".parse().expect("an address"));
    let (log, _lines) = stead_egress::AuditLog::new();
    world.proxy.policies().put(other, || log).expect("set");
    let mut stream = connect_from("127.0.0.2", world.explicit).await;
    let connect = format!("CONNECT {OTHER}:{0} HTTP/1.1\r\nHost: {OTHER}:{0}\r\n\r\n", origin.port);
    assert_eq!(ask(&mut stream, connect).await.expect("an answer").status, 200);
    // A connection that ends leaves room for another.
    drop(held.pop());
    world.line().await;
    // The permit comes back a moment after the line.
    while tunnel(&world, &origin).await.is_none() {}
}

#[tokio::test]
async fn a_guest_has_its_share_of_unfinished_handshakes() {
    let mut world = World::new().await;
    let mut held = Vec::new();
    for _ in 0..EGRESS_HANDSHAKES_PER_GUEST_MAX {
        held.push(world.captured().await);
    }
    assert!(read_to_end(&mut world.captured().await).await.is_empty(), "one more is closed");
    let line = world.line().await;
    assert_eq!((line.decision, line.reason), (Decision::Refused, Some(Reason::TooManyHandshakes)));
}

#[tokio::test(start_paused = true)]
async fn row_30_a_hello_that_comes_too_slowly_is_refused() {
    let mut world = World::new().await;
    let mut stream = world.captured().await;
    stream.write_all(&[22, 3, 1, 2, 0, 1]).await.expect("sent");
    // Nothing else happens, so that the paused clock goes on to the time limit.
    let answer = read_to_end(&mut stream).await;
    assert_eq!(answer.first(), Some(&21), "an alert");
    let line = world.line().await;
    assert_eq!((line.decision, line.reason), (Decision::Refused, Some(Reason::HelloTimeout)));
}

#[tokio::test(start_paused = true)]
async fn row_30_a_head_that_comes_too_slowly_is_refused() {
    let mut world = World::new().await;
    let mut stream = world.explicit().await;
    stream.write_all(b"GET http://other.example.org/ HTTP/1.1\r\nX-A: ").await.expect("sent");
    read_to_end(&mut stream).await;
    let line = world.line().await;
    assert_eq!((line.decision, line.reason), (Decision::Refused, Some(Reason::HeadTimeout)));
}

#[tokio::test]
async fn a_head_that_is_too_large_is_refused() {
    let mut world = World::new().await;
    for head in [
        format!("GET http://{OTHER}/ HTTP/1.1\r\nX-A: {}\r\n\r\n", "a".repeat(80 << 10)),
        format!("GET http://{OTHER}/ HTTP/1.1\r\n{}\r\n", "X-A: a\r\n".repeat(129)),
    ] {
        let mut stream = world.explicit().await;
        let answer = ask(&mut stream, head).await;
        assert!(answer.as_ref().is_none_or(|answer| answer.status >= 400), "{answer:?}");
        let line = world.line().await;
        assert_eq!((line.decision, line.reason), (Decision::Refused, Some(Reason::BadRequest)));
    }
}

#[tokio::test]
async fn row_88_a_name_that_does_not_exist_costs_no_certificate() {
    let mut world = World::new().await;
    let mut policy = world.policy();
    policy
        .credentials
        .insert("WILD".to_owned(), credential("another-value-2", vec![bearer(Some(&["*.wild.example"]))]));
    world.put(policy);
    let (certificate, key) = world.test_authority.certificate(&["*.wild.example"], |_| {});
    let origin = Origin::https(certificate, key, &["http/1.1"]).await;
    world.capture_port(origin.port);
    secure(world.captured().await, world.guest_roots(), "absent.wild.example", &[])
        .await
        .expect_err("no such name");
    let line = world.line().await;
    assert_eq!((line.decision, line.reason), (Decision::Allowed, Some(Reason::NameNotFound)));
    assert_eq!(origin.connections(), 0, "there is nobody to connect to");
    // The rate is tested where the leaves are made.
    world.names.set("present.wild.example", &["127.0.0.1"]);
    secure(world.captured().await, world.guest_roots(), "present.wild.example", &[])
        .await
        .expect("a handshake");
}

#[tokio::test]
async fn unused_intercepted_connections_take_no_permit_of_handshakes() {
    let mut world = World::new().await;
    let mut origin = world.origin(&["http/1.1"]).await;
    let mut held = Vec::new();
    for _ in 0..=EGRESS_HANDSHAKES_PER_GUEST_MAX {
        let stream = secure(world.captured().await, world.guest_roots(), API, &["http/1.1"]).await;
        held.push(stream.expect("a permit"));
    }
    let request = format!("GET / HTTP/1.1\r\nHost: {API}:{}\r\n\r\n", origin.port);
    assert_eq!(ask(&mut held[0], request).await.expect("an answer").status, 200);
    origin.wait_for(1).await;
    assert!(world.line().await.injected);
}
