//! HTTP that is not encrypted.

use stead_schemas::egress::{Decision, Reason, TlsUse};

use crate::client::ask;
use crate::origin::Origin;
use crate::world::{API, OTHER, World};

#[tokio::test]
async fn a_captured_request_is_forwarded_to_the_host_that_it_names() {
    let mut world = World::new().await;
    let mut origin = Origin::http().await;
    world.capture_port(origin.port);
    let mut stream = world.captured().await;
    let host = format!("{OTHER}:{}", origin.port);
    let request =
        format!("POST /a?b=c HTTP/1.1\r\nHost: {host}\r\nX-Kept: 1\r\nContent-Length: 4\r\n\r\nbody");
    let answer = ask(&mut stream, request).await.expect("an answer");
    assert_eq!((answer.status, answer.body.as_str()), (200, "body"));
    origin.wait_for(1).await;
    let seen = &origin.seen()[0];
    assert_eq!(
        (seen.method.as_str(), seen.uri.as_str(), seen.values("host")),
        ("POST", "/a?b=c", vec![host])
    );
    assert_eq!(seen.values("x-kept"), ["1"]);
    assert!(seen.values("via").is_empty() && seen.values("x-forwarded-for").is_empty());
    let line = world.line().await;
    assert_eq!((line.tls, line.status, line.path.as_deref()), (TlsUse::None, Some(200), Some("/a")));
    assert_eq!((line.bytes_up, line.bytes_down, line.reason), (4, 4, None));
    assert_eq!((line.method.as_deref(), line.version.as_deref()), (Some("POST"), Some("1.1")));
}

#[tokio::test]
async fn a_credential_is_never_injected_without_tls() {
    let mut world = World::new().await;
    let mut origin = Origin::http().await;
    let mut stream = world.explicit().await;
    let host = format!("{API}:{}", origin.port);
    let request =
        format!("GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer mock-KEY\r\n\r\n");
    assert_eq!(ask(&mut stream, request).await.expect("an answer").status, 200);
    origin.wait_for(1).await;
    assert_eq!(origin.seen()[0].values("authorization"), ["Bearer mock-KEY"]);
    let line = world.line().await;
    assert_eq!((line.injected, line.reason), (false, Some(Reason::CredentialNeedsTls)));
}

#[tokio::test]
async fn row_53_a_placeholder_to_another_host_is_refused_and_not_forwarded() {
    let mut world = World::new().await;
    let mut origin = Origin::http().await;
    let host = format!("{OTHER}:{}", origin.port);
    for head in [
        format!("GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer mock-KEY\r\n\r\n"),
        format!("GET http://{host}/?key=mock-KEY HTTP/1.1\r\nHost: {host}\r\n\r\n"),
        format!("GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\nCookie: a=mock-KEY; b=c\r\n\r\n"),
        // Basic of `user:mock-KEY`.
        format!(
            "GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\nAuthorization: Basic dXNlcjptb2NrLUtFWQ==\r\n\r\n"
        ),
    ] {
        let answer = ask(&mut world.explicit().await, &head).await.expect("an answer");
        assert_eq!(answer.status, 403, "{head}");
        let line = world.line().await;
        assert_eq!((line.decision, line.reason), (Decision::Refused, Some(Reason::PlaceholderElsewhere)));
    }
    assert!(origin.seen().is_empty());
    let other =
        format!("GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer mock-KEYS\r\n\r\n");
    assert_eq!(ask(&mut world.explicit().await, other).await.expect("an answer").status, 200);
    origin.wait_for(1).await;
}

#[tokio::test]
async fn a_kept_connection_of_a_client_leads_to_several_hosts() {
    let mut world = World::new().await;
    let (mut one, mut other) = (Origin::http().await, Origin::http().await);
    let mut stream = world.explicit().await;
    for port in [one.port, other.port, one.port] {
        let request = format!("GET http://{OTHER}:{port}/ HTTP/1.1\r\nHost: {OTHER}:{port}\r\n\r\n");
        assert_eq!(ask(&mut stream, request).await.expect("an answer").status, 200);
        assert_eq!(world.line().await.port, Some(port));
    }
    one.wait_for(2).await;
    other.wait_for(1).await;
}

#[tokio::test]
async fn row_49_prior_knowledge_of_http2_and_its_upgrade_are_refused() {
    let mut world = World::new().await;
    let origin = Origin::http().await;
    world.capture_port(origin.port);
    let preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\u{4}\0\0\0\0\0";
    let answer = ask(&mut world.captured().await, preface).await;
    assert!(answer.is_none_or(|answer| answer.status >= 400));
    assert_eq!(world.line().await.reason, Some(Reason::BadRequest));
    let host = format!("{OTHER}:{}", origin.port);
    let upgrade = format!(
        "GET / HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n"
    );
    assert_eq!(ask(&mut world.captured().await, upgrade).await.expect("an answer").status, 400);
    assert_eq!(world.line().await.reason, Some(Reason::UpgradeNotAllowed));
    assert!(origin.seen().is_empty());
}
