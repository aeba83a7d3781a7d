//! Credentials: who gets them, and what a guest can do to send them elsewhere.

use stead_schemas::egress::{Decision, Reason, TlsUse};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::client::{ask, field, read_answer, read_to_end, secure};
use crate::origin::Origin;
use crate::world::{API, OTHER, VALUE, World, bearer, credential};

/// Makes an intercepted connection of HTTP/1.
async fn intercepted(world: &World) -> TlsStream<TcpStream> {
    secure(world.captured().await, world.guest_roots(), API, &["http/1.1"]).await.expect("a handshake")
}

fn get(path: &str, port: u16, more: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: {API}:{port}\r\n{more}\r\n")
}

async fn world() -> (World, Origin) {
    let world = World::new().await;
    let origin = world.origin(&["http/1.1"]).await;
    (world, origin)
}

fn bearer_value() -> String {
    format!("Bearer {VALUE}")
}

#[tokio::test]
async fn a_credential_is_set_whether_or_not_the_guest_sends_its_placeholder() {
    let (mut world, mut origin) = world().await;
    let mut stream = intercepted(&world).await;
    for more in ["", "Authorization: Bearer mock-KEY\r\n", "Authorization: Basic eDp5\r\n"] {
        let answer = ask(&mut stream, get("/v1?q=1", origin.port, more)).await.expect("an answer");
        assert_eq!(answer.status, 200);
        assert!(!answer.head.contains(VALUE));
        let line = world.line().await;
        assert_eq!((line.tls, line.decision, line.reason), (TlsUse::Intercept, Decision::Allowed, None));
        assert!(line.injected && line.credentials == ["KEY"], "{line:?}");
        assert_eq!((line.path.as_deref(), line.status), (Some("/v1"), Some(200)));
    }
    origin.wait_for(3).await;
    for seen in origin.seen() {
        assert_eq!(seen.values("authorization"), [bearer_value()]);
        assert!(seen.values("via").is_empty() && seen.values("accept-encoding").is_empty());
    }
    assert_eq!(origin.connections(), 1, "requests of one connection stay on one connection");
}

#[tokio::test]
async fn a_listed_address_gets_its_credential() {
    let mut world = World::new().await;
    let mut origin = world.origin(&["http/1.1"]).await;
    let mut policy = world.policy();
    let inject = vec![bearer(Some(&["127.0.0.1"]))];
    policy.credentials.insert("KEY".to_owned(), credential(VALUE, inject));
    world.put(policy);
    world.capture(([127, 0, 0, 1], origin.port).into());
    let stream = secure(world.captured().await, world.guest_roots(), "127.0.0.1", &[]).await;
    let request = format!("GET / HTTP/1.1\r\nHost: 127.0.0.1:{}\r\n\r\n", origin.port);
    assert_eq!(ask(&mut stream.expect("a handshake"), request).await.expect("an answer").status, 200);
    origin.wait_for(1).await;
    assert_eq!(origin.seen()[0].values("authorization"), [bearer_value()]);
    assert!(world.line().await.injected);
}

#[tokio::test]
async fn rows_37_38_39_a_request_for_another_host_is_refused() {
    let (mut world, origin) = world().await;
    let port = origin.port;
    for (head, status) in [
        (format!("GET / HTTP/1.1\r\nHost: {OTHER}\r\n\r\n"), 421),
        (format!("GET / HTTP/1.1\r\nHost: {OTHER}:{port}\r\n\r\n"), 421),
        (format!("GET / HTTP/1.1\r\nHost: {API}:{}\r\n\r\n", port ^ 1), 421),
        (format!("GET https://{OTHER}/ HTTP/1.1\r\nHost: {API}:{port}\r\n\r\n"), 421),
        (format!("GET https://{OTHER}/ HTTP/1.1\r\nHost: {OTHER}\r\n\r\n"), 421),
        (format!("GET / HTTP/1.1\r\nHost: {API}\r\nHost: {API}\r\n\r\n"), 400),
        (format!("GET / HTTP/1.1\r\nHost: {API}\r\nHost: {OTHER}\r\n\r\n"), 400),
        (format!("GET / HTTP/1.1\r\nHost: user@{API}\r\n\r\n"), 400),
        (format!("GET / HTTP/1.1\r\nHost: {API} {OTHER}\r\n\r\n"), 400),
        (format!("GET / HTTP/1.1\r\nHost: {API},{OTHER}\r\n\r\n"), 400),
        (format!("GET / HTTP/1.1\r\nHost: {API}/\r\n\r\n"), 400),
        ("GET / HTTP/1.1\r\nHost:\r\n\r\n".to_owned(), 400),
        ("GET / HTTP/1.1\r\n\r\n".to_owned(), 400),
        ("GET / HTTP/1.0\r\n\r\n".to_owned(), 400),
        (format!("GET https://user@{API}:{port}/ HTTP/1.1\r\nHost: {API}:{port}\r\n\r\n"), 400),
        (format!("GET //{OTHER}/ HTTP/1.1\r\nHost: {API}:{port}\r\n\r\n"), 400),
        (format!("GET ftp://{API}:{port}/ HTTP/1.1\r\nHost: {API}:{port}\r\n\r\n"), 400),
    ] {
        let answer = ask(&mut intercepted(&world).await, &head).await.expect("an answer");
        assert_eq!(answer.status, status, "{head}");
        let line = world.line().await;
        assert!(matches!(line.decision, Decision::Refused) && !line.injected, "{head}: {line:?}");
        let expected: &[Reason] =
            if status == 421 { &[Reason::Misdirected] } else { &[Reason::BadHost, Reason::BadRequest] };
        assert!(line.reason.is_some_and(|reason| expected.contains(&reason)), "{head}: {line:?}");
    }
    assert!(origin.seen().is_empty());
}

#[tokio::test]
async fn an_absolute_uri_of_the_own_host_is_forwarded() {
    let (world, mut origin) = world().await;
    let head = format!("GET https://{API}:{0}/x HTTP/1.1\r\nHost: {API}:{0}\r\n\r\n", origin.port);
    assert_eq!(ask(&mut intercepted(&world).await, head).await.expect("an answer").status, 200);
    origin.wait_for(1).await;
    assert_eq!(origin.seen()[0].uri, "/x");
}

#[tokio::test]
async fn row_43_each_pipelined_request_is_checked() {
    let (mut world, mut origin) = world().await;
    let mut stream = intercepted(&world).await;
    let good = get("/", origin.port, "");
    let bad = format!("GET / HTTP/1.1\r\nHost: {OTHER}\r\n\r\n");
    let all = format!("{}{bad}{good}", good.repeat(50));
    let mut statuses = vec![ask(&mut stream, all).await.expect("an answer").status];
    for _ in 0..51 {
        statuses.push(read_answer(&mut stream).await.expect("an answer").status);
    }
    assert_eq!(statuses.iter().filter(|status| **status == 200).count(), 51);
    assert_eq!(statuses[50], 421);
    origin.wait_for(51).await;
    assert!(origin.seen().iter().all(|seen| seen.values("host") == [format!("{API}:{}", origin.port)]));
    for number in 0..52 {
        let expected = (number == 50).then_some(Reason::Misdirected);
        assert_eq!(world.line().await.reason, expected, "{number}");
    }
}

#[tokio::test]
async fn rows_44_45_the_server_gets_the_header_once_and_with_the_value() {
    let (world, mut origin) = world().await;
    let variants = [
        "Authorization: a\r\nAuthorization: b\r\n",
        "authorization: a\r\nAUTHORIZATION: b\r\nAuthorization: c, d\r\n",
        "Connection: Authorization\r\nAuthorization: a\r\n",
        "Connection: authorization, keep-alive\r\n",
        "Connection: keep-alive\r\nConnection: Authorization\r\nAuthorization: Bearer mock-KEY\r\n",
    ];
    for more in variants {
        let mut stream = intercepted(&world).await;
        assert_eq!(
            ask(&mut stream, get("/", origin.port, more)).await.expect("an answer").status,
            200,
            "{more}"
        );
    }
    origin.wait_for(variants.len()).await;
    for seen in origin.seen() {
        assert_eq!(seen.values("authorization"), [bearer_value()]);
        assert!(
            !seen
                .values("connection")
                .iter()
                .any(|value| value.to_ascii_lowercase().contains("authorization"))
        );
    }
    let odd = get("/", origin.port, "Authorization : a\r\n");
    assert_eq!(ask(&mut intercepted(&world).await, odd).await.expect("an answer").status, 400);
    assert_eq!(origin.seen().len(), variants.len());
}

#[tokio::test]
async fn row_52_a_placeholder_elsewhere_in_a_request_stays_a_placeholder() {
    let (mut world, mut origin) = world().await;
    let head = format!(
        "POST /a?key=mock-KEY HTTP/1.1\r\nHost: {API}:{}\r\nCookie: k=mock-KEY\r\nX-Key: mock-KEY\r\nContent-Length: 18\r\n\r\n{{\"key\":\"mock-KEY\"}}",
        origin.port
    );
    assert_eq!(ask(&mut intercepted(&world).await, head).await.expect("an answer").status, 200);
    origin.wait_for(1).await;
    let seen = &origin.seen()[0];
    assert_eq!(
        (seen.uri.as_str(), seen.body.as_slice()),
        ("/a?key=mock-KEY", &b"{\"key\":\"mock-KEY\"}"[..])
    );
    assert_eq!(
        (seen.values("cookie"), seen.values("x-key")),
        (vec!["k=mock-KEY".to_owned()], vec!["mock-KEY".to_owned()])
    );
    let fields =
        seen.headers.iter().filter(|(_, value)| String::from_utf8_lossy(value.as_bytes()).contains(VALUE));
    assert_eq!(fields.map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["authorization"]);
    assert_eq!(world.line().await.reason, None);
}

#[tokio::test]
async fn the_placeholder_of_another_credential_is_refused_on_an_intercepted_host() {
    let (mut world, origin) = world().await;
    let mut policy = world.policy();
    policy.credentials.insert("ELSE".to_owned(), credential("another-value-2", vec![bearer(Some(&[OTHER]))]));
    world.put(policy);
    let head = get("/", origin.port, "X-Key: mock-ELSE\r\n");
    assert_eq!(ask(&mut intercepted(&world).await, head).await.expect("an answer").status, 403);
    let line = world.line().await;
    assert_eq!((line.decision, line.reason), (Decision::Refused, Some(Reason::PlaceholderElsewhere)));
    assert!(origin.seen().is_empty());
}

#[tokio::test]
async fn rows_54_58_a_reflected_value_and_alternative_services_do_not_reach_the_guest() {
    let (world, origin) = world().await;
    let mut stream = intercepted(&world).await;
    let answer = ask(&mut stream, get("/reflect", origin.port, "")).await.expect("an answer");
    assert_eq!(field(&answer.head, "x-echo"), Some("Bearer mock-KEY"));
    let encoded = field(&answer.head, "x-echo64").expect("the field");
    assert!(encoded.contains("mock-KEY"), "{encoded}");
    let answer = ask(&mut stream, get("/alternative", origin.port, "")).await.expect("an answer");
    assert_eq!((answer.status, field(&answer.head, "alt-svc")), (200, None));
}

#[tokio::test]
async fn row_55_trace_is_refused_and_a_body_can_hand_a_value_back() {
    let (mut world, mut origin) = world().await;
    for method in ["TRACE", "TRACK", "trace"] {
        let head = format!("{method} / HTTP/1.1\r\nHost: {API}:{}\r\n\r\n", origin.port);
        assert_eq!(
            ask(&mut intercepted(&world).await, head).await.expect("an answer").status,
            405,
            "{method}"
        );
        assert_eq!(world.line().await.reason, Some(Reason::MethodNotAllowed));
    }
    assert!(origin.seen().is_empty());
    // The documented limit: a host that gets the value may put it into a body, here as the guest asked it to.
    let head = format!("POST / HTTP/1.1\r\nHost: {API}:{}\r\nContent-Length: 17\r\n\r\n{VALUE}", origin.port);
    let answer = ask(&mut intercepted(&world).await, head).await.expect("an answer");
    assert_eq!(answer.body, VALUE);
    origin.wait_for(1).await;
}

#[tokio::test]
async fn row_57_a_redirect_to_another_host_carries_no_value() {
    let (mut world, mut origin) = world().await;
    let answer =
        ask(&mut intercepted(&world).await, get("/redirect", origin.port, "")).await.expect("an answer");
    assert_eq!(
        (answer.status, field(&answer.head, "location")),
        (302, Some("https://other.example.org/next"))
    );
    assert!(world.line().await.injected);
    // The client follows, with the field that it sent itself.
    let roots = world.test_authority.roots();
    let mut stream = secure(world.captured().await, roots, OTHER, &[]).await.expect("a handshake");
    let head = format!(
        "GET /next HTTP/1.1\r\nHost: {OTHER}\r\nAuthorization: Bearer mock-KEY\r\nConnection: close\r\n\r\n"
    );
    assert_eq!(ask(&mut stream, head).await.expect("an answer").status, 200);
    read_to_end(&mut stream).await;
    drop(stream);
    origin.wait_for(2).await;
    assert_eq!(origin.seen()[1].values("authorization"), ["Bearer mock-KEY"]);
    assert_eq!(world.line().await.tls, TlsUse::Passthrough);
}
