//! The listening sockets: connections that the kernel redirects, and clients that know the proxy.
//!
//! Guarantees: a connection from an address without a policy is closed unread; a guest has at most its share
//! of connections and handshakes; accepting goes on after any error but the loss of the socket.
//! Assumes: a guest cannot forge its address.

mod captured;
mod explicit;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
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

/// A socket that connections come from.
trait Listener {
    /// Waits for the next connection.
    fn next(&self) -> impl Future<Output = io::Result<(TcpStream, SocketAddr)>>;
}

impl Listener for TcpListener {
    async fn next(&self) -> io::Result<(TcpStream, SocketAddr)> {
        self.accept().await
    }
}

async fn accept<Serve, Served>(listener: impl Listener, proxy: Arc<Proxy>, serve: Serve)
where
    Serve: Fn(Arc<Guest>, TcpStream) -> Served,
    Served: Future<Output = ()> + Send + 'static,
{
    let mut connections = JoinSet::new();
    loop {
        // No connection is accepted without a permit: guests wait in the kernel's queue meanwhile.
        let next = async {
            let permit = proxy.connections.clone().acquire_owned().await;
            (permit, listener.next().await)
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
        if let Ok(guest) = Guest::new(&proxy, lease, client, permit) {
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

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::net::IpAddr;
    use std::sync::{Mutex, PoisonError};

    use rustls::RootCertStore;
    use stead_schemas::egress::HostName;
    use tokio::io::AsyncReadExt;

    use super::*;
    use crate::address_filter::AddressFilter;
    use crate::proxy::{ProxyConfig, Redirected};
    use crate::upstream::{Addresses, Names, NamesError};

    struct NoNames;

    impl Names for NoNames {
        fn resolve<'a>(&'a self, _: IpAddr, _: &'a HostName) -> Addresses<'a> {
            Box::pin(async { Err(NamesError::NotFound) })
        }
    }

    /// A socket whose first results are given.
    struct Scripted(Mutex<VecDeque<io::Result<(TcpStream, SocketAddr)>>>);

    impl Listener for Scripted {
        async fn next(&self) -> io::Result<(TcpStream, SocketAddr)> {
            let mut results = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            results.pop_front().unwrap_or_else(|| Err(io::ErrorKind::InvalidInput.into()))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn accepting_goes_on_without_descriptors_and_ends_with_the_socket() {
        let config = ProxyConfig {
            names: Arc::new(NoNames),
            policies: Arc::default(),
            filter: AddressFilter::default(),
            roots: RootCertStore::empty(),
            destinations: Arc::new(Redirected),
        };
        let proxy = Proxy::new(config).expect("made");
        let real = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let mut client = TcpStream::connect(real.local_addr().expect("bound")).await.expect("connected");
        let connection = real.accept().await.expect("accepted");
        let full = || Err(io::Error::from(rustix::io::Errno::MFILE));
        let scripted = Scripted(Mutex::new([full(), full(), Ok(connection), full()].into()));
        // It returns when the script is at its end, as after the loss of the socket.
        accept(scripted, proxy, captured::serve).await;
        // The connection came from an address without a policy and was closed unread.
        assert_eq!(client.read(&mut [0]).await.expect("ended"), 0);
    }
}
