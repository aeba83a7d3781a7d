//! Disks that grow: a volume and a writable layer, whose guests find the room and all of their files.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::crash::{EDGES, OF_GROWTH, crash_at_change};
use crate::harness::{Harness, image};
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

/// Crashes at the step that makes the file larger, before and after it.
async fn crashes_while_it_grows(site: &mut Harness) {
    let (kind, action) = OF_GROWTH;
    for (edge, gigabytes) in EDGES.into_iter().zip([4u64, 5]) {
        let failpoint = format!("{kind}/{action}/{edge}");
        crash_at_change(site, &failpoint, "/volumes/data", json!({ "size_gb": gigabytes })).await;
        // It ends the daemon.
        settles(site, &failpoint).await;
        site.start().await;
        let bytes = site.shell("stat -c %s $DATA/disks/*.ext4 | sort -n | tail -n 1");
        assert_eq!(bytes.trim(), (gigabytes << 30).to_string());
    }
}

#[test]
fn a_guest_finds_the_room_of_grown_disks_at_its_next_start_and_a_memory_outlives_the_growth() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        asked(&site, Method::POST, "/volumes", json!({ "name": "data", "size_gb": 1 })).await;
        let body = json!({
            "size": "128MB", "overlay_size": "300MB", "cmd": ["sh", "-c", "while true; do sleep 1; done"],
            "volumes": [{ "volume_id": "data", "mount_path": "/data" }],
        });
        site.create("box", &image("busybox"), body).await;
        site.until_state("box", "Running").await;
        let write = "dd if=/dev/urandom of=/kept bs=1M count=20 2>/dev/null; cp /kept /data/kept; sync";
        shell(&site, "box", write).await;
        let [root, volume, sum] = has(&site).await.try_into().expect("three words");
        assert!(root == "2" && volume == "9", "{root} {volume}");

        // The files grow at once, beside the running VM, and the memory that is saved then fits them.
        asked(&site, Method::PATCH, "/volumes/data", json!({ "size_gb": 2 })).await;
        let changed = asked(&site, Method::PATCH, "/instances/box", json!({ "overlay_size": "600MB" })).await;
        assert_eq!(changed["pending_changes"]["overlay_size"], "600.0 MB", "{changed:#}");
        verb(&site, "box", "standby").await;
        // A memory that is saved outlives the growth of its disk.
        asked(&site, Method::PATCH, "/volumes/data", json!({ "size_gb": 3 })).await;
        let pid = site.get("box").await["started_at"].clone();
        verb(&site, "box", "restore").await;
        let seen = site.until_state("box", "Running").await;
        assert_eq!(seen["started_at"], pid, "it was booted: {seen:#}");
        assert_eq!(has(&site).await, [root, volume, sum.clone()]);

        verb(&site, "box", "stop").await;
        verb(&site, "box", "start").await;
        site.until_state("box", "Running").await;
        let [root, volume, again] = has(&site).await.try_into().expect("three words");
        let at_least = |hundreds: &str, least: u32| hundreds.parse::<u32>().is_ok_and(|seen| seen >= least);
        let is_larger = at_least(&root, 5) && at_least(&volume, 28);
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
        site.delete("box").await;
        asked(&site, Method::DELETE, "/volumes/data", Value::Null).await;
        settles(&mut site, "growth").await;
    });
}
