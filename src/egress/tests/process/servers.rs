//! The servers outside: one for names, and one for HTTP with or without TLS.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};

use hickory_proto::op::{Message, OpCode, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{RData, Record};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls::ServerConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio_rustls::TlsAcceptor;

/// The names of a name server.
type Table = Arc<Mutex<BTreeMap<String, IpAddr>>>;

/// A name server; a name that it does not know does not exist.
pub(crate) struct NameServer {
    pub(crate) address: SocketAddr,
    names: Table,
    asked: Arc<Mutex<Vec<String>>>,
}

impl NameServer {
    pub(crate) async fn start() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.expect("bound");
        let (address, names, asked) =
            (socket.local_addr().expect("bound"), Table::default(), Arc::<Mutex<Vec<String>>>::default());
        let server = Self { address, names: names.clone(), asked: asked.clone() };
        tokio::spawn(async move {
            let mut buffer = [0; 4096];
            while let Ok((length, source)) = socket.recv_from(&mut buffer).await {
                let question = Message::from_vec(&buffer[..length]).expect("a well-formed question");
                let name = question.queries[0].name().to_lowercase().to_ascii();
                asked.lock().expect("not poisoned").push(name.clone());
                let answer = answer(&question, names.lock().expect("not poisoned").get(&name).copied());
                // The resolver may have gone.
                let _ = socket.send_to(&answer.to_vec().expect("it can be written"), source).await;
            }
        });
        server
    }

    /// Sets the address of a name.
    pub(crate) fn set(&self, name: &str, address: &str) {
        let address = address.parse().expect("an address");
        self.names.lock().expect("not poisoned").insert(format!("{name}."), address);
    }

    /// Returns the names that were asked for.
    pub(crate) fn asked(&self) -> Vec<String> {
        self.asked.lock().expect("not poisoned").clone()
    }
}

fn answer(question: &Message, address: Option<IpAddr>) -> Message {
    let mut message = Message::response(question.metadata.id, OpCode::Query);
    message.add_queries(question.queries.iter().cloned());
    match address {
        Some(IpAddr::V4(address)) => {
            let name = question.queries[0].name().clone();
            message.add_answers([Record::from_rdata(name, 60, RData::A(A(address)))]);
        }
        _ => message.metadata.response_code = ResponseCode::NXDomain,
    }
    message
}

/// The authority of the certificates of servers.
pub(crate) struct TestAuthority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl TestAuthority {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().expect("made");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let pem = params.self_signed(&key).expect("made").pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    pub(crate) fn pem(&self) -> &str {
        &self.pem
    }

    fn acceptor(&self, name: &str) -> TlsAcceptor {
        let key = KeyPair::generate().expect("made");
        let params = CertificateParams::new(vec![name.to_owned()]).expect("names");
        let certificate = params.signed_by(&key, &self.issuer).expect("made").der().clone();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let builder = builder.expect("versions").with_no_client_auth();
        let config = builder.with_single_cert(vec![certificate], key).expect("a certificate");
        TlsAcceptor::from(Arc::new(config))
    }
}

/// A server of HTTP/1 that keeps the heads of requests.
pub(crate) struct Server {
    pub(crate) port: u16,
    heads: Arc<Mutex<Vec<String>>>,
}

impl Server {
    /// Starts a server without TLS.
    pub(crate) async fn http() -> Self {
        Self::start(None).await
    }

    /// Starts a server with a certificate for a name.
    pub(crate) async fn https(authority: &TestAuthority, name: &str) -> Self {
        Self::start(Some(authority.acceptor(name))).await
    }

    async fn start(acceptor: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let port = listener.local_addr().expect("bound").port();
        let heads = Arc::<Mutex<Vec<String>>>::default();
        let noted = heads.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(connection(stream, acceptor.clone(), noted.clone()));
            }
        });
        Self { port, heads }
    }

    /// Returns the heads of all requests.
    pub(crate) fn heads(&self) -> Vec<String> {
        self.heads.lock().expect("not poisoned").clone()
    }
}

async fn connection(stream: TcpStream, acceptor: Option<TlsAcceptor>, heads: Arc<Mutex<Vec<String>>>) {
    match acceptor {
        None => serve(stream, &heads).await,
        Some(acceptor) => {
            if let Ok(stream) = acceptor.accept(stream).await {
                serve(stream, &heads).await;
            }
        }
    }
}

/// Answers requests without bodies until the connection ends.
async fn serve<T: AsyncRead + AsyncWrite + Unpin>(mut stream: T, heads: &Mutex<Vec<String>>) {
    let mut got = Vec::new();
    while stream.read_buf(&mut got).await.unwrap_or(0) > 0 {
        if got.ends_with(b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&std::mem::take(&mut got)).into_owned();
            heads.lock().expect("not poisoned").push(head);
            if stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.is_err() {
                return;
            }
        }
    }
}
