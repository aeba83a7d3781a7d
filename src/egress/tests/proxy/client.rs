//! Clients in a guest: TLS, raw HTTP/1, and hyper.

use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// A sender of requests over HTTP/2.
pub(crate) type Http2 = hyper::client::conn::http2::SendRequest<Full<Bytes>>;

/// Makes a TLS handshake as a client that offers these protocols.
pub(crate) async fn secure(
    stream: TcpStream,
    roots: RootCertStore,
    name: &str,
    protocols: &[&str],
) -> std::io::Result<TlsStream<TcpStream>> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let mut config = builder.expect("versions").with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
    let name = ServerName::try_from(name.to_owned()).expect("a name");
    TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

/// Begins HTTP/2 over a connection.
pub(crate) async fn http2(stream: TlsStream<TcpStream>) -> Http2 {
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .expect("begun");
    tokio::spawn(connection);
    sender
}

/// A response as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// The head with the status line, as it arrived.
    pub(crate) head: String,
    pub(crate) body: String,
}

/// Writes bytes, then reads one response of HTTP/1. Returns `None` when the connection ends without one.
pub(crate) async fn ask<T: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut T,
    request: impl AsRef<[u8]>,
) -> Option<Answer> {
    // The proxy may answer and close before everything is written.
    let _ = stream.write_all(request.as_ref()).await;
    let _ = stream.flush().await;
    read_answer(stream).await
}

/// Reads one response of HTTP/1.
pub(crate) async fn read_answer<T: AsyncRead + Unpin>(stream: &mut T) -> Option<Answer> {
    let mut bytes = Vec::new();
    let end = loop {
        if let Some(at) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break at + 4;
        }
        let mut byte = [0];
        match stream.read(&mut byte).await {
            Ok(1) => bytes.push(byte[0]),
            _ => return None,
        }
    };
    let head = String::from_utf8(bytes[..end].to_vec()).expect("text");
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    let body = read_body(stream, &head).await;
    Some(Answer { status, head, body: String::from_utf8_lossy(&body).into_owned() })
}

/// Returns the value of a field of a head.
pub(crate) fn field<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| {
        let (found, value) = line.split_once(':')?;
        found.eq_ignore_ascii_case(name).then_some(value.trim())
    })
}

async fn read_body<T: AsyncRead + Unpin>(stream: &mut T, head: &str) -> Vec<u8> {
    let mut body = Vec::new();
    if let Some(length) = field(head, "content-length") {
        body.resize(length.parse().expect("a length"), 0);
        if stream.read_exact(&mut body).await.is_err() {
            body.clear();
        }
    } else if field(head, "transfer-encoding").is_some() {
        while !body.ends_with(b"\r\n\r\n") && stream.read_buf(&mut body).await.unwrap_or(0) > 0 {}
    }
    body
}

/// Reads to the end of a connection. A connection that is broken has ended too.
pub(crate) async fn read_to_end<T: AsyncRead + Unpin>(stream: &mut T) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes).await;
    bytes
}
