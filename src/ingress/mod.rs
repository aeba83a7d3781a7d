//! Ingress: ports of the host that this process listens at, and the HTTP proxy behind them.
//!
//! Guarantees: a port is opened once, and only while an owner has rules for it; a request leads to the
//! address of an instance in the store or nowhere; bodies stream, and everything else is bounded (the head,
//! the time for it, the rate of a body, connections and requests, in total and for one client, one instance
//! and one ingress).
//! Assumes: clients and guests are untrusted, and equally so.
//! Never: keeps a connection to an instance for later, because an idle one would keep the instance from its
//! standby.
//! Cancel/crash: sockets end with the process; the next process opens them anew.

mod error_response;
mod forward;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod headers;
mod permits;
mod progress;
mod server;
mod socket;
mod upstream;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use stead_controllers::host::{HostError, Listeners};
use stead_controllers::ingress::{Found, Reach, Routes};
use stead_schemas::ingress::IngressRule;
use stead_schemas::limits::{INGRESS_CONNECTIONS_MAX, INGRESS_CONNECTIONS_PER_CLIENT_MAX};
use stead_schemas::names::Uid;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

use crate::peers::Shares;
use permits::Permits;
use server::Proxy;

/// A function that finds an instance by id or name, and its state for a connection to the port.
pub type Resolve = Arc<dyn Fn(&str, u16) -> Reach + Send + Sync>;

/// The parts that the listeners are made of.
pub struct IngressConfig {
    /// The address of this host that the ports are opened at.
    pub address: IpAddr,
    /// The port of our own API, which no ingress gets.
    pub api_port: u16,
    pub reach: Resolve,
    /// Called with the owner of a port that was lost.
    pub changed: Arc<dyn Fn(&Uid) + Send + Sync>,
}

/// The adapter; clones share their ports.
#[derive(Clone)]
pub struct HttpListeners(Arc<Shared>);

struct Shared {
    config: IngressConfig,
    permits: Arc<Permits>,
    /// Permits for connections of clients, over all ports.
    clients: Arc<Semaphore>,
    shares: Arc<Shares<IpAddr>>,
    ports: Mutex<BTreeMap<u16, Open>>,
}

/// An open port.
struct Open {
    served: Arc<Served>,
    /// The task, which holds the socket while it runs, and all connections of clients.
    task: JoinHandle<()>,
}

/// The rules that are served at a port.
#[derive(Default)]
struct Served {
    rules: RwLock<Rules>,
    /// True if the socket was closed by another program.
    is_lost: AtomicBool,
}

#[derive(Default)]
struct Rules {
    routes: Routes,
    /// Senders by owner: when a sender is dropped, the connections by that owner's rules end.
    cuts: BTreeMap<Uid, watch::Sender<()>>,
}

/// A receiver that ends when the rules are removed.
type Cut = watch::Receiver<()>;

impl Served {
    fn set(&self, owner: &Uid, rules: &[IngressRule]) {
        let mut all = self.rules.write().unwrap_or_else(PoisonError::into_inner);
        all.routes.set(owner, rules);
        all.cuts.insert(owner.clone(), watch::Sender::new(()));
    }

    /// Removes an owner's rules; returns true if no owner is left.
    fn remove(&self, owner: &Uid) -> bool {
        let mut all = self.rules.write().unwrap_or_else(PoisonError::into_inner);
        all.routes.remove(owner);
        all.cuts.remove(owner);
        all.routes.is_empty()
    }

    fn of(&self, owner: &Uid) -> Option<Vec<IngressRule>> {
        self.rules.read().unwrap_or_else(PoisonError::into_inner).routes.of(owner)
    }

    fn owners(&self) -> Vec<Uid> {
        self.rules.read().unwrap_or_else(PoisonError::into_inner).routes.owners().cloned().collect()
    }

    fn find(&self, host: &str) -> Option<(Found, Cut)> {
        let all = self.rules.read().unwrap_or_else(PoisonError::into_inner);
        let found = all.routes.find(host)?;
        let cut = all.cuts.get(&found.owner)?.subscribe();
        Some((found, cut))
    }
}

impl Open {
    fn is_there(&self) -> bool {
        !self.served.is_lost.load(Ordering::Acquire) && !self.task.is_finished()
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl std::fmt::Debug for HttpListeners {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HttpListeners").field("ports", &self.lock().keys()).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for IngressConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { address, api_port, .. } = self;
        f.debug_struct("IngressConfig")
            .field("address", address)
            .field("api_port", api_port)
            .finish_non_exhaustive()
    }
}

impl HttpListeners {
    #[must_use]
    pub fn new(config: IngressConfig) -> Self {
        let clients = Arc::new(Semaphore::new(INGRESS_CONNECTIONS_MAX));
        let shares = Shares::new(INGRESS_CONNECTIONS_PER_CLIENT_MAX);
        Self(Arc::new(Shared { config, permits: Arc::default(), clients, shares, ports: Mutex::default() }))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u16, Open>> {
        self.0.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks whether we listen at this port, or could.
    ///
    /// # Errors
    /// Fails when that cannot be determined, for example for an address that is not this host's.
    pub fn can_listen(&self, port: u16) -> Result<bool, HostError> {
        let IngressConfig { address, api_port, .. } = self.0.config;
        if port == api_port {
            return Ok(false);
        }
        if self.lock().get(&port).is_some_and(Open::is_there) {
            return Ok(true);
        }
        match socket::bound(address, port) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => Ok(false),
            Err(error) => Err(HostError::io("look at port", port.to_string(), error)),
        }
    }

    /// Opens a port that is not open; it has no rules yet.
    fn listen(&self, port: u16) -> Result<Open, HostError> {
        let Shared { config, permits, clients, shares, ports: _ } = &*self.0;
        let failed = |error| HostError::io("listen at port", port.to_string(), error);
        if port == config.api_port {
            return Err(failed(std::io::ErrorKind::AddrInUse.into()));
        }
        let listener = socket::listen(config.address, port).map_err(failed)?;
        let served = Arc::new(Served::default());
        let proxy = Proxy {
            served: served.clone(),
            reach: config.reach.clone(),
            permits: permits.clone(),
            clients: clients.clone(),
            shares: shares.clone(),
        };
        let (for_task, changed) = (served.clone(), config.changed.clone());
        let task = tokio::spawn(async move {
            server::serve(listener, Arc::new(proxy)).await;
            for_task.is_lost.store(true, Ordering::Release);
            for_task.owners().iter().for_each(|owner| changed(owner));
        });
        Ok(Open { served, task })
    }
}

impl Listeners for HttpListeners {
    async fn list(&self) -> Result<Vec<Uid>, HostError> {
        let mut owners: Vec<Uid> = self.lock().values().flat_map(|open| open.served.owners()).collect();
        owners.sort_unstable();
        owners.dedup();
        Ok(owners)
    }

    async fn inspect(&self, owner: &Uid) -> Result<BTreeMap<u16, Vec<IngressRule>>, HostError> {
        let ports = self.lock();
        let there = ports.iter().filter(|(_, open)| open.is_there());
        Ok(there.filter_map(|(port, open)| Some((*port, open.served.of(owner)?))).collect())
    }

    async fn is_free(&self, port: u16) -> Result<bool, HostError> {
        self.can_listen(port)
    }

    async fn open(&self, owner: &Uid, port: u16, rules: &[IngressRule]) -> Result<(), HostError> {
        let mut ports = self.lock();
        if !ports.get(&port).is_some_and(Open::is_there) {
            // The lost socket is removed first: its other owners open the port again in passes of their own.
            ports.remove(&port);
            let open = self.listen(port)?;
            ports.insert(port, open);
        }
        if let Some(open) = ports.get(&port) {
            open.served.set(owner, rules);
        }
        Ok(())
    }

    async fn close(&self, owner: &Uid, port: u16) -> Result<(), HostError> {
        let last = {
            let mut ports = self.lock();
            let is_last = ports.get(&port).is_some_and(|open| open.served.remove(owner));
            if is_last { ports.remove(&port) } else { None }
        };
        if let Some(mut open) = last {
            open.task.abort();
            // The result of the task is not needed; the socket closes with it.
            let _ = (&mut open.task).await;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
