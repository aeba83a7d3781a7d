//! TLS that ends here: two handshakes, then HTTP with injected credentials.
//!
//! Guarantees: the server's certificate is verified before the guest's handshake goes on; the guest gets
//! exactly the protocol that the server chose; no session, ticket or early data outlives a connection.

use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{AlertDescription, ServerConfig};
use stead_schemas::egress::{Authority, Host, Reason, TlsUse};
use stead_schemas::limits::EGRESS_HANDSHAKE_TIMEOUT;
use tokio::time::timeout;
use tokio_rustls::StartHandshake;
use tokio_rustls::server::TlsStream;

use crate::alert;
use crate::audit::Record;
use crate::authority::AuthorityError;
use crate::guest::Guest;
use crate::http::{Exchange, Expected, Life, Scope, Sender, serve_http1, serve_http2};
use crate::peek::Hello;
use crate::policies::Active;
use crate::proxy::Proxy;
use crate::stream::GuestStream;
use crate::upstream::{Dialed, Protocol, Secured, protocols_of};

/// Serves a connection that was dialed and is intercepted. The record becomes a line only if a handshake
/// fails: afterwards each request has its own.
pub(crate) async fn serve(
    guest: Arc<Guest>,
    mut stream: GuestStream,
    hello: Hello,
    authority: Authority,
    dialed: Dialed,
    active: Arc<Active>,
    mut record: Record,
) {
    record.line().tls = TlsUse::Intercept;
    let address = dialed.address;
    let progress = stream.progress.clone();
    let (secured, config) = match prepare(&guest.proxy, &hello, &authority.host, dialed, &active).await {
        Ok(prepared) => prepared,
        Err(reason) => {
            record.refuse(reason);
            return alert::send(&mut stream, reason).await;
        }
    };
    let Secured { stream: server, protocol, verified } = secured;
    let protocol = protocol.unwrap_or(Protocol::Http1);
    let life = Life::new();
    let accepted = accept(hello, stream, config).await;
    let opened = match accepted {
        Ok(client) => Sender::open(server, protocol, &life).await.map(|opened| (client, opened)),
        Err(reason) => Err(reason),
    };
    let (client, (sender, closed)) = match opened {
        Ok(opened) => opened,
        Err(reason) => return record.refuse(reason),
    };
    record.discard();
    guest.settle();
    // A client may keep the connection for later before its first request.
    progress.set_idle();
    let exchange = Arc::new(Exchange {
        guest: guest.clone(),
        expected: Expected::Connection(authority),
        scope: Scope::Secured { verified, sender, address },
        life,
        progress: progress.clone(),
        active,
    });
    let service = |request| exchange.clone().answer(request);
    let cut = guest.lease.until_not(|active| exchange.is_allowed(active));
    let ended = match protocol {
        Protocol::Http1 => serve_http1(client, service, &progress, cut, closed.clone().wait()).await,
        Protocol::Http2 => {
            progress.set_busy();
            let ended =
                serve_http2(client, service, exchange.life.watch(), &progress, cut, closed.clone().wait())
                    .await;
            exchange.life.end();
            ended
        }
    };
    match (ended, closed.reason()) {
        (Err(reason), _) => {
            exchange.life.end();
            guest.note_end(reason, TlsUse::Intercept);
        }
        // The server found something wrong after its handshake, perhaps before the first request.
        (Ok(()), Some(reason @ (Reason::ClientCertificate | Reason::UpstreamTls))) => {
            guest.note_end(reason, TlsUse::Intercept);
        }
        (Ok(()), _) => {}
    }
}

/// Makes the handshake with the server, and the configuration of the guest's handshake.
async fn prepare(
    proxy: &Proxy,
    hello: &Hello,
    host: &Host,
    dialed: Dialed,
    active: &Active,
) -> Result<(Secured, Arc<ServerConfig>), Reason> {
    let offered = protocols_of(&hello.protocols)?;
    let secured = proxy.tls.secure(dialed, host, &offered).await?;
    let leaf =
        active.authority.leaf(host, &proxy.leaf_key, SystemTime::now()).map_err(|error| match error {
            AuthorityError::TooMany => Reason::TooManyCertificates,
            error => {
                tracing::warn!(%host, %error, "cannot make a certificate");
                Reason::Internal
            }
        })?;
    let config = config(proxy, leaf, secured.protocol).map_err(|_| Reason::Internal)?;
    Ok((secured, Arc::new(config)))
}

/// Returns the configuration of one handshake of a guest.
fn config(
    proxy: &Proxy,
    leaf: Arc<CertifiedKey>,
    protocol: Option<Protocol>,
) -> Result<ServerConfig, rustls::Error> {
    let builder =
        ServerConfig::builder_with_provider(proxy.provider.clone()).with_safe_default_protocol_versions()?;
    let mut config = builder.with_no_client_auth().with_cert_resolver(Arc::new(Leaf(leaf)));
    config.alpn_protocols = protocol.iter().map(|protocol| protocol.alpn().to_vec()).collect();
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// The certificate of a handshake.
#[derive(Debug)]
struct Leaf(Arc<CertifiedKey>);

impl ResolvesServerCert for Leaf {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

/// Goes on with the guest's handshake.
async fn accept(
    hello: Hello,
    stream: GuestStream,
    config: Arc<ServerConfig>,
) -> Result<TlsStream<GuestStream>, Reason> {
    let handshake = StartHandshake::from_parts(hello.accepted, stream).into_stream(config);
    match timeout(EGRESS_HANDSHAKE_TIMEOUT, handshake).await {
        Ok(Ok(stream)) => {
            // Without tickets nothing is sent now that could carry the acknowledgement of the guest's last message.
            stream.get_ref().0.acknowledge();
            Ok(stream)
        }
        Ok(Err(error)) => {
            tracing::debug!(%error, "a handshake with a guest failed");
            Err(reason_of(&error))
        }
        Err(_) => Err(Reason::HelloTimeout),
    }
}

/// Returns the reason for a guest's failed handshake.
fn reason_of(error: &io::Error) -> Reason {
    use AlertDescription::{
        AccessDenied, BadCertificate, CertificateExpired, CertificateUnknown, UnknownCA,
        UnsupportedCertificate,
    };
    match error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::AlertReceived(
            AccessDenied
            | BadCertificate
            | CertificateExpired
            | CertificateUnknown
            | UnknownCA
            | UnsupportedCertificate,
        )) => Reason::GuestRefusedCertificate,
        _ => Reason::GuestTls,
    }
}
