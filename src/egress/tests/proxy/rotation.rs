//! Changes of policies while connections live.

use std::collections::BTreeSet;

use stead_schemas::egress::{Decision, Reason};
use tokio::io::AsyncWriteExt;

use crate::client::{ask, read_to_end, secure};
use crate::origin::Origin;
use crate::world::{API, OTHER, VALUE, World, bearer, credential, uid};

const NEW_VALUE: &str = "n3w-value-0002";

#[tokio::test]
async fn row_77_requests_during_a_rotation_have_the_old_or_the_new_value() {
    let mut world = World::new().await;
    let mut origin = world.origin(&["http/1.1"]).await;
    let mut clients = tokio::task::JoinSet::new();
    let request = format!("GET / HTTP/1.1\r\nHost: {API}:{}\r\n\r\n", origin.port);
    for _ in 0..8 {
        let mut stream = secure(world.captured().await, world.guest_roots(), API, &["http/1.1"])
            .await
            .expect("a handshake");
        let request = request.clone();
        clients.spawn(async move {
            for _ in 0..25 {
                assert_eq!(ask(&mut stream, &request).await.expect("an answer").status, 200);
            }
            stream
        });
    }
    origin.wait_for(20).await;
    let mut policy = world.policy();
    policy.credentials.insert("KEY".to_owned(), credential(NEW_VALUE, vec![bearer(Some(&[API]))]));
    world.put(policy);
    let mut streams = clients.join_all().await;
    // A request that begins after the change has the new value, over a connection from before.
    let mut stream = streams.pop().expect("a connection");
    assert_eq!(ask(&mut stream, &request).await.expect("an answer").status, 200);
    origin.wait_for(201).await;
    let seen = origin.seen();
    let values: BTreeSet<Vec<String>> = seen.iter().map(|seen| seen.values("authorization")).collect();
    let (old, new) = (vec![format!("Bearer {VALUE}")], vec![format!("Bearer {NEW_VALUE}")]);
    assert!(values.iter().all(|value| *value == old || *value == new), "{values:?}");
    assert_eq!(seen.last().map(|seen| seen.values("authorization")), Some(new));
    for _ in 0..201 {
        assert_eq!(world.line().await.reason, None);
    }
}

#[tokio::test]
async fn a_tunnel_is_cut_when_its_host_is_no_longer_allowed() {
    let mut world = World::new().await;
    let origin = Origin::echo(b"").await;
    let mut stream = world.explicit().await;
    let connect = format!("CONNECT {OTHER}:{0} HTTP/1.1\r\nHost: {OTHER}:{0}\r\n\r\n", origin.port);
    assert_eq!(ask(&mut stream, connect).await.expect("an answer").status, 200);
    stream.write_all(b"\x01").await.expect("sent");
    let mut byte = [0];
    tokio::io::AsyncReadExt::read_exact(&mut stream, &mut byte).await.expect("echoed");
    let mut policy = world.policy();
    policy.allow_hosts = Some(vec![OTHER.parse().expect("a pattern"), API.parse().expect("a pattern")]);
    world.put(policy.clone());
    // Still allowed: the bytes pass.
    stream.write_all(b"\x02").await.expect("sent");
    tokio::io::AsyncReadExt::read_exact(&mut stream, &mut byte).await.expect("echoed");
    policy.allow_hosts = Some(vec![API.parse().expect("a pattern")]);
    world.put(policy);
    assert!(read_to_end(&mut stream).await.is_empty());
    let line = world.line().await;
    // The note that the protocol is unknown came first.
    assert_eq!((line.reason, line.bytes_up), (Some(Reason::PolicyChanged), 2));
}

#[tokio::test]
async fn an_intercepted_connection_is_cut_when_its_credential_goes() {
    let mut world = World::new().await;
    let origin = world.origin(&["http/1.1"]).await;
    let mut stream =
        secure(world.captured().await, world.guest_roots(), API, &["http/1.1"]).await.expect("a handshake");
    let request = format!("GET / HTTP/1.1\r\nHost: {API}:{}\r\n\r\n", origin.port);
    assert_eq!(ask(&mut stream, &request).await.expect("an answer").status, 200);
    assert!(world.line().await.injected);
    let mut policy = world.policy();
    policy.credentials.clear();
    world.put(policy);
    assert!(read_to_end(&mut stream).await.is_empty());
    let line = world.line().await;
    assert_eq!((line.decision, line.reason), (Decision::Refused, Some(Reason::PolicyChanged)));
    // The next connection is not intercepted any more.
    let mut stream =
        secure(world.captured().await, world.test_authority.roots(), API, &[]).await.expect("a handshake");
    assert_eq!(ask(&mut stream, &request).await.expect("an answer").status, 200);
    assert!(origin.seen()[1].values("authorization").is_empty());
}

#[tokio::test]
async fn a_tunnel_is_cut_when_its_host_gets_a_credential() {
    let world = World::new().await;
    let _origin = world.origin(&["http/1.1"]).await;
    let mut stream =
        secure(world.captured().await, world.test_authority.roots(), OTHER, &[]).await.expect("a handshake");
    let mut policy = world.policy();
    policy.credentials.insert("KEY".to_owned(), credential(VALUE, vec![bearer(Some(&[OTHER]))]));
    world.put(policy);
    assert!(read_to_end(&mut stream).await.is_empty());
    secure(world.captured().await, world.guest_roots(), OTHER, &[]).await.expect("it is intercepted now");
}

#[tokio::test]
async fn row_82_connections_end_when_their_instance_is_removed_and_its_address_is_given_on() {
    let mut world = World::new().await;
    let origin = world.origin(&["http/1.1"]).await;
    let request = format!("GET / HTTP/1.1\r\nHost: {API}:{}\r\n\r\n", origin.port);
    let mut intercepted =
        secure(world.captured().await, world.guest_roots(), API, &["http/1.1"]).await.expect("a handshake");
    assert_eq!(ask(&mut intercepted, &request).await.expect("an answer").status, 200);
    assert!(world.line().await.injected);
    let mut waiting = world.captured().await;
    let mut explicit = world.explicit().await;
    let plain = format!("GET http://{OTHER}:1/ HTTP/1.1\r\nHost: {OTHER}:1\r\n\r\n");
    // The answer shows that the connection is being served.
    assert_eq!(ask(&mut explicit, plain).await.expect("an answer").status, 502);
    let mut policy = world.policy();
    policy.owner = uid('b');
    policy.credentials.clear();
    let (log, lines) = stead_egress::AuditLog::new();
    world.proxy.policies().put(policy, || log).expect("set");
    assert!(read_to_end(&mut intercepted).await.is_empty());
    read_to_end(&mut waiting).await;
    assert!(read_to_end(&mut explicit).await.is_empty());
    world.proxy.policies().remove(&uid('b'));
    assert!(world.proxy.policies().list().is_empty());
    assert!(ask(&mut world.explicit().await, &request).await.is_none());
    drop(lines);
}
