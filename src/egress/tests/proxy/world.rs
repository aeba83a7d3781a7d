//! A proxy with one or two guests, one server, and the audit logs.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use stead_egress::{
    AddressFilter, Addresses, AuditLines, AuditLog, Destinations, Names, NamesError, Proxy, ProxyConfig,
    generate_authority, serve_captured, serve_explicit,
};
use stead_schemas::addresses::AddressRules;
use stead_schemas::egress::{
    AuditLine, CertificateAuthority, EgressMode, HostName, Injection, Policy, PolicyCredential, Target,
};
use stead_schemas::instance::Secret;
use stead_schemas::names::Uid;
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use crate::origin::Origin;

/// The value of the credential of most tests. It must reach the server and nothing else.
pub(crate) const VALUE: &str = "s3cret-value-0001";
/// The host of the credential of most tests.
pub(crate) const API: &str = "api.example.com";
/// A host without a credential.
pub(crate) const OTHER: &str = "other.example.org";

/// A certificate authority of servers.
pub(crate) struct TestAuthority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
}

impl TestAuthority {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().expect("made");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key).expect("made").der().clone();
        Self { issuer: Issuer::new(params, key), certificate }
    }

    pub(crate) fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone()).expect("added");
        roots
    }

    /// Returns a certificate for the names; `change` changes its parameters.
    pub(crate) fn certificate(
        &self,
        names: &[&str],
        change: impl FnOnce(&mut CertificateParams),
    ) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate().expect("made");
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("names");
        change(&mut params);
        let certificate = params.signed_by(&key, &self.issuer).expect("made").der().clone();
        (certificate, PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())))
    }
}

/// A table of names; a name that is absent does not exist.
#[derive(Default)]
pub(crate) struct Table(Mutex<BTreeMap<String, Vec<IpAddr>>>);

impl Table {
    pub(crate) fn set(&self, name: &str, addresses: &[&str]) {
        let addresses = addresses.iter().map(|text| text.parse().expect("an address")).collect();
        self.0.lock().expect("not poisoned").insert(name.to_owned(), addresses);
    }
}

impl Names for Table {
    fn resolve<'a>(&'a self, _: IpAddr, name: &'a HostName) -> Addresses<'a> {
        let found = self.0.lock().expect("not poisoned").get(name.as_str()).cloned();
        Box::pin(async move { found.ok_or(NamesError::NotFound) })
    }
}

/// The destination that all captured connections were made to.
struct Original(Mutex<SocketAddr>);

impl Destinations for Original {
    fn original(&self, _: &TcpStream) -> io::Result<SocketAddr> {
        Ok(*self.0.lock().expect("not poisoned"))
    }
}

/// A proxy with its listeners, the names that it resolves, and the authorities of a test.
pub(crate) struct World {
    pub(crate) proxy: Arc<Proxy>,
    pub(crate) names: Arc<Table>,
    pub(crate) authority: CertificateAuthority,
    pub(crate) test_authority: TestAuthority,
    pub(crate) captured: SocketAddr,
    pub(crate) explicit: SocketAddr,
    pub(crate) lines: AuditLines,
    original: Arc<Original>,
}

/// Returns an id that begins with this letter.
pub(crate) fn uid(letter: char) -> Uid {
    format!("{letter}{:023}", 0).parse().expect("a uid")
}

/// Returns an injection of a bearer token.
pub(crate) fn bearer(hosts: Option<&[&str]>) -> Injection {
    let hosts = hosts.map(|hosts| hosts.iter().map(|host| host.parse().expect("a pattern")).collect());
    let (header, format) =
        ("authorization".parse().expect("a header"), "Bearer ${value}".parse().expect("a format"));
    Injection { hosts, target: Target { header, format } }
}

/// Returns a credential.
pub(crate) fn credential(value: &str, inject: Vec<Injection>) -> PolicyCredential {
    PolicyCredential { value: Secret(value.to_owned()), inject }
}

impl World {
    /// Starts a proxy whose guest at 127.0.0.1 has the policy of [`World::policy`].
    pub(crate) async fn new() -> Self {
        let test_authority = TestAuthority::new();
        let names = Arc::new(Table::default());
        for name in [API, OTHER] {
            names.set(name, &["127.0.0.1"]);
        }
        let original = Arc::new(Original(Mutex::new(SocketAddr::from(([198, 51, 100, 1], 443)))));
        let rules = AddressRules { allow: vec!["127.0.0.0/8".parse().expect("a network")], own: [].into() };
        let roots = test_authority.roots();
        let filter = AddressFilter::new(rules, []);
        let (policies, destinations) = (Arc::default(), original.clone());
        let config = ProxyConfig { policies, names: names.clone(), filter, roots, destinations };
        let proxy = Proxy::new(config).expect("made");
        let listen = || TcpListener::bind("127.0.0.1:0");
        let (captured, explicit) = (listen().await.expect("bound"), listen().await.expect("bound"));
        let addresses = (captured.local_addr().expect("bound"), explicit.local_addr().expect("bound"));
        tokio::spawn(serve_captured(captured, proxy.clone()));
        tokio::spawn(serve_explicit(explicit, proxy.clone()));
        let (log, lines) = AuditLog::new();
        let world = Self {
            proxy,
            names,
            authority: generate_authority().expect("made"),
            test_authority,
            captured: addresses.0,
            explicit: addresses.1,
            lines,
            original,
        };
        world.proxy.policies().put(world.policy(), || log).expect("set");
        world
    }

    /// Returns the policy of the guest: one credential for [`API`], and every host allowed.
    pub(crate) fn policy(&self) -> Policy {
        let credentials = BTreeMap::from([("KEY".to_owned(), credential(VALUE, vec![bearer(Some(&[API]))]))]);
        Policy {
            owner: uid('a'),
            address: "127.0.0.1".parse().expect("an address"),
            mode: EgressMode::All,
            is_observing: false,
            allow_hosts: None,
            credentials,
            authority: self.authority.clone(),
            fingerprint: "1".to_owned(),
        }
    }

    /// Changes the policy of the guest.
    pub(crate) fn put(&self, policy: Policy) {
        self.proxy.policies().put(policy, || unreachable!("the guest has a log")).expect("set");
    }

    /// Starts a server with a certificate for [`API`] and [`OTHER`] that offers these protocols, and makes it
    /// the destination of captured connections.
    pub(crate) async fn origin(&self, protocols: &[&str]) -> Origin {
        let (certificate, key) = self.test_authority.certificate(&[API, OTHER, "127.0.0.1"], |_| {});
        let origin = Origin::https(certificate, key, protocols).await;
        self.capture_port(origin.port);
        origin
    }

    /// Sets the port that captured connections were made to. Their address leads nowhere.
    pub(crate) fn capture_port(&self, port: u16) {
        self.capture(SocketAddr::from(([198, 51, 100, 1], port)));
    }

    pub(crate) fn capture(&self, destination: SocketAddr) {
        *self.original.0.lock().expect("not poisoned") = destination;
    }

    /// Returns the authority that the guest trusts.
    pub(crate) fn guest_roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        let certificate = CertificateDer::from_pem_slice(self.authority.certificate.as_bytes());
        roots.add(certificate.expect("a certificate")).expect("added");
        roots
    }

    /// Makes a connection of the guest that is captured.
    pub(crate) async fn captured(&self) -> TcpStream {
        TcpStream::connect(self.captured).await.expect("connected")
    }

    /// Makes a connection of the guest to the explicit proxy.
    pub(crate) async fn explicit(&self) -> TcpStream {
        TcpStream::connect(self.explicit).await.expect("connected")
    }

    /// Returns the next line of the audit log.
    pub(crate) async fn line(&mut self) -> AuditLine {
        let line = self.lines.next().await.expect("the log is open");
        let text = serde_json::to_string(&line).expect("text");
        assert!(!text.contains(VALUE), "the audit log has the value: {text}");
        line
    }
}

/// Makes a connection from another address of loopback.
pub(crate) async fn connect_from(address: &str, to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind(SocketAddr::new(address.parse().expect("an address"), 0)).expect("bound");
    socket.connect(to).await.expect("connected")
}
