//! The real host: its adapters, their monitors, and what it can do.

use std::sync::Arc;

use anyhow::Context;
use stead_controllers::host::{HostError, Vmms};
use stead_controllers::image::meaning;
use stead_controllers::ingress::reach;
use stead_controllers::store::Store;
use stead_schemas::api::{
    Capabilities, HostView, ImagesView, NetworkModel, Runtime, RuntimeView, ServerView,
};
use stead_schemas::capabilities::VmmCapabilities;
use stead_schemas::instance::Hypervisor;
use stead_schemas::limits::CONSOLE_LOG_MAX;
use stead_schemas::names::{Platform, Uid};

use super::ports::Ports;
use super::{DEFAULT_HYPERVISOR, Reports, monitors};
use crate::config::Config;
use crate::guest_channel::Changed;
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
use crate::host::{Scope, journal::Journals, watch_directories::DirectoryWatches, watch_files};
use crate::hypervisor::{Accelerator, Drivers, Hypervisors, HypervisorsConfig};
use crate::ingress::{HttpListeners, IngressConfig};

/// The real host.
pub(super) struct Host {
    pub(super) ports: Ports,
    has_cgroups: bool,
    /// Watches on directories of logs, for consoles and for readers that follow a log.
    pub(super) watches: DirectoryWatches,
    /// Hypervisors that VMs can be launched with on this host.
    pub(super) hypervisors: Vec<Hypervisor>,
}

impl Host {
    pub(super) fn build(
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
        let watches = DirectoryWatches::default();
        let machines = Hypervisors::new(HypervisorsConfig {
            drivers,
            run_dir: config.run_dir.clone(),
            data_dir: config.data_dir.clone(),
            boot_files,
            console_log_max: CONSOLE_LOG_MAX,
            watches: watches.clone(),
            cgroups,
            rootfs: Box::new({
                let images = images.clone();
                move |digest| images.rootfs(digest)
            }),
            disk: Box::new(move |owner| Ext4Files::path(&disk_dir, owner)),
            disk_reserve: config.disk_reserve(),
            noted: Arc::new(move |owner, text| journals.note(owner, text)),
            changed: vm_changed(reports.clone()),
        });
        let scope =
            Scope::new(config.bridge.as_str()).context("the bridge's name cannot mark what is ours")?;
        let links = Netlink::new(scope).map_err(chained)?;
        let probes = prober(&machines, reports)?;
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

    /// Starts all monitors that notice drift.
    pub(super) fn monitor(&self, config: &Config, reports: &Reports, store: &Store) -> anyhow::Result<()> {
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

    pub(super) fn capabilities(&self, config: &Config) -> Capabilities {
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

/// Returns the function that passes on changes of VMs and of their files.
fn vm_changed(reports: Reports) -> Changed {
    Arc::new(move |owner| {
        reports.tell(|drifts| {
            // An id names an instance or a snapshot; the reconciler of the other kind finds no such object.
            drifts.instances.object(owner.clone());
            drifts.snapshots.object(owner.clone());
        });
    })
}

/// Makes the port of health probes, which reach guests through their agents.
fn prober(machines: &Hypervisors, reports: &Reports) -> anyhow::Result<Prober> {
    let (agents, reports) = (machines.clone(), reports.clone());
    Prober::new(ProbeConfig {
        open_stream: Box::new(move |owner, request| {
            let (agents, owner) = (agents.clone(), owner.clone());
            Box::pin(async move { agents.open_stream(&owner, request).await })
        }),
        changed: Arc::new(move |owner| reports.tell(|drifts| drifts.instances.object(owner.clone()))),
    })
    .map_err(chained)
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

/// Returns the wire's names of a hypervisor's capabilities. The disk of every VM can be captured.
fn features(has: VmmCapabilities) -> Vec<String> {
    let all = [("fork", has.fork_memory), ("snapshots", true), ("standby", has.standby)];
    all.into_iter().filter(|(_, has)| *has).map(|(name, _)| name.to_owned()).collect()
}

pub(super) fn host_platform() -> Platform {
    if cfg!(target_arch = "aarch64") { Platform::LinuxArm64 } else { Platform::LinuxAmd64 }
}

fn chained(error: HostError) -> anyhow::Error {
    anyhow::anyhow!(error.chain())
}
