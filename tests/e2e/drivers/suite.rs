//! The verbs of the driver boundary, through the ports that the controllers call.

use std::path::{Path, PathBuf};
use std::time::Duration;

use stead::hypervisor::Hypervisors;
use stead_controllers::host::{
    AdoptPlan, CapturePlan, HostErrorKind, InstanceLogs, LaunchPlan, Machine, MachineChange, Memories,
    Memory, NetworkCard, Snapshots, VmmState, Vmms,
};
use stead_schemas::capabilities::VmmCapabilities;
use stead_schemas::compression::{Algorithm, Compression};
use stead_schemas::instance::Hypervisor;
use stead_schemas::names::Uid;
use stead_schemas::network::Mac;
use stead_schemas::numbers::{LaunchId, RunNo, StandbyNo};
use stead_schemas::snapshot::{CompressionState, SnapshotKind};

use super::drivers;
use crate::fixtures::{run as command, uid, until};
use crate::machines::Bench;

/// Time limit for a change of state, such as the end of a process or of a compression.
const MOMENT: Duration = Duration::from_secs(60);
const TAP: &str = "stc0";

/// A VM of the driver under test.
struct Vm {
    bench: Bench,
    vms: Hypervisors,
    owner: Uid,
    has: VmmCapabilities,
}

/// Returns the first of the numbers of a suite. Suites run side by side, and control groups are in no
/// namespace.
fn number(hypervisor: Hypervisor) -> u64 {
    100 + 10 * hypervisor as u64
}

/// Runs all parts of the suite. Parts that a driver does not declare must be refused.
pub(super) async fn run(hypervisor: Hypervisor) {
    assert!(drivers().probe().await.contains(&hypervisor), "its program is installed");
    let mut vm = Vm::new(hypervisor);
    vm.is_launched_paused_and_resumed().await;
    vm.is_adopted_by_a_later_daemon().await;
    vm.ends_with_its_process().await;
    vm.reports_why_it_cannot_start().await;
    vm.replaces_its_tap().await;
    vm.is_saved_and_restored().await;
    vm.is_restored_from_a_compressed_memory().await;
    vm.begins_a_fork().await;
}

impl Vm {
    fn new(hypervisor: Hypervisor) -> Self {
        let bench = Bench::with(hypervisor, drivers());
        let vms = bench.driver();
        let has = vms.capabilities(hypervisor).expect("it is one of the drivers");
        Self { bench, vms, owner: uid(number(hypervisor)), has }
    }

    /// Makes the daemon after a restart.
    fn restart(&mut self) {
        self.vms = self.bench.driver();
    }

    fn plan(&self) -> LaunchPlan {
        self.bench.plan(&self.owner)
    }

    async fn inspect(&self) -> Machine {
        Vmms::inspect(&self.vms, &self.owner).await.expect("observed").expect("it is there")
    }

    async fn is(&self, state: VmmState) {
        assert_eq!(self.inspect().await.vmm, state);
    }

    async fn launch(&self) {
        self.vms.launch(&self.plan()).await.expect("launched");
        self.is(VmmState::Running).await;
    }

    async fn pause(&self) {
        self.vms.pause(&self.owner).await.expect("paused");
        self.is(VmmState::Paused).await;
    }

    async fn resume(&self) {
        self.vms.resume(&self.owner).await.expect("resumed");
        self.is(VmmState::Running).await;
    }

    async fn end(&self) {
        self.vms.kill(&self.owner).await.expect("killed");
        self.vms.release(&self.owner).await.expect("released");
        assert!(Vmms::inspect(&self.vms, &self.owner).await.expect("observed").is_none());
    }

    /// Ends the VM and removes everything of it.
    async fn clear_away(&self) {
        self.end().await;
        self.vms.discard(&self.owner).await.expect("discarded");
        InstanceLogs::remove(&self.vms, &self.owner).await.expect("removed");
        assert!(!Vmms::list(&self.vms).await.expect("listed").contains(&self.owner));
    }

    fn saved(&self, owner: &Uid, name: &str) -> PathBuf {
        self.bench.data().join("memory").join(owner.as_str()).join("saved").join(name)
    }

    /// Returns the checksum of the RAM that is saved.
    fn saved_sum(&self, owner: &Uid) -> serde_json::Value {
        let bytes = std::fs::read(self.saved(owner, "manifest.json")).expect("a memory is saved");
        let manifest: serde_json::Value = serde_json::from_slice(&bytes).expect("JSON");
        manifest["ram_sum"].clone()
    }

    async fn is_launched_paused_and_resumed(&self) {
        self.launch().await;
        let seen = self.inspect().await;
        assert_eq!((seen.hypervisor, seen.run), (self.bench.hypervisor, RunNo(1)));
        let conflict = self.vms.launch(&self.plan()).await.expect_err("one is there");
        assert_eq!(conflict.kind, HostErrorKind::Conflict);
        self.pause().await;
        self.vms.pause(&self.owner).await.expect("a VM that is paused can be paused");
        self.is(VmmState::Paused).await;
        self.resume().await;
        self.vms.resume(&self.owner).await.expect("a VM that runs can be resumed");
        assert_eq!(self.inspect().await.pid, seen.pid);
        self.clear_away().await;
    }

    async fn is_adopted_by_a_later_daemon(&mut self) {
        self.launch().await;
        self.pause().await;
        let before = self.inspect().await;
        self.restart();
        let after = self.inspect().await;
        assert_eq!(
            (after.pid, after.vmm, after.hypervisor),
            (before.pid, VmmState::Paused, before.hypervisor)
        );
        // This is as after a crash between the spawn and the record of the process.
        let path = self.bench.run().join("vm").join(self.owner.as_str()).join("machine.json");
        let bytes = std::fs::read(&path).expect("a record");
        let mut record: serde_json::Value = serde_json::from_slice(&bytes).expect("JSON");
        record["identity"] = serde_json::Value::Null;
        std::fs::write(&path, record.to_string()).expect("written");
        self.restart();
        assert_eq!(self.inspect().await.pid, before.pid, "found by its command line");
        self.resume().await;
        self.clear_away().await;
    }

    async fn ends_with_its_process(&self) {
        self.launch().await;
        let conflict = self.vms.release(&self.owner).await.expect_err("it lives");
        assert_eq!(conflict.kind, HostErrorKind::Conflict);
        let pid = self.inspect().await.pid.and_then(|pid| i32::try_from(pid).ok());
        let pid = pid.and_then(rustix::process::Pid::from_raw).expect("it has a process");
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("killed");
        until("its end", MOMENT, async || (self.inspect().await.vmm == VmmState::Dead).then_some(())).await;
        self.clear_away().await;
    }

    async fn reports_why_it_cannot_start(&self) {
        let rootfs = &self.bench.rootfs;
        let hidden = rootfs.with_extension("hidden");
        std::fs::rename(rootfs, &hidden).expect("renamed");
        let refused = self.vms.launch(&self.plan()).await.expect_err("its root disk is missing");
        std::fs::rename(&hidden, rootfs).expect("renamed back");
        let why = refused.chain();
        assert!(why.contains("No such file"), "not the VMM's own reason: {why}");
        self.clear_away().await;
    }

    async fn replaces_its_tap(&self) {
        command("ip", &["tuntap", "add", "dev", TAP, "mode", "tap"]);
        if self.has.replace_tap {
            let card = NetworkCard {
                tap: TAP.parse().expect("valid"),
                mac: Mac([2, 0, 0, 0, 0, 9]),
                address: std::net::Ipv4Addr::new(10, 0, 0, 9),
                has_queues: false,
            };
            let plan = LaunchPlan { network: Some(card), ..self.plan() };
            self.vms.launch(&plan).await.expect("launched");
            assert!(!self.inspect().await.is_network_cut);
            command("ip", &["link", "delete", TAP]);
            assert!(self.inspect().await.is_network_cut);
            command("ip", &["tuntap", "add", "dev", TAP, "mode", "tap"]);
            assert!(self.inspect().await.is_network_cut, "a new TAP of the same name is another");
            self.vms
                .change(&self.owner, &MachineChange::Tap(TAP.parse().expect("valid")))
                .await
                .expect("reconnected");
            assert!(!self.inspect().await.is_network_cut);
        } else {
            self.launch().await;
            let refused =
                self.vms.change(&self.owner, &MachineChange::Tap(TAP.parse().expect("valid"))).await;
            assert_eq!(refused.expect_err("not declared").kind, HostErrorKind::Unsupported);
        }
        self.is(VmmState::Running).await;
        self.clear_away().await;
        command("ip", &["link", "delete", TAP]);
    }

    async fn is_saved_and_restored(&mut self) {
        self.launch().await;
        if !self.has.standby {
            self.pause().await;
            let refused = self.vms.save(&self.owner, StandbyNo(5)).await.expect_err("not declared");
            assert_eq!(refused.kind, HostErrorKind::Unsupported);
            return self.clear_away().await;
        }
        self.vms.save(&self.owner, StandbyNo(5)).await.expect_err("it runs");
        self.is(VmmState::Running).await;
        assert_eq!(Memories::inspect(&self.vms, &self.owner).await.expect("observed"), None);
        self.save_and_end(5).await;
        let sum = self.saved_sum(&self.owner);
        self.restart();
        let other = LaunchPlan { hypervisor: self.other(), ..self.plan_again() };
        let refused = self.vms.restore(&other).await.expect_err("saved on another machine type");
        assert_eq!(refused.kind, HostErrorKind::Permanent);
        self.restore().await;
        // The memory is saved again before the VM ran, and no RAM was lost in between.
        self.vms.discard(&self.owner).await.expect("discarded");
        self.vms.save(&self.owner, StandbyNo(6)).await.expect("saved");
        assert_eq!(self.saved_sum(&self.owner), sum, "the restored RAM is not the saved one");
        self.vms.discard(&self.owner).await.expect("discarded");
        self.resume().await;
        // A restored VM can be saved and restored again.
        self.save_and_end(7).await;
        self.restore().await;
        self.vms.discard(&self.owner).await.expect("discarded");
        self.resume().await;
        self.clear_away().await;
    }

    async fn is_restored_from_a_compressed_memory(&self) {
        if !self.has.standby {
            return;
        }
        self.launch().await;
        self.save_and_end(8).await;
        let how = Compression { algorithm: Algorithm::Zstd, level: 1 };
        Memories::compress(&self.vms, &self.owner, how).await.expect("begun");
        until("compressed", MOMENT, async || {
            match Memories::inspect(&self.vms, &self.owner).await.expect("observed") {
                Some(Memory::Saved(saved)) => {
                    matches!(saved.compression_state, CompressionState::Compressed { .. }).then_some(())
                }
                seen => panic!("{seen:?}"),
            }
        })
        .await;
        self.restore().await;
        self.vms.discard(&self.owner).await.expect("discarded");
        self.resume().await;
        self.clear_away().await;
    }

    /// Captures a VM in standby, and begins another VM with the snapshot.
    async fn begins_a_fork(&self) {
        if !self.has.fork_memory {
            return;
        }
        self.launch().await;
        self.save_and_end(9).await;
        let first = number(self.bench.hypervisor);
        let (snapshot, fork) = (uid(first + 1), uid(first + 2));
        let capture = CapturePlan {
            snapshot: snapshot.clone(),
            source: self.owner.clone(),
            run: RunNo(1),
            kind: SnapshotKind::Standby,
            disk: self.owner.clone(),
            volumes: Vec::new(),
        };
        self.vms.capture(&capture).await.expect("captured");
        let plan = self.bench.plan(&fork);
        let disk = self.bench.data().join("snapshots").join(snapshot.as_str()).join("saved/disk.ext4");
        std::fs::copy(disk, self.bench.disk(&fork)).expect("copied");
        let adopt = AdoptPlan {
            owner: fork.clone(),
            snapshot: snapshot.clone(),
            standby: StandbyNo(1),
            run: RunNo(1),
            launch: LaunchId(2),
            overlay: fork.clone(),
            volumes: Vec::new(),
        };
        self.vms.adopt(&adopt).await.expect("taken over");
        assert_eq!(self.saved_sum(&fork), self.saved_sum(&self.owner));
        self.vms.restore(&plan).await.expect("restored");
        self.restore().await;
        for owner in [&self.owner, &fork] {
            self.vms.discard(owner).await.expect("discarded");
            self.vms.resume(owner).await.expect("resumed");
            let seen = Vmms::inspect(&self.vms, owner).await.expect("observed").expect("it is there");
            assert_eq!(seen.vmm, VmmState::Running, "source and fork run side by side");
        }
        self.vms.kill(&fork).await.expect("killed");
        self.vms.release(&fork).await.expect("released");
        Snapshots::remove(&self.vms, &snapshot).await.expect("removed");
        self.clear_away().await;
    }

    /// Saves a running VM for this standby, and ends it.
    async fn save_and_end(&self, number: u64) {
        let standby = StandbyNo(number);
        self.pause().await;
        self.vms.save(&self.owner, standby).await.expect("saved");
        self.is(VmmState::Paused).await;
        let seen = Memories::inspect(&self.vms, &self.owner).await.expect("observed");
        assert!(matches!(&seen, Some(Memory::Saved(saved)) if saved.standby == standby), "{seen:?}");
        let conflict = self.vms.resume(&self.owner).await.expect_err("its memory is saved");
        assert_eq!(conflict.kind, HostErrorKind::Conflict);
        self.end().await;
        assert!(Path::new(&self.saved(&self.owner, "ram")).exists());
    }

    async fn restore(&self) {
        self.vms.restore(&self.plan_again()).await.expect("restored");
        self.is(VmmState::Paused).await;
    }

    /// Returns the plan of a VM whose disk is kept as it is.
    fn plan_again(&self) -> LaunchPlan {
        self.bench.plan_with_disk(&self.owner)
    }

    /// Returns a hypervisor that the VM was not saved on.
    fn other(&self) -> Hypervisor {
        match self.bench.hypervisor {
            Hypervisor::Firecracker => Hypervisor::Qemu,
            _ => Hypervisor::Firecracker,
        }
    }
}
