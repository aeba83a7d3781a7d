//! The instances' side: a connection for each request, closed with the request.

use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::{Body, HttpBody};
use axum::http::{Request, Response};
use bytes::Bytes;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::client::conn::http1::{Builder, SendRequest};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use stead_schemas::limits::{
    BODY_RATE_MIN, INGRESS_ANSWER_TIMEOUT, INGRESS_BODY_WAIT_MAX, INGRESS_CONNECT_TIMEOUT,
    INGRESS_HEAD_BYTES_MAX, INGRESS_HEADERS_MAX, INGRESS_STALL_MAX,
};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use super::Cut;
use super::error_response::Refusal;
use super::permits::Permit;
use super::progress::{Progress, Watched};
use crate::peers::{Patience, Patient, TooSlow, watch_over};

/// The things that a connection to an instance depends on.
#[derive(Debug, Clone)]
pub(super) struct Hold {
    pub(super) cut: Cut,
    /// The request's permit, returned when the last holder drops it.
    pub(super) permit: Arc<Permit>,
    pub(super) progress: Progress,
}

impl Hold {
    /// Waits until the rules that the request came by are removed, or no data moves over the connection any
    /// more.
    async fn ends(mut self) {
        let cut = async {
            // The channel carries no values; only its end matters.
            while self.cut.changed().await.is_ok() {}
        };
        tokio::select! {
            biased;
            () = cut => {}
            () = self.progress.stalled() => {}
        }
    }
}

/// Connects; an instance in standby needs time to be restored.
pub(super) async fn connect(address: Ipv4Addr, port: u16, hold: &Hold) -> Result<SendRequest<Body>, Refusal> {
    let connecting = TcpStream::connect(SocketAddr::from((address, port)));
    let stream = match timeout(INGRESS_CONNECT_TIMEOUT, connecting).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::TimedOut => {
            return Err(Refusal::TimedOut("take the connection"));
        }
        Ok(Err(error)) => {
            tracing::debug!(%address, port, %error, "cannot connect to an instance");
            return Err(Refusal::Unreachable);
        }
        Err(_) => return Err(Refusal::TimedOut("take the connection")),
    };
    // An instance that takes data slowly is judged only by whether any data moves.
    watch_over(&stream, INGRESS_STALL_MAX);
    let watched = Watched { stream, progress: hold.progress.clone() };
    let mut builder = Builder::new();
    builder.max_buf_size(INGRESS_HEAD_BYTES_MAX).max_headers(INGRESS_HEADERS_MAX);
    let (sender, connection) =
        builder.handshake(TokioIo::new(watched)).await.map_err(|_| Refusal::BadAnswer)?;
    let hold = hold.clone();
    tokio::spawn(async move {
        let permit = hold.permit.clone();
        // A connection that is dropped early is cut, and its body ends with an error, as intended.
        tokio::select! {
            biased;
            () = hold.ends() => {}
            ended = connection.with_upgrades() => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "a connection to an instance ended badly");
                }
            }
        }
        drop(permit);
    });
    Ok(sender)
}

/// Sends the request and waits for the head of its response, whose time limit starts once everything is
/// sent.
pub(super) async fn send(
    mut sender: SendRequest<Body>,
    request: Request<Incoming>,
) -> Result<Response<Incoming>, Refusal> {
    let (sent, is_sent) = oneshot::channel();
    let patience = Patience::at_rate(INGRESS_BODY_WAIT_MAX, BODY_RATE_MIN);
    let request = request.map(|body| Body::new(Upload { body: Patient::new(body, patience), _sent: sent }));
    let late = async {
        // The sender is dropped without a value.
        let _ = is_sent.await;
        sleep(INGRESS_ANSWER_TIMEOUT).await;
    };
    // Dropping the response closes the connection.
    tokio::select! {
        biased;
        answer = sender.send_request(request) => answer.map_err(|error| {
            tracing::debug!(%error, "an instance did not answer");
            if is_too_slow(&error) { Refusal::TooSlow } else { Refusal::BadAnswer }
        }),
        () = late => Err(Refusal::TimedOut("answer")),
    }
}

/// True if the client kept the exchange from continuing.
fn is_too_slow(error: &hyper::Error) -> bool {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if error.is::<TooSlow>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// A body on its way to the instance.
struct Upload {
    body: Patient<Incoming>,
    /// Dropped with the body, when it is sent or no longer needed.
    _sent: oneshot::Sender<()>,
}

impl HttpBody for Upload {
    type Data = Bytes;
    type Error = axum::BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::BoxError>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Copies bytes both ways until either side ends, or its hold does.
pub(super) async fn tunnel(client: OnUpgrade, instance: OnUpgrade, hold: Hold) {
    let permit = hold.permit.clone();
    let copied = async {
        let (client, instance) = tokio::try_join!(client, instance)?;
        let (mut client, mut instance) = (TokioIo::new(client), TokioIo::new(instance));
        if let Err(error) = tokio::io::copy_bidirectional(&mut client, &mut instance).await {
            tracing::debug!(%error, "a tunnel ended badly");
        }
        Ok::<_, hyper::Error>(())
    };
    tokio::select! {
        biased;
        () = hold.ends() => {}
        ended = copied => {
            if let Err(error) = ended {
                tracing::debug!(%error, "a tunnel came to nothing");
            }
        }
    }
    drop(permit);
}
