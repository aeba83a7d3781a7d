//! The process that carries the egress of all guests.
//!
//! Guarantees: it carries nothing until the daemon sets a policy; it holds policies in memory only, and no other process
//! of its user can read that memory; it opens no listening socket of its own. It ends when one of its sockets is
//! lost, so that it can be started again with new ones.
//! Assumes: the caller chose the user, the limits and the subscriber of events, and ignores SIGPIPE.

mod inherited;
mod roots;

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::set_no_new_privs;
use rustls::RootCertStore;
use stead_schemas::addresses::AddressRules;
use stead_schemas::egress::MediatorSettings;
use tokio::net::{TcpListener, UdpSocket, UnixListener};
use tokio::runtime::Builder;
use tokio::task::JoinSet;

use crate::address_filter::AddressFilter;
use crate::control::{Control, serve_control};
use crate::directory::{Guests, ResolvedNames};
use crate::listeners::{serve_captured, serve_explicit};
use crate::names::{self, Parts, Resolver, Upstream, UpstreamError, UpstreamTimes};
use crate::policies::Policies;
use crate::proxy::{Destinations, Proxy, ProxyConfig, ProxyError, Redirected};
use crate::refused_names;

pub use inherited::{SocketError, SocketNumbers};
pub use roots::RootsError;

/// The port of DNS.
const DNS_PORT: u16 = 53;

/// The arguments of the process.
#[derive(Debug, Clone)]
pub struct ProcessArguments {
    /// The settings ([`MediatorSettings`]) in JSON.
    pub settings: String,
    pub sockets: SocketNumbers,
    /// The user whose requests are answered at the control socket, beside root.
    pub daemon_uid: u32,
    /// Bundles in PEM of the authorities that servers are verified by.
    pub roots: Vec<PathBuf>,
}

/// The parts of the host that tests replace.
#[derive(Clone)]
pub struct Surroundings {
    pub destinations: Arc<dyn Destinations>,
    /// The port at which name servers are asked.
    pub dns_port: u16,
}

impl Default for Surroundings {
    fn default() -> Self {
        Self { destinations: Arc::new(Redirected), dns_port: DNS_PORT }
    }
}

impl fmt::Debug for Surroundings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Surroundings").field("dns_port", &self.dns_port).finish_non_exhaustive()
    }
}

/// The reason why the process ended.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error("the settings cannot be read")]
    Settings(#[source] serde_json::Error),
    #[error(transparent)]
    Roots(#[from] RootsError),
    #[error(transparent)]
    Sockets(#[from] SocketError),
    #[error("the process cannot be protected from others")]
    Protect(#[source] rustix::io::Errno),
    #[error("the runtime cannot be started")]
    Runtime(#[source] io::Error),
    #[error("the name servers cannot be used")]
    NameServers(#[from] UpstreamError),
    #[error(transparent)]
    Proxy(#[from] ProxyError),
    #[error("the socket for {0} was lost")]
    Lost(&'static str),
    #[error("a server of the process failed")]
    Failed,
}

/// Serves guests and the daemon until one of the sockets is lost.
///
/// # Errors
/// Returns the reason for which the process cannot begin or go on.
pub fn run(arguments: ProcessArguments) -> Result<(), ProcessError> {
    run_in(arguments, Surroundings::default())
}

/// Does the same as [`run`], with other parts of the host.
///
/// # Errors
/// Returns the reason for which the process cannot begin or go on.
pub fn run_in(arguments: ProcessArguments, surroundings: Surroundings) -> Result<(), ProcessError> {
    // Before anything else: the files may be out of reach later.
    let roots = roots::read(&arguments.roots)?;
    let settings = serde_json::from_str(&arguments.settings).map_err(ProcessError::Settings)?;
    let sockets = inherited::take(arguments.sockets)?;
    // Threads that are started after this have both.
    set_no_new_privs(true).map_err(ProcessError::Protect)?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(ProcessError::Protect)?;
    // It has as many threads as there are cores.
    let runtime = Builder::new_multi_thread().enable_all().build().map_err(ProcessError::Runtime)?;
    runtime.block_on(async {
        let process = Process::new(settings, roots, surroundings)?;
        Err(process.serve(sockets, arguments.daemon_uid).await)
    })
}

/// The parts of the process.
struct Process {
    control: Arc<Control>,
    proxy: Arc<Proxy>,
    resolver: Arc<Resolver>,
}

impl Process {
    fn new(
        settings: MediatorSettings,
        roots: RootCertStore,
        surroundings: Surroundings,
    ) -> Result<Self, ProcessError> {
        let policies = Arc::<Policies>::default();
        let filter = filter(&settings);
        let resolver = Resolver::new(Parts {
            directory: Arc::new(Guests { policies: policies.clone(), subnet: settings.subnet }),
            addresses: Arc::new(filter.clone()),
            upstream: upstream(&settings, surroundings.dns_port)?,
            on_event: refused_names::to_logs(policies.clone()),
            clock: Arc::new(Instant::now),
        });
        let names = Arc::new(ResolvedNames(resolver.clone()));
        let destinations = surroundings.destinations;
        let proxy =
            Proxy::new(ProxyConfig { policies: policies.clone(), names, filter, roots, destinations })?;
        Ok(Self { control: Arc::new(Control::new(policies, settings)), proxy, resolver })
    }

    /// Serves until a socket is lost; returns which one.
    async fn serve(self, sockets: inherited::Sockets, daemon_uid: u32) -> ProcessError {
        match self.start(sockets, daemon_uid) {
            Ok(mut servers) => match servers.join_next().await {
                Some(Ok(name)) => ProcessError::Lost(name),
                _ => ProcessError::Failed,
            },
            Err(error) => ProcessError::Runtime(error),
        }
    }

    /// Starts the servers; each ends with its name when it loses its socket.
    fn start(self, sockets: inherited::Sockets, daemon_uid: u32) -> io::Result<JoinSet<&'static str>> {
        let Self { control, proxy, resolver } = self;
        let control_socket = UnixListener::from_std(sockets.control)?;
        let captured = TcpListener::from_std(sockets.captured)?;
        let explicit = TcpListener::from_std(sockets.explicit)?;
        let names_udp = UdpSocket::from_std(sockets.names_udp)?;
        let names_tcp = TcpListener::from_std(sockets.names_tcp)?;
        let mut servers = JoinSet::new();
        let captured_proxy = proxy.clone();
        servers.spawn(async {
            serve_captured(captured, captured_proxy).await;
            "captured connections"
        });
        servers.spawn(async {
            serve_explicit(explicit, proxy).await;
            "clients of the proxy"
        });
        servers.spawn(async {
            names::serve(resolver, names_udp, names_tcp).await;
            "names"
        });
        servers.spawn(async move {
            serve_control(control_socket, control, daemon_uid).await;
            "the daemon's requests"
        });
        tracing::info!("egress is served");
        Ok(servers)
    }
}

/// Returns the filter of addresses. The address of the process is its own even before the host has it.
fn filter(settings: &MediatorSettings) -> AddressFilter {
    let address = IpAddr::from(settings.address);
    let rules = AddressRules { allow: settings.open.iter().copied().collect(), own: [address].into() };
    let ports = settings.ports;
    let listeners = [ports.captured, ports.explicit, ports.names].map(|port| SocketAddr::new(address, port));
    AddressFilter::new(rules, listeners)
}

/// Prepares the name servers. The kernel redirects the port of DNS to the resolver, so both ports are its own.
fn upstream(settings: &MediatorSettings, dns_port: u16) -> Result<Upstream, UpstreamError> {
    let servers: Vec<SocketAddr> = settings.dns.iter().map(|at| SocketAddr::new(*at, dns_port)).collect();
    let own = [settings.ports.names, DNS_PORT].map(|port| SocketAddr::new(settings.address.into(), port));
    Upstream::new(&servers, &own, UpstreamTimes::default())
}
