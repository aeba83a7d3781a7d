//! The guest's end of HTTP.

use std::convert::Infallible;
use std::future::Future;
use std::pin::{Pin, pin};

use futures::FutureExt;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use stead_schemas::egress::Reason;
use stead_schemas::limits::{EGRESS_HEAD_BYTES_MAX, EGRESS_HEADERS_MAX, EGRESS_IDLE_MAX, EGRESS_STREAMS_MAX};
use tokio::io::{AsyncRead, AsyncWrite};

use super::body::Body;
use super::sender::{CONNECTION_WINDOW_BYTES, LifeWatch, SEND_BUFFER_BYTES, STREAM_WINDOW_BYTES, Tasks};
use crate::progress::Progress;

/// Serves HTTP/1 until the guest ends the connection. `cut` ends it at once; after `closed` it ends with the
/// response that is being sent.
///
/// # Errors
/// Returns the reason for any other end.
pub(crate) async fn serve_http1<T, Service, Answer>(
    io: T,
    service: Service,
    progress: &Progress,
    cut: impl Future<Output = ()>,
    closed: impl Future<Output = ()>,
) -> Result<(), Reason>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    Service: Fn(Request<Incoming>) -> Answer,
    Answer: Future<Output = Response<Body>>,
{
    let mut builder = http1::Builder::new();
    builder.preserve_header_case(true).auto_date_header(false).max_headers(EGRESS_HEADERS_MAX);
    // The time limit of heads is `progress`, which does not count the time between requests.
    builder.max_buf_size(EGRESS_HEAD_BYTES_MAX).max_header_size(EGRESS_HEAD_BYTES_MAX);
    builder.header_read_timeout(None);
    let service = service_fn(|request| service(request).map(Ok::<_, Infallible>));
    let connection = builder.serve_connection(TokioIo::new(io), service).with_upgrades();
    drive(connection, |connection| connection.graceful_shutdown(), progress, cut, closed).await
}

/// Serves HTTP/2, like [`serve_http1`]; the tasks of streams end with the life.
///
/// # Errors
/// Returns the reason for any end that is not the guest's.
pub(crate) async fn serve_http2<T, Service, Answer>(
    io: T,
    service: Service,
    life: LifeWatch,
    progress: &Progress,
    cut: impl Future<Output = ()>,
    closed: impl Future<Output = ()>,
) -> Result<(), Reason>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    Service: Fn(Request<Incoming>) -> Answer,
    Answer: Future<Output = Response<Body>> + Send + 'static,
{
    let mut builder = http2::Builder::new(Tasks(life));
    builder.auto_date_header(false).max_concurrent_streams(EGRESS_STREAMS_MAX);
    builder.max_header_list_size(u32::try_from(EGRESS_HEAD_BYTES_MAX).unwrap_or(u32::MAX));
    builder.initial_stream_window_size(STREAM_WINDOW_BYTES).max_send_buf_size(SEND_BUFFER_BYTES);
    builder.initial_connection_window_size(CONNECTION_WINDOW_BYTES);
    let service = service_fn(|request| service(request).map(Ok::<_, Infallible>));
    let connection = builder.serve_connection(TokioIo::new(io), service);
    drive(connection, |connection| connection.graceful_shutdown(), progress, cut, closed).await
}

/// Drives a connection to its end.
async fn drive<Connection: Future<Output = hyper::Result<()>>>(
    connection: Connection,
    shut_down: impl Fn(Pin<&mut Connection>),
    progress: &Progress,
    cut: impl Future<Output = ()>,
    closed: impl Future<Output = ()>,
) -> Result<(), Reason> {
    let (mut connection, mut cut, mut closed) = (pin!(connection), pin!(cut), pin!(closed));
    let mut is_closing = false;
    loop {
        // Only the connection does work; the other arms wait and may be dropped.
        tokio::select! {
            biased;
            () = &mut cut => return Err(Reason::PolicyChanged),
            ended = &mut connection => return ended.map_err(|error| reason_of(&error)),
            () = &mut closed, if !is_closing => {
                is_closing = true;
                shut_down(connection.as_mut());
            }
            // A connection of HTTP/2 is always busy, so that this never ends it.
            () = progress.head_late() => return Err(Reason::HeadTimeout),
            () = progress.stalled(EGRESS_IDLE_MAX) => return Err(Reason::Idle),
        }
    }
}

/// Returns the reason for the bad end of a guest's connection.
fn reason_of(error: &hyper::Error) -> Reason {
    tracing::debug!(%error, "a guest's connection ended badly");
    if error.is_parse() || error.is_parse_version_h2() { Reason::BadRequest } else { Reason::Broken }
}
