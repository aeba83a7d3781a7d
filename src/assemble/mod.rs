//! The only file that knows every concrete type: it builds the daemon out of its parts and runs it.
//!
//! Order: data directory (lock, key, database) -> store -> adapters -> reconcilers -> monitors -> API. Start
//! and stop do not touch VMs: a new daemon finds them by observation.

mod backups;
mod descriptors;
mod monitors;
mod ports;

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context;
use futures::future::BoxFuture;
use stead_controllers::daemon::{Controllers, Drifts, Settings};
use stead_controllers::host::HostError;
use stead_controllers::image::meaning;
use stead_controllers::ingress::reach;
use stead_controllers::kinds;
use stead_controllers::store::{Store, StoreError};
use stead_controllers::vm::admission;
use stead_schemas::api::{
    Capabilities, HostView, ImagesView, InstanceDefaults, InstanceStats, NetworkModel, PushCredentials,
    Runtime, RuntimeView, ServerView,
};
use stead_schemas::capabilities::VmmCapabilities;
use stead_schemas::guest::Request;
use stead_schemas::health::{HealthOf, Tally};
use stead_schemas::instance::Hypervisor;
use stead_schemas::limits::{CLIENT_STALL_MAX, CONSOLE_LOG_MAX};
use stead_schemas::names::{Platform, Uid};
use stead_schemas::network::{GuestReach, NetworkSpec, Resolver};
use tokio::net::TcpListener;
use tokio::sync::watch;

use self::backups::Backups;
use self::ports::Ports;
use crate::api::{
    self, ApiConfig, ApiState, Audit, Backend, ImportStream, Imported, LogError, LogStream, ServerLimits,
};
use crate::config::Config;
use crate::failpoint;
use crate::guest_channel::{AgentError, AgentStream};
use crate::host::boot_files::BootFiles;
use crate::host::cgroup::Cgroups;
use crate::host::disks::Ext4Files;
use crate::host::doors::TapDoors;
use crate::host::flows::Conntrack;
use crate::host::monitor::monitor_table;
use crate::host::netlink::Netlink;
use crate::host::nft::Nft;
use crate::host::oci::{Oci, Target};
use crate::host::probe::{ProbeConfig, Prober};
use crate::host::usage::Usage;
use crate::host::{Scope, journal::Journals, watch_directories::DirectoryWatches, watch_files};
use crate::hypervisor::{Accelerator, Drivers, Hypervisors, HypervisorsConfig};
use crate::ingress::{HttpListeners, IngressConfig};
use crate::signals::{ended, terminated};
use crate::store::{SystemClock, close_new_files, identity, mark, open, private_directory};

/// Time for a request's head; a client on a slow line needs a second.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// The hypervisor of instances that name none.
const DEFAULT_HYPERVISOR: Hypervisor = Hypervisor::Qemu;
/// Time for open requests at shutdown; verbs that wait are cut, and their specs are stored.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);

/// A holder of the runners' drift reports, which is filled later: the adapters that report drift are made
/// before the runners.
#[derive(Clone, Default)]
struct Reports(Arc<OnceLock<Drifts>>);

impl Reports {
    fn tell(&self, report: impl FnOnce(&Drifts)) {
        // No report is lost before the runners exist: they begin by observing all objects.
        if let Some(drifts) = self.0.get() {
            report(drifts);
        }
    }
}

/// Runs the daemon until SIGTERM or SIGINT.
///
/// # Errors
/// Fails when a part cannot be built; the error chain names the part and the reason.
pub async fn serve(config: Config) -> anyhow::Result<()> {
    close_new_files();
    descriptors::raise();
    identity::check(&config.data_dir, &config.run_dir).context("refused to start beside living VMs")?;
    let directory = open(&config.data_dir, kinds()).context("cannot open the store")?;
    private_directory(&config.run_dir).context("cannot use the run directory")?;
    identity::record(&config.data_dir, &config.run_dir).context("cannot record the store's identity")?;
    let (store, _lock) = (directory.store, directory.lock);
    let (end, ending) = watch::channel(false);
    let writer = tokio::spawn(directory.writer.run(ended(ending.clone())));
    declare_network(&store, &config).await?;
    mark::keep(config.data_dir.clone(), store.clone()).await;

    let reports = Reports::default();
    let drivers = Drivers::built_in(&config.programs(), Accelerator::probe());
    let hypervisors = drivers.probe().await;
    // The journals are kept beside the consoles' logs, and removed with them.
    let journals = Arc::new(Journals::new(config.data_dir.join("logs")).context("cannot write logs")?);
    let host = Host::build(&config, &reports, &store, journals.clone(), drivers, hypervisors)?;
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
    let backend = Host::backend(&host, &config, store.clone());
    let for_monitors = store.clone();
    let (controllers, drifts) = Controllers::new(&host.ports, &settings);
    // The reports are set only here, once.
    let _ = reports.0.set(drifts);
    let (stop_controllers, stopping) = watch::channel(false);
    let controllers = tokio::spawn(controllers.run(stopping));
    host.monitor(&config, &reports, &for_monitors)?;

    let keys = api::tokens::load(&config.data_dir).context("cannot read the token keys")?;
    tokio::spawn(api::tokens::follow(config.data_dir.clone(), keys.clone()));
    let audit = Audit::open(&config.data_dir).context("cannot open the audit log")?;
    let state = ApiState::new(ApiConfig {
        store,
        keys,
        backend: Arc::new(backend),
        defaults: InstanceDefaults {
            platform: host_platform(),
            hypervisor: DEFAULT_HYPERVISOR,
            // The list lives as long as the process, and is leaked once.
            hypervisors: host.hypervisors.clone().leak(),
        },
        tap_prefix: config.tap_prefix.clone(),
        capabilities,
        requests_max: config.requests_max,
        sockets_max: config.sockets_max,
        shows_secrets: config.show_secrets,
        requires_permissions: config.require_permissions,
        audit: audit.clone(),
    });
    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("cannot listen on {}", config.listen))?;
    tracing::info!(address = %listener.local_addr()?, "listening");
    let limits = ServerLimits {
        connections_max: config.connections_max,
        connections_per_client_max: config.connections_per_client_max,
        stall_max: CLIENT_STALL_MAX,
        header_timeout: HEADER_TIMEOUT,
        grace: SHUTDOWN_GRACE,
    };
    api::serve(listener, api::router(state), limits, terminated()).await?;
    let _ = tokio::task::spawn_blocking(move || audit.flush()).await;
    // The passes end first, then the store that they write to.
    let _ = stop_controllers.send(true);
    controllers.await.context("the controllers failed")?;
    let _ = end.send(true);
    writer.await.context("the store's writer failed")?;
    journals.flush(SHUTDOWN_GRACE);
    tracing::info!("ended; VMs run on");
    Ok(())
}

async fn declare_network(store: &Store, config: &Config) -> anyhow::Result<()> {
    let spec = NetworkSpec {
        bridge: config.bridge.clone(),
        gateway: config.gateway,
        dns: config.dns.clone(),
        table: config.table.clone(),
        reach: GuestReach {
            host_ports: config.guest_host_ports.clone(),
            networks: config.guest_networks.clone(),
        },
        resolver: Resolver { search: config.dns_search.clone(), options: config.dns_options.clone() },
        mtu: config.guest_mtu,
    };
    let declared = store.transact(move |tx| admission::declare_network(tx, spec)).await;
    declared
        .map_err(|error| match error {
            stead_controllers::store::TransactError::Refused(refused) => anyhow::anyhow!(refused),
            stead_controllers::store::TransactError::Store(error) => anyhow::anyhow!(error),
        })
        .context("cannot declare the network")
}

/// Returns the wire's names of a hypervisor's capabilities. The disk of every VM can be captured.
fn features(has: VmmCapabilities) -> Vec<String> {
    let all = [("fork", has.fork_memory), ("snapshots", true), ("standby", has.standby)];
    all.into_iter().filter(|(_, has)| *has).map(|(name, _)| name.to_owned()).collect()
}

fn host_platform() -> Platform {
    if cfg!(target_arch = "aarch64") { Platform::LinuxArm64 } else { Platform::LinuxAmd64 }
}

/// The real host.
struct Host {
    ports: Ports,
    has_cgroups: bool,
    /// Watches on directories of logs, for consoles and for readers that follow a log.
    watches: DirectoryWatches,
    /// Hypervisors that VMs can be launched with on this host.
    hypervisors: Vec<Hypervisor>,
}

impl Host {
    fn build(
        config: &Config,
        reports: &Reports,
        store: &Store,
        journals: Arc<Journals>,
        drivers: Drivers,
        hypervisors: Vec<Hypervisor>,
    ) -> anyhow::Result<Self> {
        let cache = config.data_dir.join("cache");
        let boot_files = BootFiles::new(config.kernel_dir(), cache);
        // Instances report a missing kernel in their conditions; the API and running VMs do not depend on
        // it.
        if let Err(error) = boot_files.get() {
            tracing::error!(error = error.chain(), "no VM can be started until there is a guest kernel");
        }
        let cgroups = Cgroups::probe(config.bridge.as_str());
        let has_cgroups = cgroups.is_enforced();
        let for_images = reports.clone();
        let images = Oci::open(
            config.images(Target::of_guests(host_platform(), Accelerator::probe() == Accelerator::Kvm)),
            move |owner| for_images.tell(|drifts| drifts.images.object(owner.clone())),
        )
        .map_err(chained)?;
        let disk_dir = config.data_dir.join("disks");
        let disks =
            Ext4Files::new(disk_dir.clone(), config.data_dir.join("snapshots"), config.disk_reserve())
                .map_err(chained)?;
        let (rootfs, for_machines) = (images.clone(), reports.clone());
        let watches = DirectoryWatches::default();
        let machines = Hypervisors::new(HypervisorsConfig {
            drivers,
            run_dir: config.run_dir.clone(),
            data_dir: config.data_dir.clone(),
            boot_files,
            console_log_max: CONSOLE_LOG_MAX,
            watches: watches.clone(),
            cgroups,
            rootfs: Box::new(move |digest| rootfs.rootfs(digest)),
            disk: Box::new(move |owner| Ext4Files::path(&disk_dir, owner)),
            disk_reserve: config.disk_reserve(),
            noted: Arc::new(move |owner, text| journals.note(owner, text)),
            changed: Arc::new(move |owner| {
                for_machines.tell(|drifts| {
                    // An id names an instance or a snapshot; the reconciler of the other kind finds no such
                    // object.
                    drifts.instances.object(owner.clone());
                    drifts.snapshots.object(owner.clone());
                });
            }),
        });
        let scope =
            Scope::new(config.bridge.as_str()).context("the bridge's name cannot mark what is ours")?;
        let links = Netlink::new(scope).map_err(chained)?;
        let (agents, for_probes) = (machines.clone(), reports.clone());
        let probes = Prober::new(ProbeConfig {
            open_stream: Box::new(move |owner, request| {
                let (agents, owner) = (agents.clone(), owner.clone());
                Box::pin(async move { agents.open_stream(&owner, request).await })
            }),
            changed: Arc::new(move |owner| for_probes.tell(|drifts| drifts.instances.object(owner.clone()))),
        })
        .map_err(chained)?;
        let for_doors = reports.clone();
        let doors = TapDoors::new(Arc::new(move |owner| {
            for_doors.tell(|drifts| drifts.instances.object(owner.clone()));
        }));
        let listeners = listeners(config, reports, store);
        let (firewall, flows) = (Nft::new(), Conntrack::new());
        let ports =
            Ports { hypervisors: machines, images, links, firewall, disks, probes, flows, doors, listeners };
        Ok(Self { ports, has_cgroups, watches, hypervisors })
    }

    fn backend(&self, config: &Config, store: Store) -> HostBackend {
        HostBackend {
            backups: Backups::new(store.clone(), config.data_dir.clone()),
            store,
            images: self.ports.images.clone(),
            machines: self.ports.hypervisors.clone(),
            probes: self.ports.probes.clone(),
            listeners: self.ports.listeners.clone(),
            data_dir: config.data_dir.clone(),
            watches: self.watches.clone(),
        }
    }

    /// Starts all monitors that notice drift.
    fn monitor(&self, config: &Config, reports: &Reports, store: &Store) -> anyhow::Result<()> {
        monitors::follow(self.ports.links.monitor().map_err(chained)?, reports.clone(), store.clone());
        monitors::follow(monitor_table(&config.table).map_err(chained)?, reports.clone(), store.clone());
        monitors::follow_flows(&self.ports.flows, reports.clone(), store.clone());
        let for_disks = reports.clone();
        watch_files::watch_deletions(config.data_dir.join("disks"), move |name| {
            let uid: Option<Uid> = name.and_then(|name| name.split('.').next()?.parse().ok());
            for_disks.tell(|drifts| match uid {
                Some(uid) => drifts.disks.object(uid),
                None => drifts.disks.everything(),
            });
        })
        .map_err(chained)?;
        let (for_images, store) = (reports.clone(), store.clone());
        watch_files::watch_deletions(config.data_dir.join("images/rootfs"), move |name| {
            for_images.tell(|drifts| match name.and_then(Oci::digest_of_rootfs) {
                Some(digest) => {
                    meaning(&store, &digest).into_iter().for_each(|uid| drifts.images.object(uid))
                }
                None => drifts.images.everything(),
            });
        })
        .map_err(chained)
    }

    fn capabilities(&self, config: &Config) -> Capabilities {
        let runtime = |hypervisor: Hypervisor| RuntimeView {
            name: hypervisor.as_str().to_owned(),
            available: self.hypervisors.contains(&hypervisor),
            features: self.ports.hypervisors.capabilities(hypervisor).map(features).unwrap_or_default(),
            accelerator: Some(Accelerator::probe().as_str().to_owned()),
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
            runtimes: self.ports.hypervisors.hypervisors().into_iter().map(runtime).collect(),
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

/// The host behind the API's `Backend`.
struct HostBackend {
    backups: Backups,
    store: Store,
    images: Oci,
    machines: Hypervisors,
    probes: Prober,
    listeners: HttpListeners,
    data_dir: PathBuf,
    watches: DirectoryWatches,
}

impl Backend for HostBackend {
    fn backup(&self) -> BoxFuture<'_, Result<ImportStream, StoreError>> {
        Box::pin(self.backups.begin())
    }

    fn store_failure(&self) -> Option<String> {
        self.store.health().err().map(|error| error.to_string())
    }

    fn keep_credentials(&self, image: &Uid, credentials: PushCredentials) {
        self.images.keep_credentials(image, credentials);
    }

    fn asked_by(&self, image: &Uid, client: &Arc<str>) {
        self.images.asked_by(image, client);
    }

    fn import(&self, client: &Arc<str>, archive: ImportStream) -> BoxFuture<'_, Result<Imported, HostError>> {
        let client = client.clone();
        Box::pin(async move {
            let hold = self.images.import(&client, archive).await?;
            Ok(Imported { digest: hold.digest().clone(), hold: Box::new(hold) })
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
        // If this cannot be determined, the reconciler reports it.
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
