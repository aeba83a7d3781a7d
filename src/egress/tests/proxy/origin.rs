//! Servers on loopback that note what they get.

use std::convert::Infallible;
use std::future::Future;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http_body_util::{BodyExt, Either, Full, channel::Channel};
use hyper::body::{Frame, Incoming};
use hyper::header::{HeaderMap, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio_rustls::TlsAcceptor;

/// A request as a server got it.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) method: String,
    pub(crate) uri: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
    pub(crate) trailers: Option<HeaderMap>,
}

impl Seen {
    /// Returns the values of a field.
    pub(crate) fn values(&self, name: &str) -> Vec<String> {
        let values = self.headers.get_all(name).iter();
        values.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()).collect()
    }
}

/// The things that a server noted.
#[derive(Default)]
struct Notes {
    requests: Mutex<Vec<Seen>>,
    connections: Mutex<usize>,
    /// Bytes that a server of raw bytes got.
    bytes: Mutex<Vec<u8>>,
}

/// A server.
pub(crate) struct Origin {
    pub(crate) port: u16,
    notes: Arc<Notes>,
    /// Parts of the response to `/events`, sent as they come.
    pub(crate) events: mpsc::Sender<&'static str>,
    /// The number of noted requests.
    count: watch::Receiver<usize>,
}

/// A body that a server of tests sends.
type Answer = Either<Full<Bytes>, Channel<Bytes>>;

struct Shared {
    notes: Arc<Notes>,
    events: tokio::sync::Mutex<mpsc::Receiver<&'static str>>,
    count: watch::Sender<usize>,
}

impl Origin {
    /// Starts a server of HTTP over TLS.
    pub(crate) async fn https(
        certificate: CertificateDer<'static>,
        key: PrivateKeyDer<'static>,
        protocols: &[&str],
    ) -> Self {
        let acceptor = acceptor(certificate, key, protocols);
        Self::start(move |stream, shared: Arc<Shared>| {
            let acceptor = acceptor.clone();
            async move {
                let Ok(stream) = acceptor.accept(stream).await else { return };
                let is_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                serve(stream, is_http2, shared).await;
            }
        })
        .await
    }

    /// Starts a server of HTTP that is not encrypted.
    pub(crate) async fn http() -> Self {
        Self::start(|stream, shared| serve(stream, false, shared)).await
    }

    /// Starts a server over TLS that reads a request's head, writes these bytes and closes the connection.
    pub(crate) async fn raw(
        certificate: CertificateDer<'static>,
        key: PrivateKeyDer<'static>,
        answer: &'static [u8],
    ) -> Self {
        let acceptor = acceptor(certificate, key, &["http/1.1"]);
        Self::start(move |stream, shared: Arc<Shared>| {
            let acceptor = acceptor.clone();
            async move {
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                let mut got = Vec::new();
                while !got.windows(4).any(|window| window == b"\r\n\r\n") {
                    if stream.read_buf(&mut got).await.unwrap_or(0) == 0 {
                        break;
                    }
                }
                shared.notes.bytes.lock().expect("not poisoned").extend(got);
                // The proxy may close first.
                let _ = stream.write_all(answer).await;
                let _ = stream.shutdown().await;
            }
        })
        .await
    }

    /// Starts a server that writes a greeting and echoes what it gets.
    pub(crate) async fn echo(greeting: &'static [u8]) -> Self {
        Self::start(move |mut stream: TcpStream, _| async move {
            let _ = stream.write_all(greeting).await;
            let (mut reader, mut writer) = stream.split();
            let _ = tokio::io::copy(&mut reader, &mut writer).await;
            let _ = writer.shutdown().await;
        })
        .await
    }

    async fn start<Serve, Served>(serve: Serve) -> Self
    where
        Serve: Fn(TcpStream, Arc<Shared>) -> Served + Send + 'static,
        Served: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let port = listener.local_addr().expect("bound").port();
        let notes = Arc::<Notes>::default();
        let (events, receiver) = mpsc::channel(16);
        let (counting, count) = watch::channel(0);
        let shared = Arc::new(Shared {
            notes: notes.clone(),
            events: tokio::sync::Mutex::new(receiver),
            count: counting,
        });
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                *shared.notes.connections.lock().expect("not poisoned") += 1;
                tokio::spawn(serve(stream, shared.clone()));
            }
        });
        Self { port, notes, events, count }
    }

    /// Returns the requests that arrived whole.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.notes.requests.lock().expect("not poisoned").clone()
    }

    /// Returns the number of accepted connections.
    pub(crate) fn connections(&self) -> usize {
        *self.notes.connections.lock().expect("not poisoned")
    }

    /// Returns the bytes that a server of raw bytes got.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.notes.bytes.lock().expect("not poisoned").clone()
    }

    /// Waits for this number of requests.
    pub(crate) async fn wait_for(&mut self, number: usize) {
        self.count.wait_for(|count| *count >= number).await.expect("the server runs");
    }
}

fn acceptor(
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
    protocols: &[&str],
) -> TlsAcceptor {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = builder.expect("versions").with_no_client_auth();
    let mut config = builder.with_single_cert(vec![certificate], key).expect("a certificate");
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
    TlsAcceptor::from(Arc::new(config))
}

async fn serve<T>(stream: T, is_http2: bool, shared: Arc<Shared>)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request| {
        let shared = shared.clone();
        async move { Ok::<_, Infallible>(answer(request, &shared).await) }
    });
    // The proxy closes connections in any state.
    let _ = if is_http2 {
        let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        builder.serve_connection(TokioIo::new(stream), service).await
    } else {
        let builder = hyper::server::conn::http1::Builder::new();
        builder.serve_connection(TokioIo::new(stream), service).with_upgrades().await
    };
}

/// Answers a request by its path.
async fn answer(mut request: Request<Incoming>, shared: &Arc<Shared>) -> Response<Answer> {
    let path = request.uri().path().to_owned();
    let upgrade = (path == "/socket").then(|| hyper::upgrade::on(&mut request));
    let (parts, body) = request.into_parts();
    let collected = body.collect().await.ok();
    let trailers = collected.as_ref().and_then(|collected| collected.trailers().cloned());
    let body = collected.map(http_body_util::Collected::to_bytes);
    let authorization = parts.headers.get("authorization").cloned();
    if let Some(body) = &body {
        let seen = Seen {
            method: parts.method.to_string(),
            uri: parts.uri.to_string(),
            headers: parts.headers,
            body: body.to_vec(),
            trailers,
        };
        shared.notes.requests.lock().expect("not poisoned").push(seen);
        shared.count.send_modify(|count| *count += 1);
    }
    let mut response = Response::new(Either::Left(Full::from(body.clone().unwrap_or_default())));
    match path.as_str() {
        "/reflect" => reflect(response.headers_mut(), authorization),
        "/redirect" => {
            *response.status_mut() = StatusCode::FOUND;
            let location = HeaderValue::from_static("https://other.example.org/next");
            response.headers_mut().insert("location", location);
        }
        "/alternative" => {
            response.headers_mut().insert("alt-svc", HeaderValue::from_static("h3=\":443\""));
        }
        "/events" => return Response::new(Either::Right(events(shared.clone()))),
        "/trailers" => {
            response.headers_mut().insert("trailer", HeaderValue::from_static("grpc-status, x-echo"));
            return response.map(|_| Either::Right(trailing(authorization)));
        }
        "/socket" => {
            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            response.headers_mut().insert("connection", HeaderValue::from_static("upgrade"));
            response.headers_mut().insert("upgrade", HeaderValue::from_static("websocket"));
            if let Some(upgrade) = upgrade {
                tokio::spawn(echo_frames(upgrade));
            }
        }
        _ => {}
    }
    response
}

fn reflect(headers: &mut HeaderMap, authorization: Option<HeaderValue>) {
    use base64::Engine;
    let Some(value) = authorization else { return };
    let encoded = base64::engine::general_purpose::STANDARD.encode(value.as_bytes());
    headers.insert("x-echo", value);
    headers.insert("x-echo64", HeaderValue::from_str(&encoded).expect("a value"));
}

/// Returns a body whose parts come when the test sends them; it ends with the part `end`.
fn events(shared: Arc<Shared>) -> Channel<Bytes> {
    let (mut sender, body) = Channel::new(1);
    tokio::spawn(async move {
        let mut events = shared.events.lock().await;
        while let Some(event) = events.recv().await.filter(|event| *event != "end") {
            if sender.send_data(Bytes::from_static(event.as_bytes())).await.is_err() {
                return;
            }
        }
    });
    body
}

/// Returns a body with trailers that repeat the credential.
fn trailing(authorization: Option<HeaderValue>) -> Channel<Bytes> {
    let (mut sender, body) = Channel::new(4);
    tokio::spawn(async move {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static("0"));
        if let Some(value) = authorization {
            trailers.insert("x-echo", value);
        }
        let _ = sender.send(Frame::data(Bytes::from_static(b"message"))).await;
        let _ = sender.send(Frame::trailers(trailers)).await;
    });
    body
}

async fn echo_frames(upgrade: hyper::upgrade::OnUpgrade) {
    let Ok(upgraded) = upgrade.await else { return };
    let (mut reader, mut writer) = tokio::io::split(TokioIo::new(upgraded));
    let _ = tokio::io::copy(&mut reader, &mut writer).await;
    let _ = writer.shutdown().await;
}
