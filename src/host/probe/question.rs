//! One question to a guest, and how its answer is taken.
//!
//! The guest is hostile: the deadline is for everything together; of an HTTP answer only the head is
//! read, which the client bounds, and redirects are not followed; a program's output is thrown away
//! and bounded too.

use std::error::Error;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use futures::future::BoxFuture;
use reqwest::redirect::Policy;
use rustix::io::Errno;
use stead_controllers::host::{HostError, HostErrorKind, ProbePlan};
use stead_schemas::guest::{Exec, FromStream, Request};
use stead_schemas::health::{Probe, Scheme};
use stead_schemas::names::{LinkName, Uid};
use stead_schemas::quantity::GoDuration;
use tokio::net::TcpSocket;

use crate::agent::{AgentError, AgentStream, Event};

/// How the agent of a guest is reached; a driver's matter.
pub type OpenStream =
    Box<dyn Fn(&Uid, Request) -> BoxFuture<'static, Result<AgentStream, AgentError>> + Send + Sync>;

/// A check that prints more shows something else than health.
const OUTPUT_BYTES_MAX: usize = 1 << 20;
/// Of the output, as a reason.
const OUTPUT_SHOWN: usize = 200;

/// What came of a question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    Well,
    Ill(String),
    /// This host could not put it: says nothing of the guest.
    NotAsked(String),
}

pub(super) struct Questions {
    http: reqwest::Client,
    bridge: LinkName,
    open_stream: OpenStream,
}

impl Questions {
    pub(super) fn new(bridge: &LinkName, open_stream: OpenStream) -> Result<Self, HostError> {
        // Refused when it was done already, which is fine.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .user_agent("stead-health-check")
            .redirect(Policy::none())
            .referer(false)
            // Whatever the daemon's environment says: guests are here.
            .no_proxy()
            .interface(bridge.as_str())
            // The address is the instance's own, and the firewall lets no other answer from it.
            .tls_danger_accept_invalid_certs(true)
            // Each probe shows that a new connection is taken.
            .pool_max_idle_per_host(0)
            .build()
            .map_err(|error| {
                HostError::new(HostErrorKind::Permanent, "make a client for", "health checks").because(error)
            })?;
        Ok(Self { http, bridge: bridge.clone(), open_stream })
    }

    pub(super) async fn ask(&self, plan: &ProbePlan) -> Found {
        let timeout = plan.check.timeout.0;
        let asked = async {
            match (&plan.check.probe, plan.address) {
                (Probe::Http { scheme, port, path, expected_status }, Some(address)) => {
                    self.http(*scheme, address, *port, path, *expected_status).await
                }
                (Probe::Tcp { port }, Some(address)) => self.tcp(address, *port).await,
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

    async fn http(
        &self,
        scheme: Scheme,
        address: Ipv4Addr,
        port: u16,
        path: &str,
        expected_status: u16,
    ) -> Found {
        let url = format!("{}://{address}:{port}{path}", scheme.as_str());
        // The body is not read: the connection goes with the answer.
        match self.http.get(url).send().await {
            Ok(answer) if answer.status().as_u16() == expected_status => Found::Well,
            Ok(answer) => Found::Ill(format!("answered {}, not {expected_status}", answer.status().as_u16())),
            Err(error) => ill(&error),
        }
    }

    async fn tcp(&self, address: Ipv4Addr, port: u16) -> Found {
        let connected = async {
            let socket = TcpSocket::new_v4()?;
            socket.bind_device(Some(self.bridge.as_str().as_bytes()))?;
            socket.connect(SocketAddrV4::new(address, port).into()).await
        };
        match connected.await {
            Ok(_) => Found::Well,
            Err(error) => ill(&error),
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
            timeout_millis: Some(u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX)),
            rows: 0,
            columns: 0,
            is_split: false,
        });
        let mut stream = match (self.open_stream)(owner, request).await {
            Ok(stream) => stream,
            // Clients have them all.
            Err(error @ AgentError::TooMany) => return Found::NotAsked(error.to_string()),
            Err(error @ (AgentError::NotReady | AgentError::Lost)) => return Found::Ill(error.to_string()),
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
                    let said = String::from_utf8_lossy(&shown);
                    let separator = if said.trim().is_empty() { "" } else { ": " };
                    return Found::Ill(format!("exited with code {code}{separator}{}", said.trim()));
                }
                Some(Event::Message(FromStream::Failed { message, .. })) => return Found::Ill(message),
                Some(Event::Message(_)) => {}
                None => return Found::Ill(AgentError::Lost.to_string()),
            }
        }
    }
}

/// A failure, by what is at the bottom of it.
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

/// Not the guest's doing: no descriptor, no memory, no port, no link.
fn is_of_this_host(errno: Errno) -> bool {
    [
        Errno::MFILE,
        Errno::NFILE,
        Errno::NOBUFS,
        Errno::NOMEM,
        Errno::ADDRNOTAVAIL,
        Errno::NODEV,
        Errno::NETDOWN,
        Errno::NETUNREACH,
    ]
    .contains(&errno)
}
