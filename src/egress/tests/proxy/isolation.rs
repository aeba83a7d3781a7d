//! Guests beside each other.

use crate::client::{ask, secure};
use crate::world::{API, VALUE, World, bearer, connect_from, credential, uid};

#[tokio::test]
async fn row_70_guests_never_share_a_connection_a_value_or_an_authority() {
    let world = World::new().await;
    let mut origin = world.origin(&["http/1.1"]).await;
    let mut other = world.policy();
    (other.owner, other.address) = (uid('b'), "127.0.0.2".parse().expect("an address"));
    other.authority = stead_egress::generate_authority().expect("made");
    other.credentials.insert("KEY".to_owned(), credential("other-value-02", vec![bearer(Some(&[API]))]));
    let mut other_roots = rustls::RootCertStore::empty();
    let certificate =
        rustls::pki_types::pem::PemObject::from_pem_slice(other.authority.certificate.as_bytes());
    other_roots.add(certificate.expect("a certificate")).expect("added");
    let (log, mut lines) = stead_egress::AuditLog::new();
    world.proxy.policies().put(other, || log).expect("set");
    let request = format!("GET / HTTP/1.1\r\nHost: {API}:{}\r\n\r\n", origin.port);
    for (address, roots) in [("127.0.0.1", world.guest_roots()), ("127.0.0.2", other_roots)] {
        let stream = connect_from(address, world.captured).await;
        let mut stream = secure(stream, roots, API, &["http/1.1"]).await.expect("a handshake");
        for _ in 0..2 {
            assert_eq!(ask(&mut stream, &request).await.expect("an answer").status, 200);
        }
    }
    origin.wait_for(4).await;
    let values: Vec<String> = origin.seen().iter().flat_map(|seen| seen.values("authorization")).collect();
    let (own, others) = (format!("Bearer {VALUE}"), "Bearer other-value-02".to_owned());
    assert_eq!(values, [own.clone(), own, others.clone(), others]);
    assert_eq!(origin.connections(), 2);
    assert!(lines.next().await.expect("a line").injected);
    // The authority of one guest is worth nothing in the other.
    let stream = connect_from("127.0.0.2", world.captured).await;
    secure(stream, world.guest_roots(), API, &["http/1.1"]).await.expect_err("another authority");
}
