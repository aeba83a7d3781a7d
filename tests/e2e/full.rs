//! A full disk under a running daemon: operations that free space still work, and nothing is lost.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::fixtures::until;
use crate::harness::{BOOT, Harness, image};
use crate::invariants::settles;
use crate::namespace::in_namespace_alone;

/// Checks that a memory without room is not saved: its VM runs on and reports the reason. A snapshot is not taken either.
async fn a_memory_without_room_is_not_saved(site: &Harness, kept: &Value) {
    let snapshot = Some(json!({ "kind": "Standby" }));
    let refused = site.request(Method::POST, "/instances/kept/snapshots", snapshot).await;
    assert_eq!(refused.status, StatusCode::INSUFFICIENT_STORAGE, "{refused:?}");
    assert_eq!(site.get("kept").await["vmm_pid"], kept["vmm_pid"]);
    let asked = site.attempt(Method::POST, "/instances/kept/standby", None);
    let is_explained = |seen: &Value| {
        seen["conditions"].to_string().contains("are kept in reserve") && seen["vmm_pid"] == kept["vmm_pid"]
    };
    // The request may be answered earlier, but not as done.
    tokio::select! {
        biased;
        _ = site.until("kept", "no room", is_explained) => {}
        answer = asked => {
            let answer = answer.expect("answered");
            assert_ne!(answer.body["state"], "Standby", "{answer:?}");
        }
    }
    site.until("kept", "no room", is_explained).await;
}

#[test]
fn on_a_full_disk_instances_are_refused_and_deleted_and_taken_again_when_there_is_room() {
    in_namespace_alone(async || {
        let mut site = Harness::new().await;
        // The file system is in the test's own mount namespace. It has room for the kernel's copy, the image, and the
        // store.
        site.shell("mkdir -p $DATA; mount -t tmpfs -o size=384m none $DATA");
        site.start().await;
        let body = json!({ "cmd": ["sh", "-c", "while true; do sleep 1; done"] });
        site.create("kept", &image("busybox"), body.clone()).await;
        site.create("victim", &image("busybox"), json!({ "cmd": ["true"] })).await;
        let kept = site.until_state("kept", "Running").await;
        let write = "until [ -e /go ]; do sleep 0.1; done; yes | head -c 20m >/grown && sync && \
                     echo it has $(yes | head -c 20m | cmp - /grown && wc -c </grown) bytes; sleep 10000";
        let id = site.create("writer", &image("busybox"), json!({ "cmd": ["sh", "-c", write] })).await;
        let writer = site.until_state("writer", "Running").await;
        site.until("victim", "ended", |seen| seen["state"] == "Stopped" && seen["exit_code"] == 0).await;

        // On a slow machine a guest may not have written yet what it changed at its boot. It would then be blocked by
        // that write on the full disk, and not by the memory that has no room.
        for name in ["kept", "writer"] {
            site.cli(&format!("exec {name} sync"));
        }
        site.shell("dd if=/dev/zero of=$DATA/filler bs=64k 2>/dev/null || true");
        assert_eq!(site.shell("df --output=avail $DATA | tail -n 1").trim(), "0", "the disk is full");
        // A guest whose disk cannot grow waits with its write, and loses nothing.
        site.cli("exec writer touch /go");
        let waits = site.until("writer", "waiting", |seen| seen["state"] == "Paused").await;
        assert!(waits["conditions"].to_string().contains("DiskFull"), "{waits}");
        let mut request = json!({ "name": "late", "image": image("busybox"), "size": "192MB", "vcpus": 1,
            "overlay_size": "64MB" });
        request["cmd"] = body["cmd"].clone();
        let refused = site.request(Method::POST, "/instances", Some(request.clone())).await;
        assert_eq!(refused.status, StatusCode::INSUFFICIENT_STORAGE, "{refused:?}");
        assert_eq!(site.request(Method::GET, "/instances/late", None).await.status, StatusCode::NOT_FOUND);
        a_memory_without_room_is_not_saved(&site, &kept).await;
        // Statuses are written: a VM stops and reports that.
        let stopped = site.request(Method::POST, "/instances/kept/stop", None).await;
        assert_eq!(stopped.body["state"], "Stopped", "{stopped:?}");
        site.delete("victim").await;
        let gone = site.request(Method::GET, "/instances/victim", None).await;
        assert_eq!(gone.status, StatusCode::NOT_FOUND, "{gone:?}");

        // All of this is on the disk, although it is full.
        site.kill().await;
        site.start().await;
        assert_eq!(site.get("kept").await["id"], kept["id"]);
        let gone = site.request(Method::GET, "/instances/victim", None).await;
        assert_eq!(gone.status, StatusCode::NOT_FOUND, "{gone:?}");
        let waits = site.until_state("writer", "Paused").await;
        assert_eq!(waits["vmm_pid"], writer["vmm_pid"]);
        site.shell("rm $DATA/filler");
        let seen = site.until_state("writer", "Running").await;
        assert_eq!(
            (&seen["vmm_pid"], &seen["restart_status"]),
            (&writer["vmm_pid"], &writer["restart_status"])
        );
        until("what it wrote", BOOT, async || {
            site.console(&id).contains("it has 20971520 bytes").then_some(())
        })
        .await;
        site.create("late", &image("busybox"), body).await;
        site.until_state("late", "Running").await;
        for name in ["late", "kept", "writer"] {
            site.delete(name).await;
        }
        settles(&mut site, "a full disk").await;
        // The scratch directory can be removed only without the mount.
        site.shell("umount --lazy $DATA");
    });
}
