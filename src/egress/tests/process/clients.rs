//! The clients in a guest: raw HTTP/1, TLS, and questions for names.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::world::patiently;

/// Sends a request and reads the response, whose body has 2 bytes or is text with its length. Returns its status and its
/// text; the status is 0 if the connection ends before.
pub(crate) async fn request<T: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut T,
    request: &str,
) -> (u16, String) {
    // The proxy may answer and close before everything is written.
    let _ = stream.write_all(request.as_bytes()).await;
    let _ = stream.flush().await;
    let mut got = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&got).into_owned();
        if let Some(status) = whole(&text) {
            return (status, text);
        }
        if patiently(stream.read_buf(&mut got)).await.unwrap_or(0) == 0 {
            return (0, text);
        }
    }
}

/// Returns the status of a response that is there as a whole.
fn whole(text: &str) -> Option<u16> {
    let (head, body) = text.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    (body.len() >= length.unwrap_or(0)).then_some(status)
}

/// Makes a TLS handshake.
pub(crate) async fn secure(stream: TcpStream, roots: RootCertStore, name: &str) -> TlsStream<TcpStream> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config = builder.expect("versions").with_root_certificates(roots).with_no_client_auth();
    let name = ServerName::try_from(name.to_owned()).expect("a name");
    patiently(TlsConnector::from(Arc::new(config)).connect(name, stream)).await.expect("a handshake")
}

/// A guest's socket for questions.
pub(crate) struct Asker(UdpSocket);

impl Asker {
    pub(crate) async fn new(guest: Ipv4Addr, resolver: SocketAddr) -> Self {
        let socket = UdpSocket::bind((guest, 0)).await.expect("an address of loopback");
        socket.connect(resolver).await.expect("an address of loopback");
        Self(socket)
    }

    pub(crate) async fn send(&self, host: &str, record_type: RecordType) {
        let mut message = Message::new(1, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(Name::from_ascii(host).expect("a name"), record_type));
        self.0.send(&message.to_vec().expect("it can be written")).await.expect("sent");
    }

    /// Asks for records; returns the code and the addresses.
    pub(crate) async fn ask(&self, host: &str, record_type: RecordType) -> (ResponseCode, Vec<IpAddr>) {
        self.send(host, record_type).await;
        let mut buffer = [0; 4096];
        let length = patiently(self.0.recv(&mut buffer)).await.expect("an answer");
        let answer = Message::from_vec(&buffer[..length]).expect("a well-formed answer");
        let addresses = answer.answers.iter().filter_map(|record| record.data.ip_addr()).collect();
        (answer.metadata.response_code, addresses)
    }

    /// Returns `true` if an answer has arrived.
    pub(crate) fn has_answer(&self) -> bool {
        self.0.try_recv(&mut [0; 4096]).is_ok()
    }
}
