//! The server of connections: bounded in total and for each client, with bounded headers and times; a panic ends
//! only its own request.

use std::future::Future;
use std::io;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures::FutureExt;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use stead_schemas::api::ErrorBody;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tower::ServiceExt;

use super::arrivals::Arrivals;
use super::client::{Client, Origin};
use super::listener::{Duplex, Listener, Listeners, Stream};
use super::refusals::{Refusals, Sending};
use super::seats::{Seat, Seats};
use super::{ApiError, ApiState};
use crate::peers::{Shares, Unstalled, watch_over};

/// Bounds of the listener, and of the streams and sessions over its connections.
#[derive(Debug, Clone, Copy)]
pub struct ServerLimits {
    /// Number of concurrent connections; for a further one an idle one is closed, or else it waits.
    pub connections_max: usize,
    /// Number of these from one client address, or from one user of this host; a further one is answered with 503
    /// and `Retry-After`, and closed.
    pub connections_per_client_max: usize,
    /// Time within which a client must take some of the data sent to it; otherwise its connection is closed.
    pub stall_max: Duration,
    /// Time within which a request's head must arrive, and before it a handshake of TLS be done: slow clients hold
    /// a connection no longer.
    pub header_timeout: Duration,
    /// Time that open requests get at shutdown.
    pub grace: Duration,
    /// Time between two lines of a stream that has nothing to send; the write shows whether the client is gone.
    pub stream_idle_max: Duration,
    /// Time between two pings to the client of a session of exec or cp.
    pub ping_interval: Duration,
    /// Time for which the client of a session may send nothing, or take nothing, before it counts as gone; it
    /// answers several pings in it.
    pub silence_max: Duration,
    /// Time within which a client that sends a file must send something: it may wait for its own disk, and does
    /// not answer pings while it only writes.
    pub sender_silence_max: Duration,
}

impl FromRequestParts<ApiState> for ServerLimits {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &ApiState) -> Result<Self, ApiError> {
        // The limits are missing only when the request came over no connection of the server.
        parts.extensions.get::<Self>().copied().ok_or_else(ApiError::internal)
    }
}

/// Largest head of a request, in bytes, in the order of magnitude that a read buffer allows; larger heads
/// get 431.
const HEADER_BYTES_MAX: usize = 64 << 10;
const HEADERS_MAX: usize = 100;
/// Time for a connection that was asked to make room; after it, another one is asked.
const ROOM_PAUSE: Duration = Duration::from_millis(20);
/// Pause after a failed accept (no descriptors), long enough not to spin and short enough not to be noticed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves until `shutdown`, then lets open requests end within the grace.
///
/// # Errors
/// Fails only when the listener itself is unusable, never because of a single connection.
pub async fn serve(
    listeners: Vec<Listener>,
    router: Router,
    limits: ServerLimits,
    shutdown: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    let permits = Arc::new(Semaphore::new(limits.connections_max));
    let shares = Shares::<Origin>::new(limits.connections_per_client_max);
    let mut listeners = Listeners::new(listeners);
    let (closing, is_closing) = watch::channel(false);
    let seats = Arc::<Seats>::default();
    let mut shutdown = std::pin::pin!(shutdown);
    let mut arrivals = Arrivals::new();
    loop {
        arrivals.next().await;
        let (stream, client) = tokio::select! {
            biased;
            () = &mut shutdown => break,
            accepted = listeners.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
        };
        let Some(share) = shares.take(&client.origin()) else {
            tracing::debug!(?client, "a client has too many connections");
            // This is best effort: a client that has sent its request already may see a broken connection
            // instead.
            stream.send_at_once(&full());
            continue;
        };
        let permit = tokio::select! {
            biased;
            () = &mut shutdown => break,
            permit = take_permit(&permits, &seats) => permit?,
        };
        let seat = seats.sit(client.origin());
        let connection = connection(stream, (client, seat), router.clone(), limits, is_closing.clone());
        tokio::spawn(async move {
            connection.await;
            drop((permit, share));
        });
    }
    let _ = closing.send(true);
    let all = u32::try_from(limits.connections_max).unwrap_or(u32::MAX);
    let _ = tokio::time::timeout(limits.grace, permits.acquire_many(all)).await;
    Ok(())
}

/// Takes a permit for a connection: a free one, or that of an idle connection, or the first that becomes
/// free.
async fn take_permit(permits: &Arc<Semaphore>, seats: &Seats) -> io::Result<OwnedSemaphorePermit> {
    if let Ok(permit) = permits.clone().try_acquire_owned() {
        return Ok(permit);
    }
    let mut is_asked = seats.make_room();
    loop {
        tokio::select! {
            biased;
            permit = permits.clone().acquire_owned() => return permit.map_err(io::Error::other),
            () = seats.idled(), if !is_asked => is_asked = seats.make_room(),
            // The connection that was asked may have received a request meanwhile.
            () = tokio::time::sleep(ROOM_PAUSE), if is_asked => is_asked = seats.make_room(),
        }
    }
}

/// Returns the whole response to a client that has its share of connections already.
fn full() -> Vec<u8> {
    let body = ErrorBody::new("overloaded", "too many connections from this address at once");
    let body = serde_json::to_string(&body).unwrap_or_default();
    let head = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n";
    format!("{head}Connection: close\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

/// Serves a connection until it ends, or is asked to make room while it is idle, or the server shuts down.
async fn connection(
    stream: Stream,
    (client, seat): (Client, Seat),
    router: Router,
    limits: ServerLimits,
    mut is_closing: watch::Receiver<bool>,
) {
    let ready = tokio::select! {
        biased;
        ready = ready(stream, limits) => ready,
        () = closed(&mut is_closing) => return,
        // No request was received yet.
        () = seat.is_wanted() => return,
    };
    match ready {
        Ok(stream) => requests(stream, (client, seat), router, limits, is_closing).await,
        Err(error) => tracing::debug!(%error, ?client, "a handshake ended badly"),
    }
}

/// Returns the stream of requests, after the handshake where TLS is spoken.
async fn ready(stream: Stream, limits: ServerLimits) -> io::Result<Box<dyn Duplex>> {
    match stream {
        Stream::Local(stream) => Ok(Box::new(Unstalled::new(stream, limits.stall_max))),
        Stream::Tcp(stream) => {
            watch_over(&stream, limits.stall_max);
            Ok(Box::new(Unstalled::new(stream, limits.stall_max)))
        }
        Stream::Tls(stream, tls) => {
            watch_over(&stream, limits.stall_max);
            let handshake = tls.acceptor().accept(Unstalled::new(stream, limits.stall_max));
            Ok(Box::new(tokio::time::timeout(limits.header_timeout, handshake).await??))
        }
    }
}

async fn closed(is_closing: &mut watch::Receiver<bool>) {
    // The guard is dropped at once: it may not live over an await.
    drop(is_closing.wait_for(|&closing| closing).await);
}

/// Answers the requests of a connection.
async fn requests(
    stream: Box<dyn Duplex>,
    (client, seat): (Client, Seat),
    router: Router,
    limits: ServerLimits,
    mut is_closing: watch::Receiver<bool>,
) {
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(limits.header_timeout);
    builder.max_buf_size(HEADER_BYTES_MAX).max_headers(HEADERS_MAX);
    let seat = Arc::new(seat);
    let taken = seat.clone();
    let service = service_fn(move |mut request: axum::http::Request<Incoming>| {
        request.extensions_mut().insert(client.clone());
        request.extensions_mut().insert(limits);
        let (busy, answer) = (taken.busy(), router.clone().oneshot(request));
        async move { answer.await.map(|answer| answer.map(|body| busy.over(body))) }
    });
    let mut served = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service).with_upgrades());
    tokio::select! {
        biased;
        result = &mut served => {
            if let Err(error) = result {
                tracing::debug!(%error, "a connection ended badly");
            }
        }
        () = closed(&mut is_closing) => {
            served.as_mut().graceful_shutdown();
            let _ = served.await;
        }
        () = seat.is_wanted() => {
            // A request may have arrived since this connection was chosen: it is answered first.
            if !seat.may_go() {
                served.as_mut().graceful_shutdown();
                let _ = served.await;
            }
        }
    }
}

/// Wraps all requests with a log line, a handler of panics, and the delay of refusals.
pub(super) async fn observe(State(refusals): State<Arc<Refusals>>, request: Request, next: Next) -> Response {
    let client = request.extensions().get::<Client>().map(Client::origin);
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let started = tokio::time::Instant::now();
    // This is unwind safe: handlers share only the store, whose own transactions contain panics.
    let response = AssertUnwindSafe(next.run(request)).catch_unwind().await;
    let mut response = response.unwrap_or_else(|_| {
        tracing::error!(%method, path, "a handler panicked");
        ApiError::internal().into_response()
    });
    let millis = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    tracing::info!(%method, path, status = response.status().as_u16(), millis, "request");
    if let (true, Some(client)) = (response.status().is_client_error(), client) {
        match refusals.count(client, tokio::time::Instant::now()) {
            Sending::AtOnce => {}
            Sending::After(delay, _delayed) => tokio::time::sleep(delay).await,
            Sending::Closing => {
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
        }
    }
    response
}
