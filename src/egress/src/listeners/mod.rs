//! The listening sockets: connections that the kernel redirects, and clients that know the proxy.
//!
//! Guarantees: a connection from an address without a policy is closed unread; a guest has at most its share
//! of connections and handshakes; accepting goes on after any error but the loss of the socket.
//! Assumes: a guest cannot forge its address.

mod captured;
mod explicit;

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::sockopt::{set_socket_keepalive, set_tcp_keepidle, set_tcp_keepintvl};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::guest::Guest;
use crate::proxy::Proxy;

/// Pause after a failed accept (no descriptors), long enough not to spin and short enough not to be noticed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Time between two probes of a silent guest; after nine without an answer it counts as gone.
const KEEPALIVE_PROBE: Duration = Duration::from_secs(60);

/// Serves connections that the kernel redirected, until the socket is lost. When this is dropped, its
/// connections end.
pub async fn serve_captured(listener: TcpListener, proxy: Arc<Proxy>) {
    accept(listener, proxy, captured::serve).await;
}

/// Serves clients that use the proxy by HTTP, until the socket is lost. When this is dropped, its connections
/// end, except tunnels.
pub async fn serve_explicit(listener: TcpListener, proxy: Arc<Proxy>) {
    accept(listener, proxy, explicit::serve).await;
}

async fn accept<Serve, Served>(listener: TcpListener, proxy: Arc<Proxy>, serve: Serve)
where
    Serve: Fn(Arc<Guest>, TcpStream) -> Served,
    Served: Future<Output = ()> + Send + 'static,
{
    let mut connections = JoinSet::new();
    loop {
        // No connection is accepted without a permit: guests wait in the kernel's queue meanwhile.
        let next = async {
            let permit = proxy.connections.clone().acquire_owned().await;
            (permit, listener.accept().await)
        };
        // Finished connections are removed. Both arms may be dropped without losing a connection.
        let (permit, accepted) = tokio::select! {
            biased;
            Some(_) = connections.join_next() => continue,
            next = next => next,
        };
        let (stream, client) = match accepted {
            Ok(accepted) => accepted,
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                tracing::warn!(%error, "a listening socket was lost");
                return;
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (Ok(permit), Some(lease)) = (permit, proxy.policies.find(client.ip())) else {
            tracing::debug!(%client, "a connection from an address without a policy");
            continue;
        };
        watch_over(&stream);
        if let Ok(guest) = Guest::new(&proxy, lease, client.port(), permit) {
            connections.spawn(serve(guest, stream));
        }
    }
}

/// Makes the kernel notice a guest that is gone. An option that cannot be set only delays that.
fn watch_over(stream: &TcpStream) {
    let _ = stream.set_nodelay(true);
    let _ = set_socket_keepalive(stream, true);
    let _ = set_tcp_keepidle(stream, KEEPALIVE_PROBE);
    let _ = set_tcp_keepintvl(stream, KEEPALIVE_PROBE);
}
