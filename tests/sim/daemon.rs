//! A daemon on a simulated host, and its sudden end.

use std::sync::Arc;
use std::time::Duration;

use stead_controllers::daemon::{Controllers, Drifts, Settings};
use stead_controllers::kinds;
use stead_controllers::mediator;
use stead_controllers::network::admission;
use stead_controllers::node;
use stead_controllers::runtime::{NoBoundary, NoJournal};
use stead_controllers::sim::{World, mediator_settings, network_spec, node_spec};
use stead_controllers::store::{Kinds, MemoryKv, PlainSealer, Store};
use stead_schemas::disk::Disk;
use stead_schemas::image::Image;
use stead_schemas::ingress::Ingress;
use stead_schemas::instance::Instance;
use stead_schemas::mediation::Mediator;
use stead_schemas::names::Uid;
use stead_schemas::network::{Network, NetworkSpec, Nic};
use stead_schemas::snapshot::Snapshot;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Virtual time between two full resyncs.
const RESYNC: Duration = Duration::from_secs(60);

pub(crate) struct Daemon {
    pub(crate) store: Store,
    tasks: JoinSet<()>,
    /// Shutdown signal that is never sent: a daemon here only ever dies.
    _shutdown: watch::Sender<bool>,
}

impl Daemon {
    /// Starts on the durable state.
    pub(crate) async fn start(world: &World, kv: &MemoryKv, seed: u64) -> Self {
        Self::start_as(world, kv, seed, network_spec(), RESYNC).await
    }

    /// Starts on the durable state with another network and time between two full resyncs.
    pub(crate) async fn start_as(
        world: &World,
        kv: &MemoryKv,
        seed: u64,
        network: NetworkSpec,
        resync: Duration,
    ) -> Self {
        Self::open(world, kv, kinds(), seed, network, resync).await
    }

    /// Starts on the durable state with a store that has other kinds than the program's.
    pub(crate) async fn start_with_kinds(world: &World, kv: &MemoryKv, kinds: Kinds) -> Self {
        Self::open(world, kv, kinds, 1, network_spec(), RESYNC).await
    }

    async fn open(
        world: &World,
        kv: &MemoryKv,
        kinds: Kinds,
        seed: u64,
        network: NetworkSpec,
        resync: Duration,
    ) -> Self {
        let host = Arc::new(world.clone());
        let opened = Store::open(kv.clone(), Arc::new(PlainSealer), host.clone(), host.clone(), kinds);
        let (store, writer) = opened.expect("a store opens at any durable point");
        let mut tasks = JoinSet::new();
        tasks.spawn(writer.run(std::future::pending::<()>()));
        let declared = store.transact(move |tx| admission::declare_network(tx, network)).await;
        declared.expect("the network is declared");
        store.transact(|tx| node::admission::declare(tx, node_spec())).await.expect("the node is declared");
        let declared = store.transact(|tx| mediator::admission::declare(tx, mediator_settings())).await;
        declared.expect("the mediator is declared");
        let settings = Settings {
            store: store.clone(),
            clock: host,
            boundary: Arc::new(NoBoundary),
            journal: Arc::new(NoJournal),
            resync,
            seed,
            tap_prefix: "st".to_owned(),
        };
        let (controllers, drifts) = Controllers::new(world, &settings);
        let (shutdown, stopping) = watch::channel(false);
        tasks.spawn(controllers.run(stopping));
        tasks.spawn(listen(world.clone(), drifts, store.clone()));
        node::observed(&store).await;
        Self { store, tasks, _shutdown: shutdown }
    }

    /// Runs a task that ends with the daemon.
    pub(crate) fn spawn(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(task);
    }

    /// Drops every future at its current await.
    pub(crate) async fn die(&mut self, world: &World) {
        self.tasks.abort_all();
        while self.tasks.join_next().await.is_some() {}
        world.daemon_died();
    }
}

/// Acts as the monitors do: names are hints, and lost ones mean everything. A name without a record may be of any
/// kind.
async fn listen(world: World, drifts: Drifts, store: Store) {
    let mut changes = world.changes();
    let all = |uid: &Uid| {
        [
            (&drifts.images, store.get::<Image>(uid).is_some()),
            (&drifts.disks, store.get::<Disk>(uid).is_some()),
            (&drifts.networks, store.get::<Network>(uid).is_some()),
            (&drifts.nics, store.get::<Nic>(uid).is_some()),
            (&drifts.instances, store.get::<Instance>(uid).is_some()),
            (&drifts.snapshots, store.get::<Snapshot>(uid).is_some()),
            (&drifts.ingresses, store.get::<Ingress>(uid).is_some()),
            (&drifts.mediators, store.get::<Mediator>(uid).is_some()),
        ]
    };
    let nobody: Uid = "nobody000000000000000000".parse().expect("valid");
    loop {
        match changes.recv().await {
            Ok(Some(uid)) => {
                let kinds = all(&uid);
                let is_known = kinds.iter().any(|(_, is_its)| *is_its);
                let concerned = kinds.iter().filter(|(_, is_its)| *is_its || !is_known);
                concerned.for_each(|(drift, _)| drift.object(uid.clone()));
            }
            Ok(None) | Err(RecvError::Lagged(_)) => {
                all(&nobody).iter().for_each(|(drift, _)| drift.everything());
            }
            Err(RecvError::Closed) => return,
        }
    }
}
