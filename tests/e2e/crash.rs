//! A daemon that is killed before or after any step of any reconciler; the next daemon finishes the work.
//!
//! In each case there is work to do, the daemon is started with a failpoint and kills itself there with SIGKILL,
//! another is started without a failpoint, and the invariants must hold for host and store.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use jiff::{SignedDuration, Timestamp};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use stead_controllers::disk::DiskReconciler;
use stead_controllers::image::ImageReconciler;
use stead_controllers::ingress::IngressReconciler;
use stead_controllers::mediation::MediationReconciler;
use stead_controllers::mediator::MediatorReconciler;
use stead_controllers::network::NetworkReconciler;
use stead_controllers::nic::NicReconciler;
use stead_controllers::runtime::{Action, Reconciler};
use stead_controllers::schedule::ScheduleReconciler;
use stead_controllers::sim::World;
use stead_controllers::snapshot::SnapshotReconciler;
use stead_controllers::vm::VmReconciler;
use stead_schemas::meta::Kind;

use crate::fixtures::until;
use crate::harness::{Harness, MOMENT, image, runtime};
use crate::invariants::settles;
use crate::namespace::in_namespace;
use crate::socket::run;

pub(crate) const EDGES: [&str; 2] = ["before", "after"];

/// Steps caused by changes of the host while no daemon ran. The instance's VM runs.
const OF_DRIFT: [(&str, &str, &str); 17] = [
    ("network", "LoadFirewall", "nft delete table bridge $TABLE"),
    ("network", "CreateBridge", "ip link del $BRIDGE"),
    ("network", "AddAddress", "ip addr flush dev $BRIDGE"),
    ("network", "RemoveAddress", "ip addr add 10.185.0.77/24 dev $BRIDGE"),
    ("network", "RaiseBridge", "ip link set $BRIDGE down"),
    ("network", "Forward", "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 0 > /proc/sys/net/ipv4/ip_forward"),
    // This is a bridge of an object that is in no store, as after the loss of a database.
    (
        "network",
        "RemoveBridge",
        "ip link add stray type bridge; ip link set stray alias stead:$BRIDGE:a23456789012345678901234",
    ),
    ("port", "CreateTap", "ip link del $TAP"),
    ("port", "Enslave", "ip link set $TAP nomaster"),
    ("port", "Isolate", "bridge link set dev $TAP isolated off"),
    ("port", "AddRule", "nft flush set bridge $TABLE ports"),
    ("port", "Limit", "tc qdisc del dev $TAP root"),
    ("port", "CreateIfb", "ip link del $IFB"),
    ("port", "RaiseIfb", "ip link set $IFB down"),
    ("port", "Divert", "tc filter del dev $TAP ingress"),
    ("port", "RaiseTap", "ip link set $TAP down"),
    (
        "instance",
        "Limit",
        "find /sys/fs/cgroup -path \"*/stead-$BRIDGE/*/memory.max\" -o -path \"*/stead-$BRIDGE/*/memory.limit_in_bytes\" \
         | while read file; do echo 9999999999 >$file; done",
    ),
];

/// Steps of a fork of a running instance.
pub(crate) const OF_FORK: [(&str, &str); 6] = [
    ("snapshot", "Capture"),
    ("disk", "Copy"),
    ("instance", "Adopt"),
    ("instance", "TakeIdentity"),
    ("snapshot", "Expire"),
    ("snapshot", "Remove"),
];

/// Step of scaling a pool.
pub(crate) const OF_POOL: (&str, &str) = ("snapshot", "ScalePool");

/// Steps of a standby and of a snapshot whose memory should be compressed.
pub(crate) const OF_COMPRESSION: [(&str, &str); 2] = [("instance", "Compress"), ("snapshot", "Compress")];

/// Steps caused by changes of the host while no daemon ran. The instance is stopped.
const OF_DRIFT_WHILE_DOWN: [(&str, &str, &str); 3] = [
    ("disk", "Create", "rm $DATA/disks/*.ext4"),
    ("image", "Fetch", "rm -r $DATA/images"),
    ("image", "Convert", "rm -r $DATA/images/rootfs"),
];

/// Steps of deleting an instance whose VM has just been started.
const OF_DELETION: [(&str, &str); 7] = [
    ("port", "RemoveRule"),
    ("port", "RemoveTap"),
    ("port", "RemoveIfb"),
    ("disk", "Remove"),
    ("instance", "Kill"),
    ("instance", "Release"),
    ("instance", "DiscardRecords"),
];

/// Step of deleting an image while its registry is queried.
const OF_ABANDONMENT: (&str, &str) = ("image", "Forget");

/// Step of deleting an image.
const OF_IMAGE_DELETION: (&str, &str) = ("image", "Remove");

/// Steps of starting a program, and of stopping it.
const OF_START: [(&str, &str); 2] = [("instance", "Launch"), ("instance", "Configure")];
const OF_STOP: [(&str, &str); 2] = [("instance", "Shutdown"), ("instance", "AcknowledgeExit")];

/// Steps caused by changes of a running VM while no daemon ran.
const OF_RUNNING: [(&str, &str); 2] = [("instance", "Resume"), ("instance", "Reconnect")];

/// Steps of a standby and of the restore (tests/e2e/standby.rs).
pub(crate) const OF_STANDBY: [(&str, &str); 4] =
    [("instance", "Pause"), ("instance", "Save"), ("instance", "Kill"), ("instance", "Release")];
pub(crate) const OF_RESTORE: [(&str, &str); 3] =
    [("instance", "Restore"), ("instance", "DiscardMemory"), ("instance", "Resume")];

/// Step of a standby whose memory was lost (tests/e2e/standby.rs).
pub(crate) const OF_LOSS: (&str, &str) = ("instance", "Regrant");

/// Steps of changing the health check of a running program (tests/e2e/health.rs).
pub(crate) const OF_HEALTH: [(&str, &str); 2] = [("instance", "BeginProbe"), ("instance", "EndProbe")];

/// Steps of a schedule that is due, and of a schedule with a lower limit of kept snapshots (tests/e2e/schedules.rs).
pub(crate) const OF_SCHEDULE: [(&str, &str); 2] =
    [("snapshot_schedule", "Take"), ("snapshot_schedule", "Prune")];
/// Steps of an auto-standby, and of a wake-up by a connection (tests/e2e/auto_standby.rs).
pub(crate) const OF_IDLENESS: [(&str, &str); 5] = [
    ("instance", "StandBy"),
    ("instance", "Watch"),
    ("instance", "Wake"),
    ("instance", "Unwatch"),
    ("instance", "HandOver"),
];

/// Steps of creating an ingress, and of deleting it (tests/e2e/ingress.rs).
pub(crate) const OF_INGRESS: [(&str, &str); 2] = [("ingress", "Open"), ("ingress", "Close")];

/// Step of changing the limit of the disks of a running VM (tests/e2e/disk_limits.rs).
pub(crate) const OF_DISK_LIMIT: (&str, &str) = ("instance", "LimitDisks");
/// Steps of changing the memory of a running guest (tests/e2e/hotplug.rs).
pub(crate) const OF_MEMORY: [(&str, &str); 2] = [("instance", "ResizeMemory"), ("instance", "TakeMemory")];
/// Steps of attaching a volume to a running VM, and of detaching it (tests/e2e/live_volumes.rs).
pub(crate) const OF_ATTACHMENT: [(&str, &str); 2] = [("instance", "AddVolume"), ("instance", "MountVolumes")];
pub(crate) const OF_DETACHMENT: [(&str, &str); 3] =
    [("instance", "MountVolumes"), ("instance", "RemoveVolume"), ("instance", "ForgetVolumes")];
/// Step of a change that waits for a start (tests/e2e/changes.rs).
pub(crate) const OF_CHANGES: (&str, &str) = ("instance", "ApplyChanges");
/// Step of a disk that grows (tests/e2e/growth.rs).
pub(crate) const OF_GROWTH: (&str, &str) = ("disk", "Grow");
/// Step of a VM whose disk grows (tests/e2e/growth.rs).
pub(crate) const OF_LIVE_GROWTH: (&str, &str) = ("instance", "GrowVolume");
/// Step of a volume that begins as an archive (tests/e2e/volume_archives.rs).
pub(crate) const OF_ARCHIVE: (&str, &str) = ("disk", "Take");

/// Steps of mediated egress: of its process, and of an instance's policy (tests/e2e/egress/crashes.rs).
pub(crate) const OF_EGRESS: [(&str, &str); 5] = [
    ("mediator", "Launch"),
    ("mediator", "Retire"),
    ("mediation", "Put"),
    ("mediation", "Remove"),
    ("mediation", "DiscardLog"),
];

/// Step of an instance whose time is over.
const OF_EXPIRY: (&str, &str) = ("instance", "Expire");

/// Step of a configuration with another network.
const OF_RECONFIGURATION: (&str, &str) = ("network", "RemoveFirewall");

#[test]
fn every_action_of_every_reconciler_is_in_a_table() {
    fn of<Controller: Reconciler>() -> impl Iterator<Item = (&'static str, &'static str)> {
        <Controller::Action as Action>::NAMES.iter().map(|action| (<Controller::Kind as Kind>::NAME, *action))
    }
    let all: BTreeSet<_> = of::<NetworkReconciler<World>>()
        .chain(of::<NicReconciler<World>>())
        .chain(of::<DiskReconciler<World>>())
        .chain(of::<ImageReconciler<World>>())
        .chain(of::<VmReconciler<World>>())
        .chain(of::<SnapshotReconciler<World>>())
        .chain(of::<ScheduleReconciler>())
        .chain(of::<IngressReconciler<World>>())
        .chain(of::<MediatorReconciler<World>>())
        .chain(of::<MediationReconciler<World>>())
        .collect();
    let tables = OF_DRIFT.iter().chain(&OF_DRIFT_WHILE_DOWN).map(|(kind, action, _)| (*kind, *action));
    let tables = tables.chain(OF_DELETION).chain(OF_START).chain(OF_STOP).chain(OF_RUNNING);
    let tables = tables.chain(OF_STANDBY).chain(OF_RESTORE).chain(OF_FORK).chain(OF_HEALTH);
    let tables = tables.chain(OF_COMPRESSION).chain(OF_SCHEDULE);
    let tables = tables.chain(OF_IDLENESS).chain(OF_INGRESS).chain(OF_EGRESS);
    let tables = tables.chain(OF_MEMORY).chain(OF_ATTACHMENT).chain(OF_DETACHMENT);
    let tables = tables.chain([OF_DISK_LIMIT, OF_CHANGES, OF_GROWTH, OF_LIVE_GROWTH, OF_ARCHIVE]);
    let tables: BTreeSet<_> = tables
        .chain([OF_IMAGE_DELETION, OF_ABANDONMENT, OF_EXPIRY, OF_RECONFIGURATION, OF_POOL, OF_LOSS])
        .collect();
    assert_eq!(tables, all);
}

/// Returns limits of the traffic of an instance, in both directions.
fn limited() -> Value {
    json!({ "bandwidth_download": "800Mbps", "bandwidth_upload": "800Mbps" })
}

/// Crashes at every repair step for the changes in these tables, with these VMs.
async fn heals(site: &mut Harness, drifts: &[(&str, &str, &str)], vmms: &[u32]) {
    for (kind, action, drift) in drifts {
        for edge in EDGES {
            let failpoint = format!("{kind}/{action}/{edge}");
            site.shell(drift);
            site.spawn(Some(&failpoint));
            site.crashed(&failpoint).await;
            site.start().await;
            settles(site, &failpoint).await;
            assert_eq!(site.vmms(), vmms, "{failpoint}");
        }
    }
}

#[test]
fn a_crash_at_any_step_of_making_the_host_as_specified_is_healed() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        let body = json!({ "cmd": ["sh", "-c", "echo here; sleep 1000"], "network": limited() });
        let instance = site.create("box", &image("busybox"), body).await;
        let seen = site.until_state("box", "Running").await;
        site.stop().await;
        let pid = u32::try_from(seen["vmm_pid"].as_u64().expect("a process")).expect("a pid");
        heals(&mut site, &OF_DRIFT, &[pid]).await;
        site.start().await;
        let path = format!("/instances/{instance}");
        let stopped = site.request(Method::POST, &format!("{path}/stop"), None).await;
        assert_eq!((stopped.status, &stopped.body["state"]), (StatusCode::OK, &json!("Stopped")));
        site.stop().await;
        heals(&mut site, &OF_DRIFT_WHILE_DOWN, &[]).await;
        site.start().await;
        // The checked program is still running.
        let body = json!({ "cmd": ["sh", "-c", "echo still here; sleep 1000"] });
        let started = site.request(Method::POST, &format!("{path}/start"), Some(body)).await;
        assert_eq!(started.status, StatusCode::OK);
        site.until_state("box", "Running").await;
        site.until_console(&instance, "still here").await;
    });
}

#[test]
fn a_crash_at_any_step_of_a_deletion_leaves_nothing() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        let answer = site.request(Method::POST, "/images", Some(json!({ "name": image("busybox") }))).await;
        assert_eq!(answer.status, StatusCode::ACCEPTED, "{answer:?}");
        site.until_image(&image("busybox")).await;
        site.stop().await;
        for (kind, action) in OF_DELETION {
            for edge in EDGES {
                let failpoint = format!("{kind}/{action}/{edge}");
                site.spawn(Some(&failpoint));
                site.answers().await;
                let body = json!({ "cmd": ["sleep", "9"], "network": limited() });
                let id = site.create("box", &image("busybox"), body).await;
                site.until("box", "launched", |seen| seen["vmm_pid"].is_u64()).await;
                let path = format!("/instances/{id}");
                // The daemon dies of the request.
                site.attempt(Method::DELETE, &path, None).await;
                site.crashed(&failpoint).await;
                site.start().await;
                until("the instance to be gone", crate::harness::BOOT, async || {
                    let status = site.request(Method::GET, &path, None).await.status;
                    (status == StatusCode::NOT_FOUND).then_some(())
                })
                .await;
                settles(&mut site, &failpoint).await;
                assert_eq!((site.taps(), site.vmms()), (0, Vec::new()), "{failpoint}");
                assert_eq!(site.instance_files(), [""; 0].map(std::path::PathBuf::from), "{failpoint}");
            }
        }
        // The listener accepts connections and never answers.
        let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let silent = (silent.local_addr().expect("bound"), silent);
        let (kind, action) = OF_ABANDONMENT;
        for edge in EDGES {
            let failpoint = format!("{kind}/{action}/{edge}");
            site.spawn(Some(&failpoint));
            site.answers().await;
            let name = format!("{}/app:v1", silent.0);
            site.attempt(Method::POST, "/images", Some(json!({ "name": name }))).await;
            until("the registry to be asked", MOMENT, async || {
                site.shell("ss -Htn state established").contains(&silent.0.to_string()).then_some(())
            })
            .await;
            site.attempt(Method::DELETE, &format!("/images/{}", name.replace('/', "%2F")), None).await;
            site.crashed(&failpoint).await;
            site.start().await;
            settles(&mut site, &failpoint).await;
        }
        let (kind, action) = OF_IMAGE_DELETION;
        for edge in EDGES {
            let failpoint = format!("{kind}/{action}/{edge}");
            site.spawn(Some(&failpoint));
            site.answers().await;
            site.attempt(Method::POST, "/images", Some(json!({ "name": image("busybox") }))).await;
            site.until_image(&image("busybox")).await;
            let path = format!("/images/{}", image("busybox").replace('/', "%2F"));
            site.attempt(Method::DELETE, &path, None).await;
            site.crashed(&failpoint).await;
            site.start().await;
            settles(&mut site, &failpoint).await;
            assert_eq!(
                site.shell("ls $DATA/images/rootfs $DATA/images/blobs | grep -c lz4 || true").trim(),
                "0"
            );
        }
    });
}

#[test]
fn a_crash_at_any_step_of_a_run_ends_in_the_desired_state() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        let body = json!({ "cmd": ["sh", "-c", "trap 'exit 4' TERM; while true; do sleep 0.1; done"] });
        let id = site.create("box", &image("busybox"), body).await;
        site.until_state("box", "Running").await;
        let verb = |verb: &str| format!("/instances/{id}/{verb}");
        for ((kind, start), (_, stop)) in OF_START.into_iter().zip(OF_STOP) {
            for edge in EDGES {
                let failpoint = format!("{kind}/{stop}/{edge}");
                crash_at_verb(&mut site, &failpoint, &verb("stop")).await;
                let stopped = site.until_state("box", "Stopped").await;
                assert_eq!(stopped["exit_code"], 4, "{failpoint}: {stopped:#}");
                settles(&mut site, &failpoint).await;
                assert_eq!(site.vmms(), [0; 0], "{failpoint}");

                site.start().await;
                let failpoint = format!("{kind}/{start}/{edge}");
                crash_at_verb(&mut site, &failpoint, &verb("start")).await;
                site.until_state("box", "Running").await;
                settles(&mut site, &failpoint).await;
                assert_eq!(site.vmms().len(), 1, "{failpoint}");
                site.start().await;
            }
        }
        site.until_state("box", "Running").await;
        let before = site.vmms();
        for edge in EDGES {
            site.stop().await;
            pause(&site, &id);
            recovers(&mut site, &format!("{}/{}/{edge}", OF_RUNNING[0].0, OF_RUNNING[0].1)).await;
            site.stop().await;
            site.shell("ip link del $TAP");
            recovers(&mut site, &format!("{}/{}/{edge}", OF_RUNNING[1].0, OF_RUNNING[1].1)).await;
        }
        assert_eq!(site.vmms(), before, "it is the same VM after all of it");
        the_clock_follows_a_pause(&mut site, &id).await;
    });
}

/// Requests a verb at which a daemon with a failpoint dies, and starts the next daemon.
pub(crate) async fn crash_at_verb(site: &mut Harness, failpoint: &str, path: &str) {
    crash_at(site, failpoint, (Method::POST, path), None).await;
}

pub(crate) async fn crash_at_request(site: &mut Harness, failpoint: &str, path: &str, body: Value) {
    crash_at(site, failpoint, (Method::POST, path), Some(body)).await;
}

/// Requests a change at which a daemon with a failpoint dies, and starts the next daemon.
pub(crate) async fn crash_at_change(site: &mut Harness, failpoint: &str, path: &str, body: Value) {
    crash_at(site, failpoint, (Method::PATCH, path), Some(body)).await;
}

/// Makes a request at which a daemon with a failpoint dies, and starts the next daemon.
pub(crate) async fn crash_at(
    site: &mut Harness,
    failpoint: &str,
    (method, path): (Method, &str),
    body: Option<Value>,
) {
    site.stop().await;
    site.spawn(Some(failpoint));
    site.answers().await;
    site.attempt(method, path, body).await;
    site.crashed(failpoint).await;
    site.start().await;
}

/// Checks that a daemon dies of the change to the running VM, and that the next daemon repairs it.
async fn recovers(site: &mut Harness, failpoint: &str) {
    site.spawn(Some(failpoint));
    site.crashed(failpoint).await;
    site.start().await;
    site.until_state("box", "Running").await;
    settles(site, failpoint).await;
    site.start().await;
}

/// Checks that a guest does not run while it is paused, and that its clock is right afterwards.
async fn the_clock_follows_a_pause(site: &mut Harness, id: &str) {
    const PAUSE: SignedDuration = SignedDuration::from_secs(4);
    site.until_state("box", "Running").await;
    site.stop().await;
    pause(site, id);
    let end = Timestamp::now() + PAUSE;
    until("the pause to have lasted", MOMENT, async || (Timestamp::now() >= end).then_some(())).await;
    site.start().await;
    clock_is_right(site).await;
}

/// Checks that the guest's clock becomes right within a short time, to a second.
pub(crate) async fn clock_is_right(site: &Harness) {
    const OFF_MAX: i64 = 1;
    let date = json!({ "command": ["date", "+%s"], "wait_for_agent": 20 });
    until("a clock that is right", MOMENT, async || {
        let (output, end) = run(site, "box", date.clone(), b"").await;
        assert_eq!(end, json!({ "exitCode": 0 }));
        let guest: i64 = String::from_utf8_lossy(&output).trim().parse().expect("seconds");
        ((Timestamp::now().as_second() - guest).abs() <= OFF_MAX).then_some(())
    })
    .await;
}

/// Stops the vCPUs, which only a process on this host can do.
fn pause(site: &Harness, id: &str) {
    let socket = runtime(&site.run_dir(), id).join("qmp.sock");
    let mut stream = UnixStream::connect(socket).expect("no daemon is connected");
    stream.write_all(b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"stop\"}\n").expect("written");
    let mut lines = BufReader::new(stream).lines();
    let reported = lines.find(|line| line.as_ref().expect("read").contains("\"STOP\""));
    assert!(reported.is_some(), "the VMM hung up");
}

#[test]
fn a_crash_at_the_end_of_an_instances_time_does_not_keep_it() {
    in_namespace(async || {
        let mut site = Harness::new().await;
        let (kind, action) = OF_EXPIRY;
        for edge in EDGES {
            let failpoint = format!("{kind}/{action}/{edge}");
            site.spawn(Some(&failpoint));
            site.answers().await;
            let short = json!({ "cmd": ["sleep", "9"], "ttl": "1s" });
            let id = site.create("box", &image("busybox"), short).await;
            site.crashed(&failpoint).await;
            site.start().await;
            until("its deletion", crate::harness::BOOT, async || {
                let answer = site.request(Method::GET, &format!("/instances/{id}"), None).await;
                (answer.status == StatusCode::NOT_FOUND).then_some(())
            })
            .await;
            // This leaves no daemon: the next round starts its own.
            settles(&mut site, &failpoint).await;
        }
    });
}

#[test]
fn a_crash_while_one_network_replaces_another_leaves_only_the_new_one() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        let first = site.table;
        let (kind, action) = OF_RECONFIGURATION;
        for (edge, table) in EDGES.into_iter().zip(["steadnew", first]) {
            let failpoint = format!("{kind}/{action}/{edge}");
            settles(&mut site, &failpoint).await;
            let old = std::mem::replace(&mut site.table, table);
            site.spawn(Some(&failpoint));
            site.crashed(&failpoint).await;
            site.start().await;
            settles(&mut site, &failpoint).await;
            let tables = site.shell("nft list tables");
            let of = |name: &str| tables.lines().filter(|line| line.ends_with(&format!(" {name}"))).count();
            assert_eq!((of(table), of(old)), (2, 0), "{failpoint}: {tables}");
            site.start().await;
        }
        // The network is in use and not replaced: the daemon reports that and changes nothing.
        site.create("box", &image("busybox"), json!({ "cmd": ["sleep", "100"] })).await;
        site.until_state("box", "Running").await;
        let vmms = site.vmms();
        site.stop().await;
        site.table = "steadnew";
        site.spawn(None);
        let refused = site.ended().await;
        assert!(!refused.success() && site.daemon_log().contains("is in use by instances (1)"), "{refused}");
        site.table = first;
        site.start().await;
        site.until_state("box", "Running").await;
        assert_eq!(site.vmms(), vmms);
        settles(&mut site, "a refused configuration").await;
    });
}
