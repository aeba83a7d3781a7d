//! The clients' side of a port: connections, their heads, and the response to each request.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, Response};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use stead_schemas::limits::{
    CLIENT_STALL_MAX, INGRESS_HEAD_BYTES_MAX, INGRESS_HEAD_TIMEOUT, INGRESS_HEADERS_MAX,
};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::permits::Permits;
use super::{Resolve, Served};
use crate::peers::{Shares, Unstalled, client_of, watch_over};

/// Pause after a failed accept (no descriptors), long enough not to spin and short enough not to be noticed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The state that the requests of a port are handled with.
pub(super) struct Proxy {
    pub(super) served: Arc<Served>,
    pub(super) reach: Resolve,
    pub(super) permits: Arc<Permits>,
    pub(super) clients: Arc<Semaphore>,
    /// Shares of the clients' connections, by client address.
    pub(super) shares: Arc<Shares<IpAddr>>,
}

/// Serves until the socket is lost; when it is dropped, it closes the connections of all clients.
pub(super) async fn serve(listener: TcpListener, proxy: Arc<Proxy>) {
    let mut connections = JoinSet::new();
    loop {
        // No connection is accepted without a permit: clients wait in the kernel's queue meanwhile.
        let next = async {
            let permit = proxy.clients.clone().acquire_owned().await;
            (permit, listener.accept().await)
        };
        // Finished connections are removed. Both arms may be dropped without losing a connection.
        let (permit, accepted) = tokio::select! {
            biased;
            Some(_) = connections.join_next() => continue,
            next = next => next,
        };
        match accepted {
            Ok((stream, client)) => {
                let Some(share) = proxy.shares.take(&client_of(client.ip())) else {
                    tracing::debug!(%client, "a client has too many connections");
                    continue;
                };
                let connection = connection(stream, client, proxy.clone());
                connections.spawn(async move {
                    connection.await;
                    drop((permit, share));
                });
            }
            Err(error) if is_lost(&error) => {
                tracing::warn!(%error, "a port was lost");
                return;
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// True if the socket no longer listens.
fn is_lost(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::InvalidInput
}

async fn connection(stream: TcpStream, client: SocketAddr, proxy: Arc<Proxy>) {
    watch_over(&stream, CLIENT_STALL_MAX);
    let stream = Unstalled::new(stream, CLIENT_STALL_MAX);
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(INGRESS_HEAD_TIMEOUT);
    builder.max_buf_size(INGRESS_HEAD_BYTES_MAX).max_headers(INGRESS_HEADERS_MAX);
    let client = client.ip().to_canonical();
    let service = service_fn(|request| {
        let proxy = proxy.clone();
        async move { Ok::<_, Infallible>(proxy.answer(client, request).await) }
    });
    if let Err(error) = builder.serve_connection(TokioIo::new(stream), service).with_upgrades().await {
        tracing::debug!(%error, "a connection ended badly");
    }
}

impl Proxy {
    async fn answer(&self, client: IpAddr, request: Request<Incoming>) -> Response<Body> {
        match self.forward(client, request).await {
            Ok(response) => response,
            Err(refusal) => {
                tracing::debug!(?refusal, "a request was not passed on");
                (&refusal).into()
            }
        }
    }
}
