//! Connections of guests through the process.

use stead_schemas::egress::{ControlReply, ControlRequest, Decision, Reason};
use tokio::io::AsyncReadExt;

use crate::clients::{request, secure};
use crate::servers::Server;
use crate::world::{API, GUEST, OTHER_GUEST, World, connect_from, patiently, uid};

const LOOPBACK: &[&str] = &["127.0.0.0/8"];

#[tokio::test]
async fn captured_and_explicit_connections_are_carried_for_guests_with_a_policy_only() {
    let world = World::new(LOOPBACK).await;
    let log = world.put(world.policy('a', GUEST)).await;
    let server = Server::http().await;
    world.capture(server.port);
    let captured = format!("GET /captured HTTP/1.1\r\nHost: {API}:{}\r\n\r\n", server.port);
    let explicit = format!("GET http://{API}:{0}/explicit HTTP/1.1\r\nHost: {API}:{0}\r\n\r\n", server.port);
    for (listener, text) in [(world.captured, &captured), (world.explicit, &explicit)] {
        let mut stream = connect_from(GUEST, listener).await;
        assert_eq!(request(&mut stream, text).await.0, 200);
        let mut stream = connect_from(OTHER_GUEST, listener).await;
        assert_eq!(request(&mut stream, text).await.0, 0, "an address without a policy");
    }
    assert_eq!(server.heads().len(), 2);
    for path in ["/captured", "/explicit"] {
        let line = log.line(|line| line.path.as_deref() == Some(path)).await;
        assert_eq!((line.decision, line.status), (Decision::Allowed, Some(200)));
    }
}

#[tokio::test]
async fn a_second_policy_rotates_a_value_on_a_connection_that_is_open() {
    let world = World::new(LOOPBACK).await;
    world.put(world.injecting("s3cret-value-0001", "1")).await;
    let server = Server::https(&world.servers, API).await;
    world.capture(server.port);
    let stream = connect_from(GUEST, world.captured).await;
    let mut stream = secure(stream, world.guest_roots(), API).await;
    let text = format!("GET / HTTP/1.1\r\nHost: {API}:{}\r\n\r\n", server.port);
    assert_eq!(request(&mut stream, &text).await.0, 200);
    let put = ControlRequest::Put(Box::new(world.injecting("s3cret-value-0002", "2")));
    assert_eq!(world.ask(put).await, ControlReply::Done);
    assert_eq!(request(&mut stream, &text).await.0, 200);
    let heads = server.heads();
    assert_eq!(heads.len(), 2);
    assert!(heads[0].contains("Bearer s3cret-value-0001"), "{}", heads[0]);
    assert!(heads[1].contains("Bearer s3cret-value-0002"), "{}", heads[1]);
}

#[tokio::test]
async fn the_removal_of_a_policy_cuts_connections_of_its_guest_and_of_no_other() {
    let world = World::new(LOOPBACK).await;
    world.put(world.policy('a', GUEST)).await;
    world.put(world.policy('b', OTHER_GUEST)).await;
    let server = Server::http().await;
    let connect = format!("CONNECT {API}:{0} HTTP/1.1\r\nHost: {API}:{0}\r\n\r\n", server.port);
    let mut tunnel = connect_from(GUEST, world.explicit).await;
    let mut other = connect_from(OTHER_GUEST, world.explicit).await;
    for stream in [&mut tunnel, &mut other] {
        assert_eq!(request(stream, &connect).await.0, 200);
    }
    assert_eq!(world.ask(ControlRequest::Remove(uid('a'))).await, ControlReply::Done);
    let mut rest = Vec::new();
    // A connection that is reset has ended too.
    let _ = patiently(tunnel.read_to_end(&mut rest)).await;
    let text = format!("GET / HTTP/1.1\r\nHost: {API}:{}\r\n\r\n", server.port);
    assert_eq!(request(&mut other, &text).await.0, 200);
    let mut later = connect_from(GUEST, world.explicit).await;
    assert_eq!(request(&mut later, &connect).await.0, 0, "it has no policy");
}

#[tokio::test]
async fn rows_17_and_18_the_process_and_this_host_are_out_of_reach() {
    let world = World::new(LOOPBACK).await;
    let log = world.put(world.policy('a', GUEST)).await;
    // The network of these sockets is open, but they are the process's own.
    for own in [world.captured, world.explicit, world.names] {
        let mut stream = connect_from(GUEST, world.explicit).await;
        let connect = format!("CONNECT {own} HTTP/1.1\r\nHost: {own}\r\n\r\n");
        let (status, text) = request(&mut stream, &connect).await;
        assert!(status == 403 && text.contains("loop"), "{own}: {text}");
        let line = log.line(|line| line.port == Some(own.port())).await;
        assert_eq!((line.decision, line.reason), (Decision::Refused, Some(Reason::Loop)));
    }
    let closed = World::new(&[]).await;
    let log = closed.put(closed.policy('a', GUEST)).await;
    let server = Server::http().await;
    for host in ["127.0.0.1", API, "localhost", "0.0.0.0", "169.254.169.254", "[::1]", "[::ffff:127.0.0.1]"] {
        let mut stream = connect_from(GUEST, closed.explicit).await;
        let connect = format!("CONNECT {host}:{0} HTTP/1.1\r\nHost: {host}:{0}\r\n\r\n", server.port);
        let (status, text) = request(&mut stream, &connect).await;
        assert!(status == 403 && text.contains("address_denied"), "{host}: {text}");
    }
    let line = log.line(|line| line.reason == Some(Reason::AddressDenied) && line.conn > 0).await;
    assert_eq!(line.decision, Decision::Refused);
    assert!(server.heads().is_empty());
}
