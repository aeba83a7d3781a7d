//! TLS to servers.
//!
//! Guarantees: only a connection whose certificate was verified for its host gives a [`Verified`], and only a
//! `Verified` can inject credentials; no session is resumed, so that nothing is carried between guests.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustls::client::{ResolvesClientCert, Resumption};
use rustls::pki_types::ServerName;
use rustls::sign::CertifiedKey;
use rustls::{AlertDescription, ClientConfig, Error, RootCertStore, SignatureScheme};
use stead_schemas::egress::{Host, Reason};
use stead_schemas::limits::EGRESS_HANDSHAKE_TIMEOUT;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::dial::Dialed;

/// A version of HTTP that ALPN names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    Http1,
    Http2,
}

impl Protocol {
    /// Returns the name in ALPN.
    pub(crate) fn alpn(self) -> &'static [u8] {
        match self {
            Self::Http1 => b"http/1.1",
            Self::Http2 => b"h2",
        }
    }

    fn of_alpn(name: &[u8]) -> Option<Self> {
        [Self::Http1, Self::Http2].into_iter().find(|protocol| protocol.alpn() == name)
    }
}

/// Returns the protocols that can be forwarded of those that a client offers, in its order.
///
/// # Errors
/// Fails when the client offers protocols and none of them can be forwarded.
pub(crate) fn protocols_of(offered: &[Vec<u8>]) -> Result<Vec<Protocol>, Reason> {
    let known: Vec<Protocol> = offered.iter().filter_map(|name| Protocol::of_alpn(name)).collect();
    if known.is_empty() && !offered.is_empty() { Err(Reason::NoCommonProtocol) } else { Ok(known) }
}

/// The proof that a connection leads to a host whose certificate was verified.
#[derive(Debug)]
pub(crate) struct Verified {
    host: Host,
}

impl Verified {
    /// Returns the host that the certificate was verified for.
    pub(crate) fn host(&self) -> &Host {
        &self.host
    }
}

/// A verified connection.
#[derive(Debug)]
pub(crate) struct Secured {
    pub(crate) stream: TlsStream<TcpStream>,
    /// The protocol that the server chose; `None` when it chose none.
    pub(crate) protocol: Option<Protocol>,
    pub(crate) verified: Verified,
}

/// The configuration of TLS to servers.
#[derive(Debug)]
pub(crate) struct UpstreamTls {
    config: ClientConfig,
}

impl UpstreamTls {
    /// Creates the configuration with the authorities that servers are verified by.
    pub(crate) fn new(roots: RootCertStore) -> Result<Self, Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        let mut config = builder.with_root_certificates(roots).with_no_client_auth();
        config.resumption = Resumption::disabled();
        Ok(Self { config })
    }

    /// Makes a handshake with a server, as the client of the guest would.
    ///
    /// # Errors
    /// Returns the reason after at most [`EGRESS_HANDSHAKE_TIMEOUT`].
    pub(crate) async fn secure(
        &self,
        dialed: Dialed,
        host: &Host,
        offered: &[Protocol],
    ) -> Result<Secured, Reason> {
        let name = match host {
            Host::Name(name) => {
                ServerName::try_from(name.as_str().to_owned()).map_err(|_| Reason::BadHost)?
            }
            Host::Address(address) => ServerName::from(*address),
        };
        let asked = Arc::new(ClientCertificateAsked::default());
        let mut config = self.config.clone();
        config.client_auth_cert_resolver = asked.clone();
        config.alpn_protocols = offered.iter().map(|protocol| protocol.alpn().to_vec()).collect();
        let handshake = TlsConnector::from(Arc::new(config)).connect(name, dialed.stream);
        let stream = match timeout(EGRESS_HANDSHAKE_TIMEOUT, handshake).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                tracing::debug!(%host, %error, "a handshake with a server failed");
                return Err(reason_of(&error, asked.0.load(Ordering::Relaxed)));
            }
            Err(_) => return Err(Reason::UpstreamTimeout),
        };
        let protocol = stream.get_ref().1.alpn_protocol().and_then(Protocol::of_alpn);
        Ok(Secured { stream, protocol, verified: Verified { host: host.clone() } })
    }
}

/// Returns the reason for a failed handshake.
fn reason_of(error: &io::Error, is_certificate_asked: bool) -> Reason {
    match error.get_ref().and_then(|error| error.downcast_ref::<Error>()) {
        Some(Error::InvalidCertificate(_) | Error::NoCertificatesPresented) => Reason::UpstreamCertificate,
        Some(Error::AlertReceived(AlertDescription::CertificateRequired)) => Reason::ClientCertificate,
        // TLS 1.2 has no alert of its own for a missing certificate.
        Some(Error::AlertReceived(_)) if is_certificate_asked => Reason::ClientCertificate,
        _ => Reason::UpstreamTls,
    }
}

/// A store without client certificates, which notes whether a server asks for one.
#[derive(Debug, Default)]
struct ClientCertificateAsked(AtomicBool);

impl ResolvesClientCert for ClientCertificateAsked {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.store(true, Ordering::Relaxed);
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}
