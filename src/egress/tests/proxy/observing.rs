//! Policies that only observe.

use stead_schemas::egress::{Decision, Reason, TlsUse};

use crate::client::{ask, secure};
use crate::origin::Origin;
use crate::world::{API, OTHER, World};

#[tokio::test]
async fn an_observing_policy_lets_everything_pass_and_notes_what_it_would_refuse() {
    let mut world = World::new().await;
    let mut policy = world.policy();
    policy.is_observing = true;
    policy.allow_hosts = Some(vec![API.parse().expect("a pattern")]);
    world.put(policy);
    let origin = world.origin(&["http/1.1"]).await;
    for (host, decision, reason) in
        [(API, Decision::Allowed, None), (OTHER, Decision::Observed, Some(Reason::HostNotAllowed))]
    {
        let roots = world.test_authority.roots();
        let mut stream =
            secure(world.captured().await, roots, host, &["http/1.1"]).await.expect("not intercepted");
        let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        assert_eq!(ask(&mut stream, request).await.expect("an answer").status, 200);
        drop(stream);
        let line = world.line().await;
        assert_eq!((line.tls, line.decision, line.reason), (TlsUse::Passthrough, decision, reason));
        assert_eq!((line.credentials.len(), line.injected), (usize::from(host == API), false));
    }
    assert!(origin.seen().iter().all(|seen| seen.values("authorization").is_empty()));
    let mut plain = Origin::http().await;
    let head = format!(
        "GET http://{OTHER}:{0}/ HTTP/1.1\r\nHost: {OTHER}:{0}\r\nX-Key: mock-KEY\r\n\r\n",
        plain.port
    );
    assert_eq!(ask(&mut world.explicit().await, head).await.expect("an answer").status, 200);
    plain.wait_for(1).await;
    let line = world.line().await;
    assert_eq!((line.decision, line.reason), (Decision::Observed, Some(Reason::PlaceholderElsewhere)));
}

#[tokio::test]
async fn an_observing_policy_reaches_no_address_that_is_not_for_guests() {
    let mut world = World::new().await;
    let mut policy = world.policy();
    policy.is_observing = true;
    world.put(policy);
    world.names.set("metadata.example", &["169.254.169.254"]);
    let connect = "CONNECT metadata.example:80 HTTP/1.1\r\nHost: metadata.example:80\r\n\r\n";
    assert_eq!(ask(&mut world.explicit().await, connect).await.expect("an answer").status, 403);
    assert_eq!(world.line().await.reason, Some(Reason::AddressDenied));
}
