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
use stead::hypervisor::{Accelerator, Drivers, Hypervisors, HypervisorsConfig, Programs};
use stead_controllers::checks::{self, HostSnapshot, Records};
use stead_controllers::host::{
    AdoptPlan, CapturePlan, Captured, DiskFile, Disks, Firewall, FirewallRules, FirewallSeen, Forwarding,
    HostError, Images, Job, LaunchPlan, Link, LinkChange, LinkPlan, Links, Machine, Machines, Memory,
    PortRule, Resolved, Routes, Snapshots, Space, StoredImage,
};
use stead_schemas::compression::Compression;
use stead_schemas::guest::{Assumed, Config};
use stead_schemas::names::{Digest, ImageRef, LinkName, Platform, Uid};
use stead_schemas::numbers::StandbyNo;
use stead_schemas::quantity::Bytes;

use crate::namespace::bridge;
use crate::site::Site;

/// Time limit for a guest's first message to the judge's own driver.
const HEARD: Duration = Duration::from_secs(10);

/// The ports in one value, as a snapshot of the host needs them.
struct Host {
    machines: Hypervisors,
    images: Oci,
    links: Netlink,
    firewall: Nft,
    disks: Ext4Files,
}

macro_rules! forward {
    ($port:ident to $field:ident: $(fn $name:ident(&self $(, $argument:ident: $kind:ty)* $(,)?) -> $output:ty;)*) => {
        impl $port for Host {
            $(async fn $name(&self $(, $argument: $kind)*) -> $output {
                $port::$name(&self.$field $(, $argument)*).await
            })*
        }
    };
}

forward! { Machines to machines:
    fn list(&self) -> Result<Vec<Uid>, HostError>;
    fn inspect(&self, owner: &Uid) -> Result<Option<Machine>, HostError>;
    fn has_records(&self, owner: &Uid) -> Result<bool, HostError>;
    fn launch(&self, plan: &LaunchPlan) -> Result<(), HostError>;
    fn configure(&self, owner: &Uid, config: &Config) -> Result<(), HostError>;
    fn shutdown(&self, owner: &Uid) -> Result<(), HostError>;
    fn acknowledge_exit(&self, owner: &Uid) -> Result<(), HostError>;
    fn reconnect(&self, owner: &Uid, tap: &LinkName) -> Result<(), HostError>;
    fn resume(&self, owner: &Uid) -> Result<(), HostError>;
    fn pause(&self, owner: &Uid) -> Result<(), HostError>;
    fn memory(&self, owner: &Uid) -> Result<Option<Memory>, HostError>;
    fn adopt_memory(&self, plan: &AdoptPlan) -> Result<(), HostError>;
    fn compress_memory(&self, owner: &Uid, how: Compression) -> Result<(), HostError>;
    fn assume(&self, owner: &Uid, assumed: &Assumed) -> Result<(), HostError>;
    fn save(&self, owner: &Uid, standby: StandbyNo) -> Result<(), HostError>;
    fn restore(&self, plan: &LaunchPlan) -> Result<(), HostError>;
    fn discard_memory(&self, owner: &Uid) -> Result<(), HostError>;
    fn kill(&self, owner: &Uid) -> Result<(), HostError>;
    fn release(&self, owner: &Uid) -> Result<(), HostError>;
    fn discard_records(&self, owner: &Uid) -> Result<(), HostError>;
}

forward! { Snapshots to machines:
    fn list(&self) -> Result<Vec<Uid>, HostError>;
    fn inspect(&self, snapshot: &Uid) -> Result<Option<Captured>, HostError>;
    fn measure(&self, plan: &CapturePlan) -> Result<Bytes, HostError>;
    fn capture(&self, plan: &CapturePlan) -> Result<(), HostError>;
    fn compress(&self, snapshot: &Uid, how: Compression) -> Result<(), HostError>;
    fn remove(&self, snapshot: &Uid) -> Result<(), HostError>;
}

forward! { Images to images:
    fn list(&self) -> Result<Vec<Digest>, HostError>;
    fn known(&self) -> Result<Vec<Digest>, HostError>;
    fn inspect(&self, digest: &Digest) -> Result<Option<StoredImage>, HostError>;
    fn manifest(&self, digest: &Digest) -> Result<Option<Resolved>, HostError>;
    fn resolve(
        &self,
        owner: &Uid,
        reference: &ImageRef,
        platform: Platform,
        number: u64,
    ) -> Result<Option<Resolved>, HostError>;
    fn job(&self, owner: &Uid, digest: &Digest) -> Option<Job>;
    fn fetch(&self, owner: &Uid, reference: &ImageRef, digest: &Digest) -> Result<(), HostError>;
    fn convert(&self, owner: &Uid, digest: &Digest) -> Result<(), HostError>;
    fn forget(&self, owner: &Uid) -> Result<(), HostError>;
    fn is_busy(&self, owner: &Uid) -> bool;
    fn owners(&self) -> Result<Vec<Uid>, HostError>;
    fn remove(&self, digest: &Digest, is_referenced: Box<dyn FnOnce() -> bool + Send>) -> Result<(), HostError>;
}

forward! { Links to links:
    fn list(&self) -> Result<Vec<Link>, HostError>;
    fn inspect(&self, name: &LinkName) -> Result<Option<Link>, HostError>;
    fn create(&self, plan: &LinkPlan) -> Result<(), HostError>;
    fn change(&self, name: &LinkName, change: &LinkChange) -> Result<(), HostError>;
    fn remove(&self, name: &LinkName) -> Result<(), HostError>;
    fn routes(&self) -> Result<Routes, HostError>;
    fn forwarding(&self) -> Result<Forwarding, HostError>;
    fn set_forwarding(&self) -> Result<(), HostError>;
}

forward! { Firewall to firewall:
    fn inspect(&self, rules: &FirewallRules) -> Result<Option<FirewallSeen>, HostError>;
    fn has_port(&self, table: &str, port: &PortRule) -> Result<bool, HostError>;
    fn replace(&self, rules: &FirewallRules) -> Result<(), HostError>;
    fn add_port(&self, table: &str, port: &PortRule) -> Result<(), HostError>;
    fn remove_port(&self, table: &str, port: &PortRule) -> Result<(), HostError>;
    fn remove(&self, table: &str) -> Result<(), HostError>;
}

forward! { Disks to disks:
    fn list(&self) -> Result<Vec<DiskFile>, HostError>;
    fn inspect(&self, owner: &Uid) -> Result<Option<DiskFile>, HostError>;
    fn create(&self, owner: &Uid, size: Bytes) -> Result<(), HostError>;
    fn copy(&self, owner: &Uid, snapshot: &Uid, of: Option<&Uid>, size: Bytes) -> Result<(), HostError>;
    fn remove(&self, owner: &Uid) -> Result<(), HostError>;
    fn space(&self) -> Result<Space, HostError>;
}

impl Host {
    fn of(site: &Site) -> Self {
        let data = site.data();
        let boot_files = BootFiles::new(crate::stage::kernel_dir(), data.join("cache"));
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
                cgroups: Cgroups::probe(bridge()),
                rootfs: Box::new(move |digest| rootfs.rootfs(digest)),
                disk: Box::new(move |owner| Ext4Files::path(&disks, owner)),
                disk_reserve: Bytes(0),
                console_log_max: Bytes(64 << 10),
                watches: DirectoryWatches::default(),
                noted: Arc::new(|_, _| ()),
                changed: Arc::new(|_| {}),
            }),
            images,
            links: Netlink::new(Scope::new(bridge()).expect("valid")).expect("sockets open"),
            firewall: Nft::new(),
            disks: Ext4Files::new(data.join("disks"), data.join("snapshots"), Bytes(0)).expect("opened"),
        }
    }
}

fn records(site: &Site) -> Records {
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
        })
        .collect()
}

/// Returns the violated invariants after the daemon has ended.
async fn broken(site: &Site) -> Vec<String> {
    let records = records(site);
    let host = Host::of(site);
    let deadline = Instant::now() + HEARD;
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
pub(crate) async fn settles(site: &mut Site, after: &str) {
    let deadline = Instant::now() + crate::site::BOOT;
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
