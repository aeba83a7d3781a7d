//! The real host: its adapters, their monitors, and what it can do.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use stead_controllers::host::HostError;
use stead_controllers::image::meaning;
use stead_controllers::ingress::reach;
use stead_controllers::store::Store;
use stead_schemas::disk::Disk;
use stead_schemas::instance::Hypervisor;
use stead_schemas::limits::CONSOLE_LOG_MAX;
use stead_schemas::names::{Digest, Platform, Uid};

use super::facts::HostFacts;
use super::ports::Ports;
use super::{Reports, monitors};
use crate::config::Config;
use crate::guest_channel::Changed;
use crate::host::boot_files::BootFiles;
use crate::host::cgroup::Cgroups;
use crate::host::disks::Ext4Files;
use crate::host::flows::Conntrack;
use crate::host::monitor::monitor_table;
use crate::host::netlink::Netlink;
use crate::host::nft::Nft;
use crate::host::oci::{Oci, Target};
use crate::host::probe::{ProbeConfig, Prober};
use crate::host::volume_archives::VolumeArchives;
use crate::host::wake::TapWakeListeners;
use crate::host::{Scope, journal::Journals, watch_directories::DirectoryWatches, watch_files};
use crate::hypervisor::{Accelerator, Drivers, Hypervisors, HypervisorsConfig, Jails, UserRange};
use crate::ingress::{HttpListeners, IngressConfig};
use crate::mediation::{CarrierConfig, Carriers};

/// The real host.
pub(super) struct Host {
    pub(super) ports: Ports,
    pub(super) archives: VolumeArchives,
    /// Watches on directories of logs, for consoles and for readers that follow a log.
    pub(super) watches: DirectoryWatches,
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
        let boot_files = boot_files(config);
        let cgroups = Cgroups::probe(config.bridge.as_str());
        let has_cgroups = cgroups.is_enforced();
        let images = open_images(config, reports)?;
        let disk_dir = config.data_dir.join("disks");
        let disks = Ext4Files::new(&config.data_dir, config.disk_reserve()).map_err(chained)?;
        disks.sweep_prepared(|name| takes(store, name)).map_err(chained)?;
        let scratch = config.data_dir.join("archives");
        let archives = VolumeArchives::new(&images, disks.clone(), scratch).map_err(chained)?;
        let watches = DirectoryWatches::default();
        let jails = jails(config)?;
        let carriers = carriers(config, reports, &jails, &cgroups);
        let machines = Hypervisors::new(HypervisorsConfig {
            jails,
            accelerator: config.accelerator,
            drivers,
            run_dir: config.run_dir.clone(),
            data_dir: config.data_dir.clone(),
            boot_files,
            console_log_max: CONSOLE_LOG_MAX,
            watches: watches.clone(),
            cgroups: cgroups.clone(),
            rootfs: rootfs_of(&images),
            disk: Box::new(move |owner| Ext4Files::path(&disk_dir, owner)),
            disk_reserve: config.disk_reserve(),
            noted: Arc::new(move |owner, text| journals.note(owner, text)),
            changed: vm_changed(reports.clone()),
        });
        let scope =
            Scope::new(config.bridge.as_str()).context("the bridge's name cannot mark what is ours")?;
        let links = Netlink::new(scope).map_err(chained)?;
        let probes = prober(&machines, reports)?;
        let wake_listeners = wake_listeners(reports);
        let listeners = listeners(config, reports, store);
        let (firewall, flows) = (Nft::new(), Conntrack::new());
        let facts = HostFacts {
            hypervisors: machines.clone(),
            available: hypervisors,
            data_dir: config.data_dir.clone(),
            kernel_dir: config.kernel_dir(),
            has_cgroups,
            accelerator: config.accelerator,
            links: links.clone(),
        };
        let ports = Ports {
            hypervisors: machines,
            limits: cgroups,
            images,
            links,
            firewall,
            disks,
            probes,
            flows,
            wake_listeners,
            listeners,
            carriers,
            facts,
        };
        Ok(Self { ports, archives, watches })
    }

    /// Starts all monitors that notice drift.
    pub(super) fn monitor(&self, config: &Config, reports: &Reports, store: &Store) -> anyhow::Result<()> {
        monitors::follow(self.ports.links.monitor().map_err(chained)?, reports.clone(), store.clone());
        monitors::follow(monitor_table(&config.table).map_err(chained)?, reports.clone(), store.clone());
        monitors::follow_flows(&self.ports.flows, reports.clone(), store.clone());
        let for_disks = reports.clone();
        watch_files::watch_deletions(config.data_dir.join("disks"), move |name| {
            let uid: Option<Uid> = name.and_then(|name| name.split('.').next()?.parse().ok());
            for_disks.report(|drifts| match uid {
                Some(uid) => drifts.disks.object(uid),
                None => drifts.disks.everything(),
            });
        })
        .map_err(chained)?;
        let (for_images, store) = (reports.clone(), store.clone());
        watch_files::watch_deletions(config.data_dir.join("images/rootfs"), move |name| {
            for_images.report(|drifts| match name.and_then(Oci::digest_of_rootfs) {
                Some(digest) => {
                    meaning(&store, &digest).into_iter().for_each(|uid| drifts.images.object(uid))
                }
                None => drifts.images.everything(),
            });
        })
        .map_err(chained)
    }
}

/// Finds the boot files. Instances report a missing kernel in their conditions; the API and running VMs do not depend
/// on it.
fn boot_files(config: &Config) -> BootFiles {
    let boot_files = BootFiles::new(config.kernel_dir(), config.data_dir.join("cache"));
    if let Err(error) = boot_files.get() {
        tracing::error!(error = error.chain(), "no VM can be started until there is a guest kernel");
    }
    boot_files
}

fn open_images(config: &Config, reports: &Reports) -> anyhow::Result<Oci> {
    let reports = reports.clone();
    let target = Target::of_guests(host_platform(), config.accelerator.accelerator() == Accelerator::Kvm);
    let changed = move |owner: &Uid| reports.report(|drifts| drifts.images.object(owner.clone()));
    Oci::open(config.images(target), changed).map_err(chained)
}

/// Prepares the walls of VMMs. Their users must be nobody else's.
fn jails(config: &Config) -> anyhow::Result<Jails> {
    let users = UserRange::new(config.vm_uid_base).map_err(anyhow::Error::msg)?;
    users.check_free().context("vm_uid_base is not usable")?;
    let jails = Jails::new(users, config.run_dir.clone());
    Ok(if config.insecure_without_walls { jails.without_walls() } else { jails })
}

/// Makes the ports of the process that carries mediated egress.
fn carriers(config: &Config, reports: &Reports, jails: &Jails, cgroups: &Cgroups) -> Carriers {
    let reports = reports.clone();
    Carriers::new(CarrierConfig {
        jails: jails.clone(),
        cgroups: cgroups.clone(),
        run_dir: config.run_dir.clone(),
        data_dir: config.data_dir.clone(),
        roots: config.egress.roots.clone(),
        ended: Arc::new(move |owner| reports.report(|drifts| drifts.mediators.object(owner))),
    })
}

/// Returns the function that passes on changes of VMs and of their files.
fn vm_changed(reports: Reports) -> Changed {
    Arc::new(move |owner| {
        reports.report(|drifts| {
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
        changed: Arc::new(move |owner| reports.report(|drifts| drifts.instances.object(owner.clone()))),
    })
    .map_err(chained)
}

/// Returns the function that finds the root file system of an image's content.
fn rootfs_of(images: &Oci) -> Box<dyn Fn(&Digest) -> PathBuf + Send + Sync> {
    let images = images.clone();
    Box::new(move |digest| images.rootfs(digest))
}

fn wake_listeners(reports: &Reports) -> TapWakeListeners {
    let reports = reports.clone();
    TapWakeListeners::new(Arc::new(move |owner| {
        reports.report(|drifts| drifts.instances.object(owner.clone()))
    }))
}

fn listeners(config: &Config, reports: &Reports, store: &Store) -> HttpListeners {
    let (reports, store) = (reports.clone(), store.clone());
    HttpListeners::new(IngressConfig {
        address: config.ingress_address,
        api_port: config.listen.port(),
        reach: Arc::new(move |word, port| reach(&store, word, port)),
        changed: Arc::new(move |owner| reports.report(|drifts| drifts.ingresses.object(owner.clone()))),
    })
}

pub(super) fn host_platform() -> Platform {
    if cfg!(target_arch = "aarch64") { Platform::LinuxArm64 } else { Platform::LinuxAmd64 }
}

fn chained(error: HostError) -> anyhow::Error {
    anyhow::anyhow!(error.chain())
}

/// Returns whether a stored disk takes this prepared file.
fn takes(store: &Store, prepared: &Uid) -> bool {
    store.list::<Disk>().iter().any(|disk| disk.spec.prepared.as_ref() == Some(prepared))
}
