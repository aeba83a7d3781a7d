//! The invariants of a real host and the real store, while no daemon runs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use stead::host::Scope;
use stead::host::boot_files::BootFiles;
use stead::host::cgroup::Cgroups;
use stead::host::disks::Ext4Files;
use stead::host::netlink::Netlink;
use stead::host::nft::Nft;
use stead::host::oci::{Oci, OciConfig, Target};
use stead::host::watch_directories::DirectoryWatches;
use stead::hypervisor::{
    Accelerator, Drivers, Hypervisors, HypervisorsConfig, Jails, Programs, USERS, UserRange,
    WantedAccelerator,
};
use stead_controllers::checks::{self, HostSnapshot, Records};
use stead_controllers::host::FirewallRules;
use stead_controllers::sim::World;
use stead_schemas::names::Platform;
use stead_schemas::quantity::Bytes;

use crate::fixtures::deadline;
use crate::harness::Harness;
use crate::namespace::bridge;

/// Time limit for a guest's first message to the judge's own driver.
const SETTLED_WITHIN: Duration = Duration::from_secs(60);

/// The ports in one value, as a snapshot of the host needs them.
#[derive(Clone)]
struct Host {
    machines: Hypervisors,
    limits: Cgroups,
    images: Oci,
    links: Netlink,
    firewall: Nft,
    disks: Ext4Files,
    rest: World,
}

stead_controllers::host! { Host, host:
    Vmms, Guests, Memories, InstanceLogs, Snapshots: Hypervisors = host.machines;
    Limits: Cgroups = host.limits;
    Images, ImageJobs: Oci = host.images;
    Links, Shapers: Netlink = host.links;
    Firewall: Nft = host.firewall;
    Disks: Ext4Files = host.disks;
    ..World = host.rest;
}

impl Host {
    fn of(site: &Harness) -> Self {
        let data = site.data();
        let boot_files = BootFiles::new(crate::fixtures::kernel_dir(), data.join("cache"));
        let images = Oci::open(
            OciConfig {
                directory: data.join("images"),
                plain_http_hosts: Vec::new(),
                jobs_max: 1,
                registry_allow: Vec::new(),
                target: Target::plain(Platform::LinuxAmd64),
                disk_reserve: Bytes(0),
                quota: None,
            },
            |_| {},
        )
        .expect("opened");
        let (rootfs, disks) = (images.clone(), data.join("disks"));
        Self {
            machines: Hypervisors::new(HypervisorsConfig {
                drivers: Drivers::built_in(&Programs::new(), Accelerator::probe()),
                run_dir: site.run_dir(),
                data_dir: data.clone(),
                boot_files,
                cgroups: Cgroups::probe(&bridge()),
                accelerator: WantedAccelerator::Auto,
                jails: Jails::new(UserRange::new(USERS).expect("valid"), site.run_dir()),
                rootfs: Box::new(move |digest| rootfs.rootfs(digest)),
                disk: Box::new(move |owner| Ext4Files::path(&disks, owner)),
                disk_reserve: Bytes(0),
                console_log_max: Bytes(64 << 10),
                watches: DirectoryWatches::default(),
                noted: Arc::new(|_, _| ()),
                changed: Arc::new(|_| {}),
            }),
            limits: Cgroups::probe(&bridge()),
            images,
            links: Netlink::new(Scope::new(&bridge()).expect("valid")).expect("sockets open"),
            firewall: Nft::new(),
            disks: Ext4Files::new(&data, Bytes(0)).expect("opened"),
            rest: World::new(1),
        }
    }
}

fn records(site: &Harness) -> Records {
    let directory = stead::store::open(&site.data(), stead_controllers::kinds()).expect("no daemon has it");
    Records::of(&directory.store)
}

fn tables(records: &Records) -> Vec<FirewallRules> {
    let specs = records.networks.iter().map(|network| &network.spec);
    specs
        .map(|spec| FirewallRules {
            table: spec.table.clone(),
            bridge: spec.bridge.clone(),
            subnet: spec.gateway,
            dns: spec.dns.clone(),
            reach: spec.reach.clone(),
            is_for_guests_only: true,
            mediator: spec.mediator.clone(),
        })
        .collect()
}

/// Returns the violated invariants after the daemon has ended.
async fn broken(site: &Harness) -> Vec<String> {
    let records = records(site);
    let host = Host::of(site);
    let deadline = deadline(SETTLED_WITHIN);
    loop {
        let snapshot = HostSnapshot::read(&host, &tables(&records)).await.expect("read");
        let broken = checks::settled(&records, &snapshot, Timestamp::now());
        let is_silent = broken.iter().any(|line| line.contains("phase: Silent"));
        if !is_silent || Instant::now() > deadline {
            return broken;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Ends the daemon when all its work is done, and leaves none running. Starts it again as often as necessary:
/// unfinished work is not a violation.
pub(crate) async fn settles(site: &mut Harness, after: &str) {
    let deadline = deadline(crate::harness::BOOT);
    loop {
        site.stop().await;
        let broken = broken(site).await;
        if broken.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "after {after}: {broken:#?}\n{}", site.daemon_log());
        site.start().await;
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}
