//! The one file that knows every concrete type: builds the daemon out of its parts and runs it.
//!
//! Order: data directory (lock, key, database) -> store -> adapters -> reconcilers -> monitors ->
//! API. VMs are not touched by start or stop: a new daemon finds them by observation.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context;
use futures::StreamExt;
use futures::future::BoxFuture;
use stead_controllers::daemon::{Controllers, Drifts, Ports, Settings};
use stead_controllers::host::HostError;
use stead_controllers::ingress::reach;
use stead_controllers::store::{Kinds, Store};
use stead_controllers::vm::admission;
use stead_schemas::api::{
    Capabilities, HostView, ImagesView, InstanceDefaults, InstanceStats, NetworkModel, PushCredentials,
    Runtime, RuntimeView, ServerView,
};
use stead_schemas::disk::Disk;
use stead_schemas::guest::Request;
use stead_schemas::health::{HealthOf, Tally};
use stead_schemas::image::Image;
use stead_schemas::ingress::Ingress;
use stead_schemas::instance::{Hypervisor, Instance, State};
use stead_schemas::limits::CONSOLE_LOG_MAX;
use stead_schemas::meta::Object;
use stead_schemas::names::{Digest, Platform, Uid};
use stead_schemas::network::{Network, NetworkSpec, Port};
use stead_schemas::schedule::SnapshotSchedule;
use stead_schemas::snapshot::Snapshot;
use stead_schemas::volume::Volume;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use crate::agent::{AgentError, AgentStream};
use crate::api::{self, ApiConfig, ApiState, Backend, ImportStream, LogError, LogStream, ServerLimits};
use crate::config::Config;
use crate::failpoint;
use crate::host::boot_files::BootFiles;
use crate::host::cgroup::Cgroups;
use crate::host::disks::Ext4Files;
use crate::host::doors::TapDoors;
use crate::host::flows::{Conntrack, Interest, Moved};
use crate::host::monitor::{Heard, monitor_table};
use crate::host::netlink::Netlink;
use crate::host::nft::Nft;
use crate::host::oci::{Oci, OciConfig};
use crate::host::probe::{ProbeConfig, Prober};
use crate::host::process::find_program;
use crate::host::usage::Usage;
use crate::host::{Scope, journal::Journals, watch_directories::DirectoryWatches, watch_files};
use crate::hypervisor::Accelerator;
use crate::hypervisor::qemu::{self, Qemu, QemuConfig};
use crate::ingress::{HttpListeners, IngressConfig};
use crate::store::{SystemClock, open, token_key};

/// For a request's head; a client on a bad line needs a second.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Of instances that name none.
const DEFAULT_HYPERVISOR: Hypervisor = Hypervisor::Qemu;
/// Open requests at shutdown; verbs that wait are cut, their wishes are stored.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);

/// Drift reaches runners that are made after the adapters that report it.
#[derive(Clone, Default)]
struct Reports(Arc<OnceLock<Drifts>>);

impl Reports {
    fn tell(&self, report: impl FnOnce(&Drifts)) {
        // Before the runners are there nothing is lost: they begin by looking at everything.
        if let Some(drifts) = self.0.get() {
            report(drifts);
        }
    }
}

/// Kinds of the store.
#[must_use]
pub fn kinds() -> Kinds {
    Kinds::new()
        .with::<Instance>()
        .with::<Image>()
        .with::<Disk>()
        .with::<Network>()
        .with::<Port>()
        .with::<Snapshot>()
        .with::<SnapshotSchedule>()
        .with::<Volume>()
        .with::<Ingress>()
}

/// Runs the daemon until SIGTERM or SIGINT.
///
/// # Errors
/// When a part cannot be built; the chain says which and why.
pub async fn serve(config: Config) -> anyhow::Result<()> {
    let directory = open(&config.data_dir, kinds()).context("cannot open the store")?;
    let (store, _lock) = (directory.store, directory.lock);
    let (end, ending) = watch::channel(false);
    let writer = tokio::spawn(directory.writer.run(ended(ending.clone())));
    declare_network(&store, &config).await?;

    let reports = Reports::default();
    let binary = find_program(&config.qemu).unwrap_or_else(|| config.qemu.clone());
    let hypervisors = qemu::hypervisors(&binary).await;
    // Beside the consoles' logs, and removed with them.
    let journals = Arc::new(Journals::new(config.data_dir.join("logs")).context("cannot write logs")?);
    let host = Host::build(&config, &reports, &store, journals.clone(), binary, hypervisors)?;
    let settings = Settings {
        store: store.clone(),
        clock: Arc::new(SystemClock),
        boundary: failpoint::boundary(config.failpoint.as_deref())?,
        journal: journals.clone(),
        resync: config.resync(),
        seed: u64::from(std::process::id()),
        tap_prefix: config.tap_prefix.clone(),
    };
    let capabilities = host.capabilities(&config);
    let backend = Host::backend(&host, &config);
    let of_monitors = store.clone();
    let (controllers, drifts) = Controllers::new(host.ports.clone(), &settings);
    // Set once, here.
    let _ = reports.0.set(drifts);
    let (stop_controllers, stopping) = watch::channel(false);
    let controllers = tokio::spawn(controllers.run(stopping));
    host.monitor(&config, &reports, &of_monitors)?;

    let keys = api::auth::Keys::new(&token_key(&config.data_dir).context("cannot read the token key")?);
    let state = ApiState::new(ApiConfig {
        store,
        keys,
        backend: Arc::new(backend),
        defaults: InstanceDefaults {
            platform: host_platform(),
            hypervisor: DEFAULT_HYPERVISOR,
            // As long as the process; once.
            hypervisors: host.hypervisors.clone().leak(),
        },
        tap_prefix: config.tap_prefix.clone(),
        capabilities,
        requests_max: config.requests_max,
        sockets_max: config.sockets_max,
    });
    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("cannot listen on {}", config.listen))?;
    tracing::info!(address = %listener.local_addr()?, "listening");
    let limits = ServerLimits {
        connections_max: config.connections_max,
        header_timeout: HEADER_TIMEOUT,
        grace: SHUTDOWN_GRACE,
    };
    api::serve(listener, api::router(state), limits, terminated()).await?;
    // Passes first, then the store that they write to.
    let _ = stop_controllers.send(true);
    controllers.await.context("the controllers failed")?;
    let _ = end.send(true);
    writer.await.context("the store's writer failed")?;
    journals.flush(SHUTDOWN_GRACE);
    tracing::info!("ended; VMs run on");
    Ok(())
}

async fn ended(mut ending: watch::Receiver<bool>) {
    drop(ending.wait_for(|&is_over| is_over).await);
}

async fn terminated() {
    let listen = |kind| signal(kind).expect("signal handlers can be installed in a running runtime");
    let (mut term, mut int) = (listen(SignalKind::terminate()), listen(SignalKind::interrupt()));
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}

async fn declare_network(store: &Store, config: &Config) -> anyhow::Result<()> {
    let spec = NetworkSpec {
        bridge: config.bridge.clone(),
        gateway: config.gateway,
        dns: config.dns.clone(),
        table: config.table.clone(),
    };
    let declared = store.transact(move |tx| admission::declare_network(tx, spec)).await;
    declared
        .map_err(|error| match error {
            stead_controllers::store::TransactError::Refused(refused) => anyhow::anyhow!(refused),
            stead_controllers::store::TransactError::Store(error) => anyhow::anyhow!(error),
        })
        .context("cannot declare the network")
}

fn host_platform() -> Platform {
    if cfg!(target_arch = "aarch64") { Platform::LinuxArm64 } else { Platform::LinuxAmd64 }
}

/// The real host.
struct Host {
    ports: Ports<Qemu, Oci, Netlink, Nft, Ext4Files, Prober, Conntrack, TapDoors, HttpListeners>,
    has_cgroups: bool,
    /// On directories of logs, for consoles and for whoever follows one.
    watches: DirectoryWatches,
    /// That VMs can be launched on here.
    hypervisors: Vec<Hypervisor>,
}

impl Host {
    fn build(
        config: &Config,
        reports: &Reports,
        store: &Store,
        journals: Arc<Journals>,
        binary: PathBuf,
        hypervisors: Vec<Hypervisor>,
    ) -> anyhow::Result<Self> {
        let cache = config.data_dir.join("cache");
        let boot_files = BootFiles::new(config.kernel_dir(), cache);
        // Instances say so in their conditions; the API and what runs already do not depend on it.
        if let Err(error) = boot_files.get() {
            tracing::error!(error = error.chain(), "no VM can be started until there is a guest kernel");
        }
        let cgroups = Cgroups::probe(config.bridge.as_str());
        let has_cgroups = cgroups.is_enforced();
        let of_images = reports.clone();
        let images = Oci::open(
            OciConfig {
                directory: config.data_dir.join("images"),
                plain_http_hosts: config.plain_http_hosts.clone(),
                jobs_max: config.image_concurrency,
                platform: host_platform(),
            },
            move || of_images.tell(|drifts| drifts.images.everything()),
        )
        .map_err(chained)?;
        let disk_dir = config.data_dir.join("disks");
        let disks =
            Ext4Files::new(disk_dir.clone(), config.data_dir.join("snapshots"), config.disk_reserve())
                .map_err(chained)?;
        let (rootfs, of_machines) = (images.clone(), reports.clone());
        let watches = DirectoryWatches::default();
        let machines = Qemu::new(QemuConfig {
            binary,
            run_dir: config.run_dir.clone(),
            data_dir: config.data_dir.clone(),
            boot_files,
            accelerator: Accelerator::probe(),
            console_log_max: CONSOLE_LOG_MAX,
            watches: watches.clone(),
            cgroups,
            rootfs: Box::new(move |digest| rootfs.rootfs(digest)),
            disk: Box::new(move |owner| Ext4Files::path(&disk_dir, owner)),
            disk_reserve: config.disk_reserve(),
            noted: Arc::new(move |owner, text| journals.note(owner, text)),
            changed: Arc::new(move |owner| {
                of_machines.tell(|drifts| {
                    // An id names an instance or a snapshot; the other kind finds no such object.
                    drifts.instances.object(owner.clone());
                    drifts.snapshots.object(owner.clone());
                });
            }),
        });
        let scope =
            Scope::new(config.bridge.as_str()).context("the bridge's name cannot mark what is ours")?;
        let links = Netlink::new(scope).map_err(chained)?;
        let (agents, of_probes) = (machines.clone(), reports.clone());
        let probes = Prober::new(ProbeConfig {
            bridge: config.bridge.clone(),
            open_stream: Box::new(move |owner, request| {
                let (agents, owner) = (agents.clone(), owner.clone());
                Box::pin(async move { agents.open_stream(&owner, request).await })
            }),
            changed: Arc::new(move |owner| of_probes.tell(|drifts| drifts.instances.object(owner.clone()))),
        })
        .map_err(chained)?;
        let of_doors = reports.clone();
        let doors = TapDoors::new(Arc::new(move |owner| {
            of_doors.tell(|drifts| drifts.instances.object(owner.clone()));
        }));
        let listeners = listeners(config, reports, store);
        let (firewall, flows) = (Nft::new(), Conntrack::new());
        let ports = Ports { machines, images, links, firewall, disks, probes, flows, doors, listeners };
        Ok(Self { ports, has_cgroups, watches, hypervisors })
    }

    fn backend(&self, config: &Config) -> HostBackend {
        HostBackend {
            images: self.ports.images.clone(),
            machines: self.ports.machines.clone(),
            probes: self.ports.probes.clone(),
            listeners: self.ports.listeners.clone(),
            data_dir: config.data_dir.clone(),
            watches: self.watches.clone(),
        }
    }

    /// Starts everything that notices drift.
    fn monitor(&self, config: &Config, reports: &Reports, store: &Store) -> anyhow::Result<()> {
        follow(self.ports.links.monitor().map_err(chained)?, reports.clone(), store.clone());
        follow(monitor_table(&config.table).map_err(chained)?, reports.clone(), store.clone());
        follow_flows(&self.ports.flows, reports.clone(), store.clone());
        let of_disks = reports.clone();
        watch_files::watch_deletions(config.data_dir.join("disks"), move |name| {
            let uid: Option<Uid> = name.and_then(|name| name.split('.').next()?.parse().ok());
            of_disks.tell(|drifts| match uid {
                Some(uid) => drifts.disks.object(uid),
                None => drifts.disks.everything(),
            });
        })
        .map_err(chained)?;
        let of_images = reports.clone();
        watch_files::watch_deletions(config.data_dir.join("images/rootfs"), move |_| {
            of_images.tell(|drifts| drifts.images.everything());
        })
        .map_err(chained)
    }

    fn capabilities(&self, config: &Config) -> Capabilities {
        let runtime = |hypervisor: Hypervisor| RuntimeView {
            name: hypervisor.as_str().to_owned(),
            available: self.hypervisors.contains(&hypervisor),
            features: ["fork", "snapshots", "standby"].map(ToOwned::to_owned).to_vec(),
            accelerator: Some(self.ports.machines.accelerator().as_str().to_owned()),
        };
        let RuntimeView { name, available, .. } = runtime(DEFAULT_HYPERVISOR);
        Capabilities {
            server: ServerView {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                api_version: "0.3.0".to_owned(),
            },
            host: HostView {
                os: "linux".to_owned(),
                arch: host_platform().architecture().to_owned(),
                cgroups: self.has_cgroups,
            },
            default_runtime: Runtime { name, available },
            // By name.
            runtimes: [Hypervisor::Qemu, Hypervisor::QemuMicrovm].map(runtime).to_vec(),
            network: NetworkModel {
                model: "bridge".to_owned(),
                guest_to_guest: false,
                gateway: Some(config.gateway.address.to_string()),
                subnet: Some(config.gateway.subnet().to_string()),
            },
            images: ImagesView {
                platforms: vec![host_platform().as_str().to_owned()],
                default_platform: host_platform().as_str().to_owned(),
            },
            features: ["exec", "images", "ingress", "instances", "logs", "volumes"]
                .map(ToOwned::to_owned)
                .to_vec(),
        }
    }
}

fn listeners(config: &Config, reports: &Reports, store: &Store) -> HttpListeners {
    let (reports, store) = (reports.clone(), store.clone());
    HttpListeners::new(IngressConfig {
        address: config.ingress_address,
        api_port: config.listen.port(),
        reach: Arc::new(move |word, port| reach(&store, word, port)),
        changed: Arc::new(move |owner| reports.tell(|drifts| drifts.ingresses.object(owner.clone()))),
    })
}

fn chained(error: HostError) -> anyhow::Error {
    anyhow::anyhow!(error.chain())
}

/// Passes on what a network monitor heard.
fn follow(mut heard: mpsc::Receiver<Heard>, reports: Reports, store: Store) {
    tokio::spawn(async move {
        while let Some(heard) = heard.recv().await {
            reports.tell(|drifts| match heard {
                // A mark names a network or a port; the other kind finds no such object of its own.
                Heard::Owner(uid) => {
                    drifts.networks.object(uid.clone());
                    // A running guest may have lost its TAP.
                    let owner = store.get::<Port>(&uid).and_then(|port| port.meta.owner.clone());
                    if let Some(owner) = owner {
                        drifts.instances.object(owner.uid);
                    }
                    drifts.ports.object(uid);
                }
                Heard::Port(_) => drifts.ports.everything(),
                Heard::Host => drifts.networks.everything(),
                Heard::Everything => {
                    drifts.networks.everything();
                    drifts.ports.everything();
                }
            });
        }
    });
}

/// Passes on where connections came and went, to the instances that may go to standby by it.
fn follow_flows(flows: &Conntrack, reports: Reports, store: Store) {
    let of_monitor = store.clone();
    let mut moves = flows.monitor(move || {
        let counted = counted(&of_monitor);
        let patience = counted.values().map(|(_, timeout)| *timeout).min();
        Interest { addresses: counted.into_keys().collect(), patience }
    });
    tokio::spawn(async move {
        while let Some(moved) = moves.recv().await {
            let owners = counted(&store);
            let concerned: Vec<Uid> = match moved {
                Moved::At(address) => owners.get(&address).map(|(uid, _)| uid.clone()).into_iter().collect(),
                Moved::Anywhere => owners.into_values().map(|(uid, _)| uid).collect(),
            };
            reports.tell(|drifts| concerned.iter().for_each(|uid| drifts.instances.object(uid.clone())));
        }
    });
}

/// Addresses of running instances whose policy counts connections, with its timeout.
fn counted(store: &Store) -> BTreeMap<Ipv4Addr, (Uid, Duration)> {
    let of = |instance: &Object<Instance>| {
        let timeout = instance.spec.auto_standby.as_ref()?.timeout()?;
        let port = store.get::<Port>(instance.spec.allocated.port.as_ref()?)?;
        Some((port.spec.address, (instance.meta.uid.clone(), timeout)))
    };
    let instances = store.list::<Instance>().into_iter();
    let running = instances.filter(|instance| instance.status.state == State::Running);
    running.filter_map(|instance| of(&instance)).collect()
}

/// The host as the API sees it.
struct HostBackend {
    images: Oci,
    machines: Qemu,
    probes: Prober,
    listeners: HttpListeners,
    data_dir: PathBuf,
    watches: DirectoryWatches,
}

impl Backend for HostBackend {
    fn keep_credentials(&self, image: &Uid, credentials: PushCredentials) {
        self.images.keep_credentials(image, credentials);
    }

    fn import(&self, mut archive: ImportStream) -> BoxFuture<'_, Result<Digest, HostError>> {
        Box::pin(async move {
            let failed = |error| HostError::io("receive", "an archive", error);
            let scratch = tempfile::NamedTempFile::new_in(self.images.scratch()).map_err(failed)?;
            let mut file = tokio::fs::File::from_std(scratch.reopen().map_err(failed)?);
            while let Some(chunk) = archive.next().await {
                file.write_all(&chunk.map_err(failed)?).await.map_err(failed)?;
            }
            file.flush().await.map_err(failed)?;
            self.images.import(scratch.path().to_owned()).await
        })
    }

    fn log<'a>(
        &'a self,
        instance: &'a Uid,
        source: &'a str,
        tail: usize,
        follows: bool,
    ) -> BoxFuture<'a, Result<LogStream, LogError>> {
        Box::pin(crate::log_sources::open(&self.data_dir, &self.watches, instance, source, tail, follows))
    }

    fn usage(&self, instance: &Uid, pid: Option<u32>, tap: Option<&str>) -> InstanceStats {
        let usage = Usage::read(pid, instance.as_str(), tap);
        InstanceStats {
            cpu_seconds: usage.cpu_seconds,
            memory_rss_bytes: usage.resident_bytes,
            memory_vms_bytes: usage.virtual_bytes,
            network_rx_bytes: usage.received_bytes,
            network_tx_bytes: usage.sent_bytes,
            ..InstanceStats::default()
        }
    }

    fn health(&self, instance: &Uid) -> Option<(HealthOf, Tally)> {
        self.probes.seen(instance).map(|seen| (seen.of, seen.tally))
    }

    fn can_listen(&self, port: u16) -> bool {
        // What cannot be found out is told by the reconciler.
        self.listeners.can_listen(port).unwrap_or(true)
    }

    fn open_stream<'a>(
        &'a self,
        instance: &'a Uid,
        request: Request,
    ) -> BoxFuture<'a, Result<AgentStream, AgentError>> {
        Box::pin(self.machines.open_stream(instance, request))
    }
}
