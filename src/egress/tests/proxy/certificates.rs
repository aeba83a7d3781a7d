//! Certificates of servers, and guests that do not accept ours.

use std::sync::Arc;

use rcgen::{DistinguishedName, DnType, date_time_ymd};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use stead_schemas::egress::{Decision, Reason};
use tokio::net::TcpListener;

use crate::client::{ask, secure};
use crate::origin::Origin;
use crate::world::{API, OTHER, TestAuthority, World};

/// Connects through interception to a server with this certificate. Returns the reason of the audit line.
async fn reason_for(
    world: &mut World,
    certificate: (CertificateDer<'static>, PrivateKeyDer<'static>),
) -> Option<Reason> {
    let origin = Origin::https(certificate.0, certificate.1, &["http/1.1"]).await;
    world.capture_port(origin.port);
    let error =
        secure(world.captured().await, world.guest_roots(), API, &["http/1.1"]).await.expect_err("refused");
    assert!(error.to_string().contains("BadCertificate"), "{error}");
    assert!(origin.seen().is_empty());
    let line = world.line().await;
    assert_eq!((line.decision, line.injected), (Decision::Refused, false));
    line.reason
}

#[tokio::test]
async fn rows_61_62_a_server_without_a_valid_certificate_gets_no_request() {
    let mut world = World::new().await;
    let expired =
        world.test_authority.certificate(&[API], |params| params.not_after = date_time_ymd(2020, 1, 1));
    let later =
        world.test_authority.certificate(&[API], |params| params.not_before = date_time_ymd(2090, 1, 1));
    let foreign = TestAuthority::new().certificate(&[API], |_| {});
    let other = world.test_authority.certificate(&[OTHER], |_| {});
    let two_labels = world.test_authority.certificate(&["*.com"], |_| {});
    let base = world.test_authority.certificate(&["*.api.example.com"], |_| {});
    let name_only = world.test_authority.certificate(&[], |params| {
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, API);
    });
    for certificate in [expired, later, foreign, other, two_labels, base, name_only] {
        assert_eq!(reason_for(&mut world, certificate).await, Some(Reason::UpstreamCertificate));
    }
}

#[tokio::test]
async fn row_66_a_server_that_asks_for_a_client_certificate_is_named_in_the_audit_log() {
    let mut world = World::new().await;
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let (certificate, key) = world.test_authority.certificate(&[API], |_| {});
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let roots = Arc::new(world.test_authority.roots());
        let verifier =
            WebPkiClientVerifier::builder_with_provider(roots, provider.clone()).build().expect("built");
        let builder =
            rustls::ServerConfig::builder_with_provider(provider).with_protocol_versions(&[version]);
        let builder = builder.expect("versions").with_client_cert_verifier(verifier);
        let config = builder.with_single_cert(vec![certificate], key).expect("a certificate");
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        world.capture_port(listener.local_addr().expect("bound").port());
        let port = listener.local_addr().expect("bound").port();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.expect("a connection");
            acceptor.accept(stream).await.expect_err("the proxy has no certificate");
        });
        // With TLS 1.3 the server refuses only after the handshake of the proxy.
        if let Ok(mut stream) = secure(world.captured().await, world.guest_roots(), API, &["http/1.1"]).await
        {
            let request = format!("GET / HTTP/1.1\r\nHost: {API}:{port}\r\n\r\n");
            if let Some(answer) = ask(&mut stream, request).await {
                assert_eq!(answer.status, 502);
            }
        }
        let line = world.line().await;
        let reason = line.reason;
        assert!(
            matches!(reason, Some(Reason::ClientCertificate | Reason::UpstreamClosed)),
            "{version:?} {line:?}"
        );
    }
}

#[tokio::test]
async fn row_65_a_guest_that_does_not_trust_its_authority_is_named_in_the_audit_log() {
    let mut world = World::new().await;
    let origin = world.origin(&["http/1.1"]).await;
    secure(world.captured().await, world.test_authority.roots(), API, &["http/1.1"])
        .await
        .expect_err("not trusted");
    let line = world.line().await;
    assert_eq!((line.decision, line.reason), (Decision::Allowed, Some(Reason::GuestRefusedCertificate)));
    assert_eq!(
        (line.host.as_ref().map(ToString::to_string).as_deref(), line.credentials),
        (Some(API), vec!["KEY".to_owned()])
    );
    assert!(origin.seen().is_empty());
}

#[tokio::test]
async fn a_client_without_a_protocol_that_can_be_forwarded_is_refused() {
    let mut world = World::new().await;
    let _origin = world.origin(&["acme-tls/1"]).await;
    secure(world.captured().await, world.guest_roots(), API, &["acme-tls/1"]).await.expect_err("refused");
    assert_eq!(world.line().await.reason, Some(Reason::NoCommonProtocol));
}
