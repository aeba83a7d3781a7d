//! The limit of the disks of a real VM.
//!
//! Time is only measured in the direction in which a slow machine cannot fail a test: what is above the limit takes at
//! least its time.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};
use stead_schemas::limits::{DISK_BURST, DISK_BURST_TIME};

use crate::crash::{EDGES, OF_DISK_LIMIT, crash_at_change};
use crate::fixtures::until;
use crate::harness::{BOOT, Harness, image};
use crate::invariants::settles;
use crate::machine_types::verb;
use crate::namespace::in_namespace;
use crate::socket::shell;

/// The limit, in mebibytes per second.
const RATE: u64 = 1;
/// The most that the limit lets pass at once, in mebibytes.
const BURST: u64 = RATE * DISK_BURST * DISK_BURST_TIME.as_secs();
/// Size of each of two files, in mebibytes. Together they take twelve seconds more than a burst.
const FILE: u64 = (BURST + 12 * RATE) / 2;
/// Shortest time of both files. QEMU counts a request when it begins, so the last ones need not wait.
const SHORTEST: Duration = Duration::from_secs(10);
/// Size of a file that takes longer than a test waits if it is limited, in mebibytes.
const LARGE: u64 = RATE * BOOT.as_secs() * 2;

async fn patched(site: &Harness, body: Value) -> Value {
    let answer = site.request(Method::PATCH, "/instances/box", Some(body)).await;
    assert!(answer.status.is_success(), "{answer:?}");
    answer.body
}

/// Checks that work on both disks takes the time that the limit gives it.
async fn takes_its_time(site: &Harness, what: &str, line: &str) {
    let start = Instant::now();
    shell(site, "box", line).await;
    let took = start.elapsed();
    assert!(took >= SHORTEST, "{what}: {took:?}");
}

/// Checks that what the guest deletes and trims takes no more room on the host.
async fn is_given_back(site: &Harness) {
    let taken = || {
        site.shell("du -c -B1 $DATA/disks/*.ext4 | tail -n 1").split_whitespace().next().map(str::to_owned)
    };
    let taken = || taken().and_then(|bytes| bytes.parse::<u64>().ok()).expect("a number of bytes");
    let before = taken();
    shell(site, "box", "rm /data/file && sync && fstrim /data").await;
    let after = taken();
    assert!(after + (FILE << 20) / 2 < before, "{before} bytes, then {after}");
}

/// Crashes at the step that changes the limit of a running VM. The judge compares the VM with the spec afterwards.
async fn crashes_while_it_changes(site: &mut Harness) {
    let (kind, action) = OF_DISK_LIMIT;
    for (edge, rate) in EDGES.into_iter().zip(["50MB/s", "60MB/s"]) {
        let failpoint = format!("{kind}/{action}/{edge}");
        crash_at_change(site, &failpoint, "/instances/box", json!({ "disk_io_bps": rate })).await;
        // It ends the daemon.
        settles(site, &failpoint).await;
        site.start().await;
    }
}

async fn is_limited_and_freed(site: &mut Harness, hypervisor: &str) {
    let volume = site.request(Method::POST, "/volumes", Some(json!({ "name": "data", "size_gb": 1 }))).await;
    assert!(volume.status.is_success(), "{volume:?}");
    let body = json!({
        "size": "128MB", "overlay_size": "1GB", "hypervisor": hypervisor, "disk_io_bps": format!("{RATE}MB/s"),
        "volumes": [{ "volume_id": "data", "mount_path": "/data" }],
        "cmd": ["sh", "-c", "while true; do sleep 1; done"],
    });
    site.create("box", &image("busybox"), body).await;
    let seen = site.until_state("box", "Running").await;
    assert_eq!(seen["disk_io_bps"], "1.0 MB/s", "{seen:#}");
    let written =
        |path: &str| format!("dd if=/dev/zero of={path}/file bs=1M count={FILE} conv=fsync 2>/dev/null");
    let both = format!("{} & {}; wait", written(""), written("/data"));
    takes_its_time(site, "writes", &both).await;
    // A restored VM has the limit from its start.
    verb(site, "box", "standby").await;
    verb(site, "box", "restore").await;
    let read = "echo 3 >/proc/sys/vm/drop_caches; cat /file >/dev/null & cat /data/file >/dev/null; wait";
    takes_its_time(site, "reads after a restore", read).await;
    // The limit ends while the guest waits for it.
    let large = format!(
        "(dd if=/dev/zero of=/large bs=1M count={LARGE} conv=fsync 2>/dev/null; touch /written) >/dev/null 2>&1 </dev/null &"
    );
    shell(site, "box", &format!("{large} echo begun")).await;
    let seen = patched(site, json!({ "disk_io_bps": "0" })).await;
    assert_eq!(seen["disk_io_bps"], Value::Null, "{seen:#}");
    let is_written =
        async || (shell(site, "box", "cat /written && echo yes || true").await == "yes").then_some(());
    until("the file without a limit", BOOT, is_written).await;
    is_given_back(site).await;
    patched(site, json!({ "disk_io_bps": "100MB/s" })).await;
    let generation = site.get("box").await["generation"].clone();
    let is_seen =
        |seen: &Value| seen["observed_generation"] == generation && seen["disk_io_bps"] == "100.0 MB/s";
    site.until("box", "its new limit", is_seen).await;
    crashes_while_it_changes(site).await;
    site.delete("box").await;
    let removed = site.request(Method::DELETE, "/volumes/data", None).await;
    assert!(removed.status.is_success(), "{removed:?}");
}

#[test]
fn all_disks_of_a_vm_share_a_limit_that_is_kept_over_standby_and_changed_while_it_runs() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        for hypervisor in ["qemu", "qemu-microvm"] {
            is_limited_and_freed(&mut site, hypervisor).await;
        }
        settles(&mut site, "limits of disks").await;
    });
}
