//! The parts that all connections share.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use stead_schemas::limits::EGRESS_CONNECTIONS_MAX;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use crate::address_filter::AddressFilter;
use crate::authority::{AuthorityError, LeafKey};
use crate::policies::Policies;
use crate::upstream::{Dialer, Names, UpstreamTls};

/// The source of the destination that a guest meant to connect to.
pub trait Destinations: Send + Sync + 'static {
    /// Returns the original destination of a connection.
    ///
    /// # Errors
    /// Fails for a connection that was not redirected.
    fn original(&self, stream: &TcpStream) -> io::Result<SocketAddr>;
}

/// The destinations that the kernel's redirection keeps.
#[derive(Debug, Clone, Copy, Default)]
pub struct Redirected;

impl Destinations for Redirected {
    fn original(&self, stream: &TcpStream) -> io::Result<SocketAddr> {
        Ok(rustix::net::sockopt::ip_original_dst(stream)?.into())
    }
}

/// The parts that a proxy is made of.
pub struct ProxyConfig {
    /// The table of policies, which may be filled before there is a proxy.
    pub policies: Arc<Policies>,
    pub names: Arc<dyn Names>,
    /// The addresses that guests may reach.
    pub filter: AddressFilter,
    /// The authorities that servers are verified by.
    pub roots: RootCertStore,
    pub destinations: Arc<dyn Destinations>,
}

impl fmt::Debug for ProxyConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProxyConfig").field("filter", &self.filter).finish_non_exhaustive()
    }
}

/// The reason why there is no proxy.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    #[error("TLS cannot be configured")]
    Tls(#[from] rustls::Error),
    #[error("the key of leaf certificates cannot be made")]
    LeafKey(#[from] AuthorityError),
}

/// The proxy.
pub struct Proxy {
    pub(crate) policies: Arc<Policies>,
    pub(crate) dialer: Dialer,
    pub(crate) tls: UpstreamTls,
    pub(crate) leaf_key: LeafKey,
    pub(crate) provider: Arc<CryptoProvider>,
    pub(crate) destinations: Arc<dyn Destinations>,
    pub(crate) connections: Arc<Semaphore>,
    next: AtomicU64,
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy").field("dialer", &self.dialer).finish_non_exhaustive()
    }
}

impl Proxy {
    /// Creates a proxy. It carries nothing while there is no policy.
    ///
    /// # Errors
    /// Fails without random numbers.
    pub fn new(config: ProxyConfig) -> Result<Arc<Self>, ProxyError> {
        let ProxyConfig { policies, names, filter, roots, destinations } = config;
        Ok(Arc::new(Self {
            policies,
            dialer: Dialer::new(names, filter),
            tls: UpstreamTls::new(roots)?,
            leaf_key: LeafKey::generate()?,
            provider: Arc::new(rustls::crypto::ring::default_provider()),
            destinations,
            connections: Arc::new(Semaphore::new(EGRESS_CONNECTIONS_MAX)),
            next: AtomicU64::new(1),
        }))
    }

    /// Returns the table of policies.
    #[must_use]
    pub fn policies(&self) -> &Policies {
        &self.policies
    }

    /// Replaces the filter of addresses; connections that were made stay.
    pub fn set_address_filter(&self, filter: AddressFilter) {
        self.dialer.set_filter(filter);
    }

    /// Returns the number of a new connection.
    pub(crate) fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }
}
