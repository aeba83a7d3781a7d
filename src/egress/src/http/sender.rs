//! The server's end of HTTP: one connection, over which requests are sent.

use std::error::Error;
use std::future::Future;
use std::io;

use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rustls::AlertDescription;
use stead_schemas::egress::Reason;
use stead_schemas::limits::{EGRESS_HEAD_BYTES_MAX, EGRESS_HEADERS_MAX};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Mutex, watch};

use super::body::Body;
use crate::upstream::Protocol;

/// Bytes of one stream of HTTP/2 that may wait in the proxy.
pub(super) const STREAM_WINDOW_BYTES: u32 = 256 << 10;
/// Bytes of all streams of a connection of HTTP/2 that may wait in the proxy.
pub(super) const CONNECTION_WINDOW_BYTES: u32 = 1 << 20;
/// Bytes that HTTP/2 buffers for sending on one stream.
pub(super) const SEND_BUFFER_BYTES: usize = 64 << 10;

/// The life of a guest's connection: tasks that belong to it end with it.
#[derive(Debug)]
pub(crate) struct Life(watch::Sender<bool>);

/// A watch over the life of a connection.
#[derive(Debug, Clone)]
pub(crate) struct LifeWatch(watch::Receiver<bool>);

impl Life {
    pub(crate) fn new() -> Self {
        Self(watch::Sender::new(false))
    }

    pub(crate) fn watch(&self) -> LifeWatch {
        LifeWatch(self.0.subscribe())
    }

    /// Ends the tasks of the connection.
    pub(crate) fn end(&self) {
        self.0.send_replace(true);
    }
}

impl LifeWatch {
    /// Waits for the end of the life.
    pub(crate) async fn ended(mut self) {
        // An error means that the connection was dropped.
        let _ = self.0.wait_for(|has_ended| *has_ended).await;
    }
}

/// An executor of tasks that end with a connection.
#[derive(Debug, Clone)]
pub(super) struct Tasks(pub(super) LifeWatch);

impl<Task> hyper::rt::Executor<Task> for Tasks
where
    Task: Future + Send + 'static,
    Task::Output: Send + 'static,
{
    fn execute(&self, task: Task) {
        let ended = self.0.clone().ended();
        tokio::spawn(async move {
            tokio::select! {
                biased;
                () = ended => {}
                _ = task => {}
            }
        });
    }
}

/// A connection to a server.
#[derive(Debug)]
pub(crate) enum Sender {
    Http1(Mutex<http1::SendRequest<Body>>),
    Http2(http2::SendRequest<Body>),
}

/// A watch over the end of a connection to a server, with the reason of a bad one.
#[derive(Debug, Clone)]
pub(crate) struct Closed(watch::Receiver<Option<Reason>>);

impl Closed {
    /// Waits until the server's connection has ended.
    pub(crate) async fn wait(mut self) {
        while self.0.changed().await.is_ok() {}
    }

    /// Returns the reason for a bad end that may have come between two requests.
    pub(crate) fn reason(&self) -> Option<Reason> {
        *self.0.borrow()
    }
}

impl Sender {
    /// Begins HTTP over a connection. Its task ends with the connection or the life.
    ///
    /// # Errors
    /// Fails when the server breaks the connection at once.
    pub(crate) async fn open<T>(io: T, protocol: Protocol, life: &Life) -> Result<(Self, Closed), Reason>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let io = TokioIo::new(io);
        let (closing, closed) = watch::channel(None);
        let sender = match protocol {
            Protocol::Http1 => {
                let mut builder = http1::Builder::new();
                builder.preserve_header_case(true).max_headers(EGRESS_HEADERS_MAX);
                builder.max_buf_size(EGRESS_HEAD_BYTES_MAX).max_header_size(EGRESS_HEAD_BYTES_MAX);
                let (sender, connection) = builder.handshake(io).await.map_err(|error| reason_of(&error))?;
                drive(connection.with_upgrades(), life.watch(), closing);
                Self::Http1(Mutex::new(sender))
            }
            Protocol::Http2 => {
                let mut builder = http2::Builder::new(Tasks(life.watch()));
                builder.initial_stream_window_size(STREAM_WINDOW_BYTES);
                builder.initial_connection_window_size(CONNECTION_WINDOW_BYTES);
                builder.max_send_buf_size(SEND_BUFFER_BYTES);
                builder.max_header_list_size(u32::try_from(EGRESS_HEAD_BYTES_MAX).unwrap_or(u32::MAX));
                let (sender, connection) = builder.handshake(io).await.map_err(|error| reason_of(&error))?;
                drive(connection, life.watch(), closing);
                Self::Http2(sender)
            }
        };
        Ok((sender, Closed(closed)))
    }

    /// Sends a request when the server can take it, and waits for the head of its response.
    ///
    /// # Errors
    /// Returns the reason for which there is no response.
    pub(super) async fn send(&self, request: Request<Body>) -> Result<Response<Incoming>, Reason> {
        let answer = match self {
            Self::Http1(sender) => {
                let mut sender = sender.lock().await;
                sender.ready().await.map_err(|error| reason_of(&error))?;
                let answer = sender.send_request(request);
                drop(sender);
                answer.await
            }
            Self::Http2(sender) => {
                let mut sender = sender.clone();
                sender.ready().await.map_err(|error| reason_of(&error))?;
                sender.send_request(request).await
            }
        };
        answer.map_err(|error| reason_of(&error))
    }

    /// Returns `true` if the connection can take another request.
    pub(super) async fn is_open(&self) -> bool {
        match self {
            Self::Http1(sender) => !sender.lock().await.is_closed(),
            Self::Http2(sender) => !sender.is_closed(),
        }
    }
}

/// Runs a connection in a task of its own.
fn drive<Running>(connection: Running, life: LifeWatch, closing: watch::Sender<Option<Reason>>)
where
    Running: Future<Output = hyper::Result<()>> + Send + 'static,
{
    tokio::spawn(async move {
        tokio::select! {
            biased;
            () = life.ended() => {}
            ended = connection => {
                if let Err(error) = ended {
                    closing.send_replace(Some(reason_of(&error)));
                }
            }
        }
        drop(closing);
    });
}

/// Returns the reason for a request without a response, or for the bad end of a connection.
fn reason_of(error: &hyper::Error) -> Reason {
    tracing::debug!(%error, "a connection to a server or a request failed");
    match tls_error(error) {
        Some(rustls::Error::AlertReceived(AlertDescription::CertificateRequired)) => {
            Reason::ClientCertificate
        }
        Some(_) => Reason::UpstreamTls,
        None if error.is_parse() => Reason::UpstreamProtocol,
        None if error.is_user() || error.is_body_write_aborted() => Reason::Broken,
        None => Reason::UpstreamClosed,
    }
}

/// Returns the error of TLS among the causes of an error.
fn tls_error(error: &hyper::Error) -> Option<&rustls::Error> {
    let mut cause = error.source();
    while let Some(error) = cause {
        let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        if let Some(found) = inner.and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            return Some(found);
        }
        cause = error.source();
    }
    None
}
