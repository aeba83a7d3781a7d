//! TLS that passes unread, and connections that cannot be named.

use stead_schemas::egress::{Decision, Reason, TlsUse};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::client::{ask, read_to_end, secure};
use crate::origin::Origin;
use crate::world::{API, OTHER, World};

/// Code of the alert `access_denied`.
const ACCESS_DENIED: u8 = 49;

fn get(host: &str) -> String {
    format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
}

#[tokio::test]
async fn row_32_the_named_host_is_connected_to_and_not_the_address_of_the_guest() {
    let mut world = World::new().await;
    let origin = world.origin(&["http/1.1"]).await;
    // The address of the captured connection leads nowhere; the name leads to the server. The client trusts
    // the server's own authority only, so TLS was not ended on the way.
    let roots = world.test_authority.roots();
    let mut stream = secure(world.captured().await, roots, OTHER, &["http/1.1"]).await.expect("a handshake");
    assert_eq!(ask(&mut stream, get(OTHER)).await.expect("an answer").status, 200);
    drop(stream);
    let line = world.line().await;
    assert_eq!((line.tls, line.decision, line.reason), (TlsUse::Passthrough, Decision::Allowed, None));
    assert_eq!(line.host.as_ref().map(ToString::to_string).as_deref(), Some(OTHER));
    assert_eq!(line.address.map(|address| address.to_string()).as_deref(), Some("127.0.0.1"));
    assert!(line.bytes_up > 200 && line.bytes_down > 200, "{line:?}");
    assert_eq!(origin.seen().len(), 1);
}

#[tokio::test]
async fn a_host_that_is_not_listed_is_refused_with_an_alert() {
    let mut world = World::new().await;
    let origin = world.origin(&[]).await;
    let mut policy = world.policy();
    policy.allow_hosts = Some(vec![API.parse().expect("a pattern")]);
    world.put(policy);
    let error =
        secure(world.captured().await, world.test_authority.roots(), OTHER, &[]).await.expect_err("refused");
    assert!(error.to_string().contains("AccessDenied"), "{error}");
    let line = world.line().await;
    assert_eq!((line.decision, line.reason), (Decision::Refused, Some(Reason::HostNotAllowed)));
    assert_eq!(origin.connections(), 0);
}

#[tokio::test]
async fn row_34_an_address_without_a_name_gets_no_credential_and_is_checked() {
    let mut world = World::new().await;
    let origin = world.origin(&[]).await;
    world.capture(([127, 0, 0, 1], origin.port).into());
    let roots = world.test_authority.roots();
    let mut stream = secure(world.captured().await, roots, "127.0.0.1", &[]).await.expect("a handshake");
    assert_eq!(ask(&mut stream, get("127.0.0.1")).await.expect("an answer").status, 200);
    drop(stream);
    let line = world.line().await;
    assert_eq!((line.tls, line.credentials.len()), (TlsUse::Passthrough, 0));
    assert!(origin.seen()[0].values("authorization").is_empty());
    // An address that is not for guests, and any address when hosts are listed.
    world.capture(([169, 254, 169, 254], 443).into());
    secure(world.captured().await, world.test_authority.roots(), "127.0.0.1", &[])
        .await
        .expect_err("refused");
    assert_eq!(world.line().await.reason, Some(Reason::AddressDenied));
    let mut policy = world.policy();
    policy.allow_hosts = Some(vec![OTHER.parse().expect("a pattern")]);
    world.put(policy);
    world.capture(([127, 0, 0, 1], origin.port).into());
    secure(world.captured().await, world.test_authority.roots(), "127.0.0.1", &[])
        .await
        .expect_err("refused");
    assert_eq!(world.line().await.reason, Some(Reason::HostNotAllowed));
    assert_eq!(origin.connections(), 1);
}

#[tokio::test]
async fn row_35_a_server_name_that_is_not_the_host_of_connect_is_refused() {
    let mut world = World::new().await;
    let origin = world.origin(&[]).await;
    let mut stream = world.explicit().await;
    let connect = format!("CONNECT {OTHER}:{0} HTTP/1.1\r\nHost: {OTHER}:{0}\r\n\r\n", origin.port);
    assert_eq!(ask(&mut stream, connect).await.expect("an answer").status, 200);
    let error = secure(stream, world.test_authority.roots(), API, &[]).await.expect_err("refused");
    assert!(
        error.to_string().contains("UnrecognisedName") || error.to_string().contains("UnrecognizedName"),
        "{error}"
    );
    let line = world.line().await;
    assert_eq!((line.decision, line.reason), (Decision::Refused, Some(Reason::NameMismatch)));
    assert!(origin.seen().is_empty());
}

/// Returns a ClientHello for the name, without the record header.
fn hello(name: &str) -> Vec<u8> {
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let roots = rustls::RootCertStore::empty();
    let config = builder.expect("versions").with_root_certificates(roots).with_no_client_auth();
    let name = rustls::pki_types::ServerName::try_from(name.to_owned()).expect("a name");
    let mut client = rustls::ClientConnection::new(config.into(), name).expect("made");
    let mut record = Vec::new();
    client.write_tls(&mut record).expect("written");
    record.split_off(5)
}

/// Splits a handshake message over records of this many bytes.
fn records(message: &[u8], size: usize) -> Vec<u8> {
    let record = |piece: &[u8]| {
        let length = u16::try_from(piece.len()).expect("small").to_be_bytes();
        [&[22, 3, 1][..], &length, piece].concat()
    };
    message.chunks(size).flat_map(record).collect()
}

/// Sends bytes over a captured connection, and returns the code of the alert that ends it, if any.
async fn alert(world: &World, bytes: &[u8]) -> Option<u8> {
    let mut stream = world.captured().await;
    let _ = stream.write_all(bytes).await;
    let answer = read_to_end(&mut stream).await;
    answer.strip_prefix(&[21, 3, 3, 0, 2, 2]).and_then(|rest| rest.first().copied())
}

#[tokio::test]
async fn row_36_a_hello_is_read_however_it_is_split_and_refused_when_it_is_malformed() {
    let mut world = World::new().await;
    let mut policy = world.policy();
    policy.allow_hosts = Some(vec![API.parse().expect("a pattern")]);
    world.put(policy);
    let message = hello(OTHER);
    for size in [1, 7, 200, 16_000] {
        assert_eq!(alert(&world, &records(&message, size)).await, Some(ACCESS_DENIED), "records of {size}");
        let line = world.line().await;
        assert_eq!(line.host.as_ref().map(ToString::to_string).as_deref(), Some(OTHER));
        assert_eq!(line.reason, Some(Reason::HostNotAllowed));
    }
    let upper = records(&hello(&OTHER.to_ascii_uppercase()), 16_000);
    assert_eq!(alert(&world, &upper).await, Some(ACCESS_DENIED));
    assert_eq!(world.line().await.host.map(|host| host.to_string()).as_deref(), Some(OTHER));
    // A message that announces 17 KiB and never ends.
    let large = [&[1, 0, 0x44, 0][..], &vec![0; 17 << 10]].concat();
    assert!(alert(&world, &records(&large, 4_000)).await.is_some());
    let reason = world.line().await.reason;
    assert!(matches!(reason, Some(Reason::HelloTooLarge | Reason::BadHello)), "{reason:?}");
    // A name with a NUL in the place of its first dot.
    let mut wrong = message.clone();
    let at =
        wrong.windows(OTHER.len()).position(|window| window == OTHER.as_bytes()).expect("it has the name");
    wrong[at + 5] = 0;
    assert!(alert(&world, &records(&wrong, 16_000)).await.is_some());
    assert_eq!(world.line().await.reason, Some(Reason::BadHello));
}

#[tokio::test]
async fn bytes_that_are_neither_http_nor_tls_are_refused_when_captured() {
    let mut world = World::new().await;
    let mut stream = world.captured().await;
    stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").await.expect("sent");
    assert!(read_to_end(&mut stream).await.is_empty());
    let line = world.line().await;
    assert_eq!((line.decision, line.reason), (Decision::Refused, Some(Reason::UnknownProtocol)));
}

#[tokio::test]
async fn row_69_an_unknown_protocol_passes_in_a_tunnel_to_an_allowed_host() {
    let mut world = World::new().await;
    let origin = Origin::echo(b"").await;
    let mut stream = world.explicit().await;
    let connect = format!("CONNECT {OTHER}:{0} HTTP/1.1\r\nHost: {OTHER}:{0}\r\n\r\n", origin.port);
    assert_eq!(ask(&mut stream, connect).await.expect("an answer").status, 200);
    stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").await.expect("sent");
    stream.shutdown().await.expect("ended");
    assert_eq!(read_to_end(&mut stream).await, b"SSH-2.0-OpenSSH_9.2\r\n");
    let line = world.line().await;
    assert_eq!((line.decision, line.reason), (Decision::Allowed, Some(Reason::Opaque)));
    assert_eq!((line.bytes_up, line.bytes_down), (21, 21));
    let mut policy = world.policy();
    policy.allow_hosts = Some(vec![API.parse().expect("a pattern")]);
    world.put(policy);
    let mut stream = world.explicit().await;
    let connect = format!("CONNECT {OTHER}:{0} HTTP/1.1\r\nHost: {OTHER}:{0}\r\n\r\n", origin.port);
    assert_eq!(ask(&mut stream, connect).await.expect("an answer").status, 403);
    assert_eq!(world.line().await.reason, Some(Reason::HostNotAllowed));
}

#[tokio::test]
async fn a_server_that_speaks_first_passes_at_once_in_a_tunnel() {
    let mut world = World::new().await;
    let origin = Origin::echo(b"220 ready\r\n").await;
    let mut stream = world.explicit().await;
    let connect = format!("CONNECT {OTHER}:{0} HTTP/1.1\r\nHost: {OTHER}:{0}\r\n\r\n", origin.port);
    assert_eq!(ask(&mut stream, connect).await.expect("an answer").status, 200);
    let mut greeting = [0; 11];
    stream.read_exact(&mut greeting).await.expect("a greeting");
    assert_eq!(&greeting, b"220 ready\r\n");
    stream.shutdown().await.expect("ended");
    assert!(read_to_end(&mut stream).await.is_empty());
    let line = world.line().await;
    assert_eq!((line.reason, line.bytes_up, line.bytes_down), (Some(Reason::Opaque), 0, 11));
}

#[tokio::test]
async fn row_36_a_hello_has_the_same_answer_captured_and_in_a_tunnel() {
    let mut world = World::new().await;
    let origin = Origin::echo(b"").await;
    world.capture_port(origin.port);
    let mut policy = world.policy();
    policy.allow_hosts = Some(vec![OTHER.parse().expect("a pattern")]);
    world.put(policy);
    let message = hello(&OTHER.to_ascii_uppercase());
    let mut truncated = message.clone();
    truncated.truncate(message.len() - 1);
    for bytes in
        [records(&message, 1), records(&message, 16_000), records(&truncated, 50), vec![22, 3, 1, 0, 0]]
    {
        let mut answers = Vec::new();
        for is_captured in [true, false] {
            let mut stream = if is_captured { world.captured().await } else { world.explicit().await };
            if !is_captured {
                let connect =
                    format!("CONNECT {OTHER}:{0} HTTP/1.1\r\nHost: {OTHER}:{0}\r\n\r\n", origin.port);
                assert_eq!(ask(&mut stream, connect).await.expect("an answer").status, 200);
            }
            let _ = stream.write_all(&bytes).await;
            let _ = stream.shutdown().await;
            // The server echoes a hello that passes.
            let answer = read_to_end(&mut stream).await;
            let line = world.line().await;
            answers.push((answer, line.decision, line.reason, line.tls));
        }
        assert_eq!(answers[0], answers[1]);
    }
}
