//! The ports `Vmms` and `Guests` on real QEMU: boot, configuration, exits, death, reattachment.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use stead::host::boot_files::BootFiles;
use stead::host::cgroup::Cgroups;
use stead::host::watch_directories::DirectoryWatches;
use stead::hypervisor::{
    Accelerator, Drivers, Hypervisors, HypervisorsConfig, Jails, Programs, USERS, UserRange,
    WantedAccelerator,
};
use stead_controllers::host::{
    GuestPhase, Guests, HostErrorKind, InstanceLogs, LaunchPlan, Machine, Memories, VmmLimits, VmmState, Vmms,
};
use stead_schemas::guest::Config;
use stead_schemas::instance::{Hypervisor, Secret};
use stead_schemas::names::Uid;
use stead_schemas::numbers::{LaunchId, RunNo};
use stead_schemas::quantity::Bytes;

use crate::fixtures::{Fixtures, busybox_root, kernel_dir, overlay, run, uid, until};

const BOOT: Duration = Duration::from_secs(300);
const MOMENT: Duration = Duration::from_secs(60);

/// The files that VMs are launched from, without a daemon.
pub(crate) struct Bench {
    pub(crate) hypervisor: Hypervisor,
    fixtures: Fixtures,
    pub(crate) rootfs: PathBuf,
    drivers: Drivers,
}

impl Bench {
    fn new() -> Self {
        Self::on(Hypervisor::Qemu)
    }

    fn on(hypervisor: Hypervisor) -> Self {
        Self::with(hypervisor, Drivers::built_in(&Programs::new(), Accelerator::probe()))
    }

    pub(crate) fn with(hypervisor: Hypervisor, drivers: Drivers) -> Self {
        let fixtures = Fixtures::new();
        let rootfs = busybox_root(&fixtures);
        Self { hypervisor, fixtures, rootfs, drivers }
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.fixtures.path("data")
    }

    pub(crate) fn run(&self) -> PathBuf {
        self.fixtures.path("run")
    }

    pub(crate) fn disk(&self, owner: &Uid) -> PathBuf {
        self.fixtures.path("disks").join(owner.as_str())
    }

    /// Creates a driver as a daemon does. A second one represents the daemon after a restart.
    pub(crate) fn driver(&self) -> Hypervisors {
        let boot_files = BootFiles::new(kernel_dir(), self.fixtures.path("cache"));
        let (rootfs, disks) = (self.rootfs.clone(), self.fixtures.path("disks"));
        Hypervisors::new(HypervisorsConfig {
            drivers: self.drivers.clone(),
            run_dir: self.fixtures.path("run"),
            data_dir: self.fixtures.path("data"),
            boot_files,
            console_log_max: Bytes(64 << 10),
            watches: DirectoryWatches::default(),
            noted: Arc::new(|_, _| ()),
            cgroups: Cgroups::probe(&self.fixtures.bridge()),
            accelerator: WantedAccelerator::Auto,
            jails: Jails::new(UserRange::new(USERS).expect("valid"), self.fixtures.path("run")),
            rootfs: Box::new(move |_| rootfs.clone()),
            disk: Box::new(move |owner| disks.join(owner.as_str())),
            disk_reserve: Bytes(0),
            changed: Arc::new(|_| {}),
        })
    }

    /// Makes the plan of a VM with a new disk.
    pub(crate) fn plan(&self, owner: &Uid) -> LaunchPlan {
        overlay(&self.disk(owner));
        self.plan_with_disk(owner)
    }

    /// Makes the plan of a VM whose disk exists.
    pub(crate) fn plan_with_disk(&self, owner: &Uid) -> LaunchPlan {
        LaunchPlan {
            owner: owner.clone(),
            run: RunNo(1),
            launch: LaunchId(1),
            hypervisor: self.hypervisor,
            vcpus: 1,
            memory: Bytes(192 << 20),
            hotplug: Bytes(0),
            disk_rate: None,
            rootfs: format!("sha256:{}", "0".repeat(64)).parse().expect("valid"),
            overlay: owner.clone(),
            cid: 3,
            network: None,
            wants_headers: false,
            volumes: Vec::new(),
            limits: VmmLimits { vcpus: 1, memory: Bytes(2 << 30) },
        }
    }

    fn console(&self, owner: &Uid) -> String {
        let log = Hypervisors::console_log(&self.fixtures.path("data"), owner);
        String::from_utf8_lossy(&std::fs::read(log).unwrap_or_default()).into_owned()
    }
}

impl Drop for Bench {
    /// Ends the VMs that a failed test left: these tests have no namespace of their own.
    fn drop(&mut self) {
        let entries = std::fs::read_dir(self.fixtures.path("run").join("vm")).into_iter().flatten().flatten();
        for record in entries.filter_map(|entry| std::fs::read(entry.path().join("machine.json")).ok()) {
            let record: serde_json::Value = serde_json::from_slice(&record).unwrap_or_default();
            let pid = record["identity"]["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
            if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
                // In the ordinary case the process is already gone.
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
}

fn config(argv: &[&str]) -> Config {
    Config {
        hostname: "box".to_owned(),
        machine_id: "0123456789abcdef0123456789abcdef".to_owned(),
        instance: String::new(),
        argv: argv.iter().map(|word| (*word).to_owned()).collect(),
        env: BTreeMap::from([("GREETING".to_owned(), Secret("hello".to_owned()))]),
        working_dir: String::new(),
        user: String::new(),
        stop_signal: None,
        shutdown_grace_millis: 3000,
        network: None,
        volumes: Vec::new(),
        egress: None,
        has_agent: true,
        hotplug_bytes: 0,
        incarnation: String::new(),
    }
}

async fn inspect(driver: &Hypervisors, owner: &Uid) -> Machine {
    Vmms::inspect(driver, owner).await.expect("observed").expect("it is there")
}

async fn until_phase(driver: &Hypervisors, owner: &Uid, phase: GuestPhase) -> Machine {
    until(&format!("{phase:?}"), BOOT, async || {
        Some(inspect(driver, owner).await).filter(|seen| seen.guest.phase == phase)
    })
    .await
}

/// Boots and configures a VM. Returns the machine when its program runs or has ended.
async fn boot(
    bench: &Bench,
    driver: &Hypervisors,
    owner: &Uid,
    config: &Config,
    phase: GuestPhase,
) -> Machine {
    driver.launch(&bench.plan(owner)).await.expect("launched");
    until_phase(driver, owner, GuestPhase::AwaitingConfig).await;
    driver.configure(owner, config).await.expect("configured");
    until_phase(driver, owner, phase).await
}

async fn clear_away(driver: &Hypervisors, owner: &Uid) {
    driver.kill(owner).await.expect("killed");
    driver.release(owner).await.expect("released");
    driver.discard(owner).await.expect("discarded");
    InstanceLogs::remove(driver, owner).await.expect("removed");
    assert!(Vmms::inspect(driver, owner).await.expect("observed").is_none());
    assert!(!driver.list().await.expect("listed").contains(owner));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_runs_and_its_exit_is_reported_until_it_is_acknowledged() {
    for hypervisor in [Hypervisor::Qemu, Hypervisor::QemuMicrovm] {
        an_exit_is_reported(&Bench::on(hypervisor)).await;
    }
}

async fn an_exit_is_reported(bench: &Bench) {
    let (driver, owner) = (bench.driver(), uid(1));
    let script = "echo $GREETING from $(hostname) as $(id -u) in $(pwd); exit 7";
    let exited = boot(bench, &driver, &owner, &config(&["/bin/sh", "-c", script]), GuestPhase::Exited).await;
    assert_eq!(exited.hypervisor, bench.hypervisor);
    let exit = exited.guest.exit.expect("told with the phase");
    assert_eq!((exit.code, exit.message.as_str()), (Some(7), "exited with code 7"));
    assert!(bench.console(&owner).contains("hello from box as 0 in /"), "{}", bench.console(&owner));
    // A later daemon gets the report too.
    drop(driver);
    let driver = bench.driver();
    let again = until_phase(&driver, &owner, GuestPhase::Exited).await;
    assert_eq!((again.pid, again.guest.exit.and_then(|exit| exit.code)), (exited.pid, Some(7)));
    driver.acknowledge_exit(&owner).await.expect("asked");
    until("power off", MOMENT, async || {
        (inspect(&driver, &owner).await.vmm == VmmState::Shutdown).then_some(())
    })
    .await;
    clear_away(&driver, &owner).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_is_adopted_stopped_and_killed_by_identity() {
    let bench = Bench::new();
    let (driver, owner) = (bench.driver(), uid(2));
    let running = boot(&bench, &driver, &owner, &config(&["sleep", "1000"]), GuestPhase::Ready).await;
    let conflict = driver.launch(&bench.plan(&uid(2))).await.expect_err("one is there");
    assert_eq!(conflict.kind, HostErrorKind::Conflict);
    assert_eq!(driver.release(&owner).await.expect_err("it lives").kind, HostErrorKind::Conflict);
    drop(driver);
    let driver = bench.driver();
    let adopted = until_phase(&driver, &owner, GuestPhase::Ready).await;
    assert_eq!((adopted.pid, adopted.run), (running.pid, RunNo(1)));
    driver.shutdown(&owner).await.expect("asked");
    assert!(inspect(&driver, &owner).await.guest.is_shutdown_requested);
    let exited = until_phase(&driver, &owner, GuestPhase::Exited).await;
    assert_eq!(exited.guest.exit.and_then(|exit| exit.code), Some(143));
    driver.kill(&owner).await.expect("killed");
    assert_eq!(inspect(&driver, &owner).await.vmm, VmmState::Dead);
    clear_away(&driver, &owner).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hypervisor_that_is_not_driven_here_is_refused_and_leaves_nothing() {
    let bench = Bench::on(Hypervisor::Firecracker);
    let (driver, owner) = (bench.driver(), uid(8));
    let refused = driver.launch(&bench.plan(&owner)).await.expect_err("there is none");
    assert_eq!(refused.kind, HostErrorKind::Unsupported);
    assert!(Vmms::inspect(&driver, &owner).await.expect("observed").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_cannot_start_reports_the_reason() {
    let bench = Bench::new();
    let driver = bench.driver();
    for (number, config, code, message) in [
        (3, config(&["/no/such/program"]), Some(127), "command not found: /no/such/program"),
        (4, Config { user: "nobody-here".to_owned(), ..config(&["true"]) }, None, "unable to find user"),
    ] {
        let owner = uid(number);
        let exited = boot(&bench, &driver, &owner, &config, GuestPhase::Exited).await;
        let exit = exited.guest.exit.expect("reported");
        assert_eq!(exit.code, code, "{exit:?}");
        assert!(exit.message.contains(message), "{exit:?}");
        clear_away(&driver, &owner).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_console_that_never_stops_stays_bounded_and_loses_no_line_in_between() {
    let bench = Bench::new();
    let (driver, owner) = (bench.driver(), uid(5));
    let last = 40_000;
    let script =
        "sleep 1; i=0; while [ $i -lt 20 ]; do i=$((i+1)); seq $((i*2000-1999)) $((i*2000)); sleep 0.2; done";
    boot(&bench, &driver, &owner, &config(&["/bin/sh", "-c", script]), GuestPhase::Exited).await;
    let log = Hypervisors::console_log(&bench.fixtures.path("data"), &owner);
    let older = log.with_file_name("app.log.1");
    let text = [&older, &log].map(|path| std::fs::read_to_string(path).expect("both are there")).concat();
    // The first line is incomplete, because a rotation falls anywhere in a line.
    let numbers: Vec<u32> = text.lines().skip(1).filter_map(|line| line.trim().parse().ok()).collect();
    assert_eq!(numbers.last(), Some(&last));
    let torn = numbers.windows(2).find(|pair| pair[1] != pair[0] + 1);
    assert_eq!(torn, None, "a line was lost or doubled");
    let size = |path: &std::path::Path| std::fs::metadata(path).expect("there").len();
    assert!(size(&older) + size(&log) < u64::from(last) * 6 - (32 << 10), "nothing was let go");
    clear_away(&driver, &owner).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_daemon_a_console_grows_to_its_disks_size_and_is_rotated_by_the_next() {
    // The machine type makes no difference here; the test before this one uses the other.
    let bench = Bench::on(Hypervisor::QemuMicrovm);
    let (driver, owner) = (bench.driver(), uid(6));
    let plan = bench.plan(&owner);
    let disk = bench.fixtures.path("disks").join(owner.as_str());
    let size = 1 << 20;
    std::fs::File::create(&disk).and_then(|file| file.set_len(size)).expect("made");
    run("mkfs.ext4", &["-q", "-F", &disk.display().to_string()]);
    driver.launch(&plan).await.expect("launched");
    until_phase(&driver, &owner, GuestPhase::AwaitingConfig).await;
    let endless = config(&["/bin/sh", "-c", "while true; do seq 1 10000; done"]);
    driver.configure(&owner, &endless).await.expect("configured");
    let running = until_phase(&driver, &owner, GuestPhase::Ready).await;
    drop(driver);

    let log = Hypervisors::console_log(&bench.fixtures.path("data"), &owner);
    let length = || std::fs::metadata(&log).map_or(0, |meta| meta.len());
    until("the limit", BOOT, async || (length() >= size).then_some(())).await;
    assert_eq!(length(), size);
    // The guest continues, and its messages are received again.
    let driver = bench.driver();
    let again = until_phase(&driver, &owner, GuestPhase::Ready).await;
    assert_eq!((again.pid, again.vmm), (running.pid, VmmState::Running));
    until("a rotation", MOMENT, async || (1..size).contains(&length()).then_some(())).await;
    clear_away(&driver, &owner).await;
}
