//! Disks that grow: a volume under a running program, and a writable layer at the next start. Their guests find the room
//! and all of their files.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::crash::{EDGES, OF_GROWTH, OF_LIVE_GROWTH, crash_at_change};
use crate::fixtures::until;
use crate::harness::{Harness, MOMENT, image};
use crate::invariants::settles;
use crate::machine_types::verb;
use crate::namespace::in_namespace;
use crate::socket::shell;

/// Prints the sizes of the root and of the volume in MiB, rounded down to hundreds, and the sum of a file on each.
const HAS: &str = "for at in / /data; do echo $(df -m $at | tail -n 1 | awk '{ print int($2 / 100) }'); done; \
                   cat /kept /data/kept | md5sum | cut -c1-32";

async fn asked(site: &Harness, method: Method, path: &str, body: Value) -> Value {
    let answer = site.request(method, path, Some(body)).await;
    assert!(answer.status.is_success(), "{path}: {answer:?}");
    answer.body
}

async fn has(site: &Harness) -> Vec<String> {
    shell(site, "box", HAS).await.split_whitespace().map(str::to_owned).collect()
}

/// Waits until the guest has a file system of this size on the volume, rounded down to hundreds of MiB.
async fn has_volume(site: &Harness, least: u32) {
    let has_room = async || (has(site).await[1].parse::<u32>().ok()? >= least).then_some(());
    until(&format!("{least} hundreds of MiB"), MOMENT, has_room).await;
}

/// Crashes at the step that makes the disk of a running VM larger, before and after it.
async fn crashes_while_a_mounted_volume_grows(site: &mut Harness) {
    let (kind, action) = OF_LIVE_GROWTH;
    for (edge, gigabytes) in EDGES.into_iter().zip([6u32, 7]) {
        let failpoint = format!("{kind}/{action}/{edge}");
        crash_at_change(site, &failpoint, "/volumes/data", json!({ "size_gb": gigabytes })).await;
        has_volume(site, gigabytes * 10 - 3).await;
    }
}

/// Crashes at the step that makes the file larger, before and after it.
async fn crashes_while_it_grows(site: &mut Harness) {
    let (kind, action) = OF_GROWTH;
    for (edge, gigabytes) in EDGES.into_iter().zip([4u64, 5]) {
        let failpoint = format!("{kind}/{action}/{edge}");
        crash_at_change(site, &failpoint, "/volumes/data", json!({ "size_gb": gigabytes })).await;
        // It ends the daemon.
        settles(site, &failpoint).await;
        site.start().await;
        let sizes = site.shell("stat -c %s $DATA/disks/*.ext4");
        assert!(sizes.lines().any(|size| size == (gigabytes << 30).to_string()), "{sizes}");
    }
}

#[test]
fn a_guest_finds_the_room_of_grown_disks_and_a_memory_outlives_the_growth() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        asked(&site, Method::POST, "/volumes", json!({ "name": "data", "size_gb": 1 })).await;
        let body = json!({
            "size": "128MB", "overlay_size": "5GB", "cmd": ["sh", "-c", "while true; do sleep 1; done"],
            "volumes": [{ "volume_id": "data", "mount_path": "/data" }],
        });
        site.create("box", &image("busybox"), body).await;
        site.until_state("box", "Running").await;
        let write = "dd if=/dev/urandom of=/kept bs=1M count=20 2>/dev/null; cp /kept /data/kept; sync";
        shell(&site, "box", write).await;
        let [root, volume, sum] = has(&site).await.try_into().expect("three words");
        assert!(root == "50" && volume == "9", "{root} {volume}");

        // The program goes on beside the growth of the volume. The writable layer grows at the next start.
        let booted = site.get("box").await["started_at"].clone();
        asked(&site, Method::PATCH, "/volumes/data", json!({ "size_gb": 2 })).await;
        has_volume(&site, 18).await;
        let changed = asked(&site, Method::PATCH, "/instances/box", json!({ "overlay_size": "8GB" })).await;
        assert_eq!(changed["pending_changes"]["overlay_size"], "8.0 GB", "{changed:#}");
        verb(&site, "box", "standby").await;
        // A memory that is saved outlives the growth of its disk, and its guest finds the room.
        asked(&site, Method::PATCH, "/volumes/data", json!({ "size_gb": 3 })).await;
        verb(&site, "box", "restore").await;
        let seen = site.until_state("box", "Running").await;
        assert_eq!(seen["started_at"], booted, "it was booted: {seen:#}");
        has_volume(&site, 28).await;
        let [unchanged, _, again] = has(&site).await.try_into().expect("three words");
        assert_eq!((&unchanged, &again), (&root, &sum));

        verb(&site, "box", "stop").await;
        verb(&site, "box", "start").await;
        site.until_state("box", "Running").await;
        let [root, volume, again] = has(&site).await.try_into().expect("three words");
        let at_least = |hundreds: &str, least: u32| hundreds.parse::<u32>().is_ok_and(|seen| seen >= least);
        let is_larger = at_least(&root, 77) && at_least(&volume, 28);
        assert!(is_larger && again == sum, "{root} {volume} {again}, and {sum} before");
        let fill = "dd if=/dev/zero of=/data/more bs=1M count=1500 2>/dev/null && rm /data/more && echo fits";
        assert_eq!(shell(&site, "box", fill).await, "fits");
        verb(&site, "box", "stop").await;
        site.shell(
            "for disk in $DATA/disks/*.ext4; do e2fsck -fn $disk >/dev/null 2>&1 || { e2fsck -fn $disk; exit 1; }; done",
        );
        let smaller = site.request(Method::PATCH, "/volumes/data", Some(json!({ "size_gb": 2 }))).await;
        assert_eq!(smaller.status, StatusCode::BAD_REQUEST, "{smaller:?}");
        crashes_while_it_grows(&mut site).await;
        verb(&site, "box", "start").await;
        site.until_state("box", "Running").await;
        has_volume(&site, 47).await;
        crashes_while_a_mounted_volume_grows(&mut site).await;
        site.delete("box").await;
        asked(&site, Method::DELETE, "/volumes/data", Value::Null).await;
        settles(&mut site, "growth").await;
    });
}
