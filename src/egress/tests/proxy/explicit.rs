//! Clients that know the proxy.

use stead_schemas::egress::{Decision, Reason};

use crate::client::{ask, read_to_end, secure};
use crate::origin::Origin;
use crate::world::{API, OTHER, World, connect_from};

fn connect(target: &str) -> String {
    format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n")
}

#[tokio::test]
async fn row_18_addresses_of_this_host_are_refused_however_they_are_written() {
    let mut world = World::new().await;
    world.proxy.set_address_filter(stead_egress::AddressFilter::default());
    for name in ["localhost", "rebind.example"] {
        world.names.set(name, &["127.0.0.1", "::1"]);
    }
    world.names.set("metadata.example", &["169.254.169.254"]);
    let port = world.explicit.port();
    for (host, reason) in [
        ("127.0.0.1", Reason::AddressDenied),
        ("0.0.0.0", Reason::AddressDenied),
        ("[::1]", Reason::AddressDenied),
        ("[::]", Reason::AddressDenied),
        ("[::ffff:127.0.0.1]", Reason::AddressDenied),
        ("[64:ff9b::7f00:1]", Reason::AddressDenied),
        ("[2002:7f00:1::]", Reason::AddressDenied),
        ("169.254.169.254", Reason::AddressDenied),
        ("[fd00:ec2::254]", Reason::AddressDenied),
        ("100.100.100.200", Reason::AddressDenied),
        ("192.0.0.192", Reason::AddressDenied),
        ("10.0.0.1", Reason::AddressDenied),
        ("localhost", Reason::AddressDenied),
        ("localhost.", Reason::AddressDenied),
        ("LOCALHOST", Reason::AddressDenied),
        ("rebind.example", Reason::AddressDenied),
        ("metadata.example", Reason::AddressDenied),
        ("2130706433", Reason::BadHost),
        ("0x7f.1", Reason::BadHost),
        ("0x7f000001", Reason::BadHost),
        ("127.1", Reason::BadHost),
        ("0177.0.0.1", Reason::BadHost),
        ("127.0.0.1.", Reason::BadHost),
    ] {
        let answer =
            ask(&mut world.explicit().await, connect(&format!("{host}:{port}"))).await.expect("an answer");
        let line = world.line().await;
        assert_eq!((line.decision, line.reason), (Decision::Refused, Some(reason)), "{host}");
        let status = if reason == Reason::BadHost { 400 } else { 403 };
        assert_eq!(answer.status, status, "{host}");
        assert!(answer.body.contains(reason.as_str()), "{answer:?}");
        let plain = format!("GET http://{host}:{port}/ HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n");
        assert_eq!(
            ask(&mut world.explicit().await, plain).await.expect("an answer").status,
            status,
            "{host}"
        );
        assert_eq!(world.line().await.reason, Some(reason), "{host}");
    }
}

#[tokio::test]
async fn row_40_malformed_targets_of_connect_are_refused() {
    let mut world = World::new().await;
    let origin = Origin::echo(b"").await;
    for target in [
        OTHER,
        ":443",
        "other.example.org:",
        "other.example.org:0",
        "other.example.org:65536",
        "[::1]",
        "::1:443",
        "other.example.org:443/x",
        "a b:443",
        "other.example.org:443@evil:443",
        "user@other.example.org:443",
        "%6fther.example.org:443",
        "öther.example.org:443",
        "other.example.org:0443",
        "http://other.example.org:443",
        "*",
        "/",
    ] {
        let mut stream = world.explicit().await;
        let answer = ask(&mut stream, connect(target)).await;
        let status = answer.as_ref().map(|answer| answer.status);
        assert!(matches!(status, Some(400) | None), "{target}: {answer:?}");
        let line = world.line().await;
        assert_eq!(line.decision, Decision::Refused, "{target}");
        assert!(matches!(line.reason, Some(Reason::BadHost | Reason::BadRequest)), "{target}: {line:?}");
    }
    assert_eq!(origin.connections(), 0);
}

#[tokio::test]
async fn a_tunnel_of_connect_is_intercepted_for_a_host_of_a_credential() {
    let mut world = World::new().await;
    let mut origin = world.origin(&["http/1.1"]).await;
    let mut stream = world.explicit().await;
    let answer = ask(&mut stream, connect(&format!("{API}:{}", origin.port))).await.expect("an answer");
    assert_eq!(answer.status, 200);
    let mut stream = secure(stream, world.guest_roots(), API, &["http/1.1"]).await.expect("a handshake");
    let request = format!("GET /v1 HTTP/1.1\r\nHost: {API}:{}\r\n\r\n", origin.port);
    assert_eq!(ask(&mut stream, request).await.expect("an answer").status, 200);
    origin.wait_for(1).await;
    assert_eq!(origin.seen()[0].values("authorization"), [format!("Bearer {}", crate::world::VALUE)]);
    let line = world.line().await;
    assert!(line.injected && line.credentials == ["KEY"], "{line:?}");
    assert_eq!(line.port, Some(origin.port));
}

#[tokio::test]
async fn row_41_connect_within_an_intercepted_tunnel_is_refused() {
    let mut world = World::new().await;
    let origin = world.origin(&["http/1.1"]).await;
    let stream = world.captured().await;
    let mut stream = secure(stream, world.guest_roots(), API, &["http/1.1"]).await.expect("a handshake");
    let answer = ask(&mut stream, connect(&format!("{OTHER}:443"))).await.expect("an answer");
    assert_eq!(answer.status, 405);
    assert_eq!(world.line().await.reason, Some(Reason::MethodNotAllowed));
    assert!(origin.seen().is_empty());
}

#[tokio::test]
async fn row_80_a_connection_from_an_address_without_a_policy_is_closed() {
    let world = World::new().await;
    let origin = world.origin(&[]).await;
    for to in [world.explicit, world.captured] {
        let mut stream = connect_from("127.0.0.77", to).await;
        let answer = ask(&mut stream, connect(&format!("{OTHER}:{}", origin.port))).await;
        assert_eq!(answer, None);
        assert!(read_to_end(&mut stream).await.is_empty());
    }
    assert_eq!(origin.connections(), 0);
}

#[tokio::test]
async fn row_17_a_connection_to_the_listener_itself_is_refused() {
    let mut world = World::new().await;
    world.capture(world.captured);
    let mut stream = world.captured().await;
    assert!(read_to_end(&mut stream).await.is_empty());
    let line = world.line().await;
    assert_eq!((line.decision, line.reason), (Decision::Refused, Some(Reason::Loop)));
}

#[tokio::test]
async fn a_host_that_cannot_be_reached_is_a_bad_gateway() {
    let mut world = World::new().await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let port = listener.local_addr().expect("bound").port();
    drop(listener);
    for (host, reason) in [(OTHER, Reason::UpstreamUnreachable), ("absent.example", Reason::NameNotFound)] {
        let answer =
            ask(&mut world.explicit().await, connect(&format!("{host}:{port}"))).await.expect("an answer");
        assert_eq!(answer.status, 502);
        let line = world.line().await;
        assert_eq!((line.decision, line.reason), (Decision::Allowed, Some(reason)));
    }
}
