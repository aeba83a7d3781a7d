//! A single probe request to a guest, and the reading of its answer.
//!
//! The guest is hostile: the deadline covers everything together. Only the head of an HTTP answer is read, which the
//! client bounds, and redirects are not followed. A program's output is discarded and bounded too.

use std::error::Error;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use hyper::client::conn::http1;
use hyper::{Request as Get, header};
use hyper_util::rt::TokioIo;
use rustix::io::Errno;
use rustls::pki_types::ServerName;
use stead_controllers::host::{HostError, HostErrorKind, ProbePlan};
use stead_schemas::guest::{Exec, FromStream, Request};
use stead_schemas::health::{Probe, Scheme};
use stead_schemas::limits::PROBE_PORTS;
use stead_schemas::names::{LinkName, Uid};
use stead_schemas::quantity::GoDuration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;

use crate::guest_channel::{AgentError, AgentStream, Event};
use crate::server_certificate::{self, Accepted};

/// Function that opens a stream to the agent of a guest. Each driver has its own way.
pub type OpenStream =
    Box<dyn Fn(&Uid, Request) -> BoxFuture<'static, Result<AgentStream, AgentError>> + Send + Sync>;

/// Limit on the output of a check, in bytes. A check that prints more does not check health.
const OUTPUT_BYTES_MAX: usize = 1 << 20;
/// Limit on the head of an answer, in bytes.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// Number of ports that are tried. A port is not free while an earlier connection from it is in the kernel's table.
const PORTS_TRIED: usize = 16;
/// Limit on the output that is shown as a reason.
const OUTPUT_SHOWN: usize = 200;

/// The result of a probe request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    Well,
    Ill(String),
    /// This host could not send the request, which says nothing about the guest.
    NotAsked(String),
}

/// The path to a guest: over its bridge only, so that no other machine answers for it.
struct Way<'a> {
    socket_address: SocketAddrV4,
    bridge: &'a LinkName,
    /// Number that differs from one request to the next.
    attempt: usize,
}

/// Connects from a port that marks the connection as a probe's.
async fn connect(way: &Way<'_>) -> io::Result<TcpStream> {
    let mut error = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for port in PROBE_PORTS.cycle().skip(way.attempt % PROBE_PORTS.len()).take(PORTS_TRIED) {
        let socket = TcpSocket::new_v4()?;
        // Other simultaneous probes may use the port, to other guests.
        socket.set_reuseaddr(true)?;
        socket.bind_device(Some(way.bridge.as_str().as_bytes()))?;
        let connected = match socket.bind(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port).into()) {
            Ok(()) => socket.connect(way.socket_address.into()).await,
            Err(error) => Err(error),
        };
        match connected {
            Err(taken)
                if matches!(taken.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable) =>
            {
                error = taken;
            }
            connected => return connected,
        }
    }
    Err(error)
}

pub(super) struct Questions {
    tls: TlsConnector,
    open_stream: OpenStream,
}

impl Questions {
    pub(super) fn new(open_stream: OpenStream) -> Result<Self, HostError> {
        // The address belongs to the instance, and the firewall lets no other guest answer from it.
        let config = server_certificate::config(Accepted::Any).map_err(|error| {
            HostError::new(HostErrorKind::Permanent, "make a client for", "health checks").because(error)
        })?;
        Ok(Self { tls: TlsConnector::from(Arc::new(config)), open_stream })
    }

    /// Sends a probe request. `attempt` differs from one request to the next.
    pub(super) async fn ask(&self, plan: &ProbePlan, attempt: usize) -> Found {
        let timeout = plan.check.timeout.0;
        let asked = async {
            match (&plan.check.probe, plan.address.zip(plan.bridge.as_ref())) {
                (Probe::Http { scheme, port, path, expected_status }, Some((address, bridge))) => {
                    let way = Way { socket_address: SocketAddrV4::new(address, *port), bridge, attempt };
                    let status = self.http(*scheme, &way, path).await;
                    match status {
                        Ok(status) if status == *expected_status => Found::Well,
                        Ok(status) => Found::Ill(format!("answered {status}, not {expected_status}")),
                        Err(error) => ill(&*error),
                    }
                }
                (Probe::Tcp { port }, Some((address, bridge))) => {
                    match connect(&Way { socket_address: SocketAddrV4::new(address, *port), bridge, attempt })
                        .await
                    {
                        Ok(_) => Found::Well,
                        Err(error) => ill(&error),
                    }
                }
                (Probe::Http { .. } | Probe::Tcp { .. }, None) => {
                    Found::NotAsked("the instance has no address".to_owned())
                }
                (Probe::Exec { command, working_dir }, _) => {
                    self.exec(&plan.owner, command, working_dir.as_deref(), timeout).await
                }
            }
        };
        let late = || Found::Ill(format!("no answer within {}", GoDuration(timeout)));
        tokio::time::timeout(timeout, asked).await.unwrap_or_else(|_| late())
    }

    /// Returns the status of the answer. Its body is not read: the connection is closed.
    async fn http(
        &self,
        scheme: Scheme,
        way: &Way<'_>,
        path: &str,
    ) -> Result<u16, Box<dyn Error + Send + Sync>> {
        let request = Get::get(path)
            .header(header::HOST, way.socket_address.to_string())
            .header(header::USER_AGENT, "stead-health-check")
            .header(header::CONNECTION, "close")
            .body(String::new())?;
        let stream = connect(way).await?;
        match scheme {
            Scheme::Http => Ok(exchange(stream, request).await?),
            Scheme::Https => {
                let name = ServerName::from(std::net::IpAddr::from(*way.socket_address.ip()));
                Ok(exchange(self.tls.connect(name, stream).await?, request).await?)
            }
        }
    }

    async fn exec(
        &self,
        owner: &Uid,
        command: &[String],
        directory: Option<&str>,
        timeout: Duration,
    ) -> Found {
        let request = Request::Exec(Exec {
            command: command.to_vec(),
            has_terminal: false,
            env: std::collections::BTreeMap::new(),
            directory: directory.map(ToOwned::to_owned),
            user: None,
            // The host decides when a check is late, and the guest ends what it left.
            timeout_millis: Some(u64::try_from(timeout.as_millis() * 2).unwrap_or(u64::MAX)),
            rows: 0,
            columns: 0,
            is_split: false,
        });
        let mut stream = match (self.open_stream)(owner, request).await {
            Ok(stream) => stream,
            // Clients of the agent use all streams.
            Err(error @ AgentError::TooMany) => return Found::NotAsked(error.to_string()),
            Err(error @ (AgentError::NotReady | AgentError::Unresponsive | AgentError::Lost)) => {
                return Found::Ill(error.to_string());
            }
        };
        if stream.sender.eof().await.is_err() {
            return Found::Ill(AgentError::Lost.to_string());
        }
        let (mut shown, mut length) = (Vec::new(), 0);
        loop {
            match stream.receiver.next().await {
                Some(Event::Data(bytes) | Event::ErrorData(bytes)) => {
                    let room = OUTPUT_SHOWN.saturating_sub(shown.len());
                    shown.extend_from_slice(&bytes[..bytes.len().min(room)]);
                    length += bytes.len();
                    if length > OUTPUT_BYTES_MAX {
                        return Found::Ill("it prints without end".to_owned());
                    }
                }
                Some(Event::Message(FromStream::Exited { code: 0 })) => return Found::Well,
                Some(Event::Message(FromStream::Exited { code })) => {
                    let reported = String::from_utf8_lossy(&shown);
                    let separator = if reported.trim().is_empty() { "" } else { ": " };
                    return Found::Ill(format!("exited with code {code}{separator}{}", reported.trim()));
                }
                Some(Event::Message(FromStream::Failed { message, .. })) => return Found::Ill(message),
                Some(Event::Message(_)) => {}
                None => return Found::Ill(AgentError::Lost.to_string()),
            }
        }
    }
}

/// Sends one request and reads the head of its answer.
async fn exchange<Stream>(stream: Stream, request: Get<String>) -> hyper::Result<u16>
where
    Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut client = http1::Builder::new();
    client.max_buf_size(HEAD_BYTES_MAX);
    let (mut sender, connection) = client.handshake(TokioIo::new(stream)).await?;
    let (mut connection, mut answer) =
        (std::pin::pin!(connection), std::pin::pin!(sender.send_request(request)));
    let answer = tokio::select! {
        biased;
        answer = &mut answer => answer?,
        // The connection was closed. Its answer or error arrived before that.
        _ = &mut connection => answer.await?,
    };
    Ok(answer.status().as_u16())
}

/// Returns a failure, described by its root cause.
fn ill(error: &(dyn Error + 'static)) -> Found {
    let mut cause = error;
    loop {
        let errno = cause.downcast_ref::<io::Error>().and_then(Errno::from_io_error);
        if errno.is_some_and(is_of_this_host) {
            return Found::NotAsked(cause.to_string());
        }
        match cause.source() {
            Some(deeper) => cause = deeper,
            None => return Found::Ill(cause.to_string()),
        }
    }
}

/// Returns `true` for errors of this host, not of the guest: no descriptor, no memory, no port, no link.
fn is_of_this_host(errno: Errno) -> bool {
    [
        Errno::MFILE,
        Errno::NFILE,
        Errno::NOBUFS,
        Errno::NOMEM,
        Errno::ADDRNOTAVAIL,
        Errno::ADDRINUSE,
        Errno::NODEV,
        Errno::NETDOWN,
        Errno::NETUNREACH,
    ]
    .contains(&errno)
}
