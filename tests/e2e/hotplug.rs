//! Memory that a running guest gives back and gets again, and what is kept in it.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::crash::{EDGES, OF_MEMORY, crash_at_change};
use crate::fixtures::until;
use crate::harness::{Harness, MOMENT, image};
use crate::invariants::settles;
use crate::machine_types::verb;
use crate::namespace::in_namespace;
use crate::socket::shell;

/// Hotplug memory of the tests' VM, in megabytes: four blocks.
const HOTPLUG: u64 = 512;
/// Prints the memory that the guest has, in megabytes.
const TOTAL: &str = "awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo";
/// Size of a file in memory, in megabytes: more than the guest has without its hotplug memory.
const FILLED: u64 = 320;
/// Writes that file and prints its sum.
const FILL: &str = "mkdir -p /held && mount -t tmpfs -o size=400m tmpfs /held && \
                    dd if=/dev/urandom of=/held/file bs=1M count=320 2>/dev/null; md5sum </held/file";
const SUM: &str = "md5sum </held/file";

async fn asked(site: &Harness, method: Method, path: &str, body: Value) -> Value {
    let answer = site.request(method, path, Some(body)).await;
    assert!(answer.status.is_success(), "{path}: {answer:?}");
    answer.body
}

/// Returns the memory that the guest has, in megabytes.
async fn total(site: &Harness, name: &str) -> u64 {
    shell(site, name, TOTAL).await.trim().parse().expect("a number")
}

/// Changes the part of the hotplug memory that the guest should have, and waits until it has as many megabytes.
async fn resized(site: &Harness, name: &str, megabytes: u64, used: u64) -> Value {
    let body = json!({ "hotplugged_size": format!("{megabytes}MB") });
    let changed = asked(site, Method::PATCH, &format!("/instances/{name}"), body).await;
    assert_eq!(changed["changes"], json!({ "hotplugged_size": "now" }), "{changed:#}");
    let is_right = |seen: &Value| {
        let condition = condition(seen);
        let is_over = condition.is_none_or(|condition| condition["reason"] == "MemoryInUse");
        seen["hotplugged_bytes"] == used << 20 && is_over && condition.is_none() == (used == megabytes)
    };
    site.until(name, "its memory", is_right).await
}

fn condition(seen: &Value) -> Option<&Value> {
    seen["conditions"].as_array()?.iter().find(|condition| condition["type"] == "MemoryResized")
}

/// Returns the memory that the host keeps for the RAM of the VM, in bytes.
fn kept(site: &Harness, pid: &Value) -> u64 {
    let blocks = site.shell(&format!(
        "for file in /proc/{pid}/fd/*; do case $(readlink $file) in /memfd:stead-ram*) stat -Lc %b $file; break;; esac; done"
    ));
    blocks.trim().parse::<u64>().expect("a number") * 512
}

/// Checks that the host gets the memory back that the guest gives back.
async fn is_taken_back(site: &Harness) {
    let pid = site.get("box").await["vmm_pid"].clone();
    shell(site, "box", &format!("{FILL} >/dev/null; umount /held")).await;
    let before = kept(site, &pid);
    assert!(before > FILLED << 20, "{before}");
    resized(site, "box", 128, 128).await;
    let is_less = async || (kept(site, &pid) + (100 << 20) < before).then_some(());
    until("memory of the host", MOMENT, is_less).await;
}

/// Crashes at the request to the guest and at what follows it, before and after.
async fn crashes_while_it_changes(site: &mut Harness) {
    let steps = OF_MEMORY.into_iter().flat_map(|step| EDGES.map(|edge| (step, edge)));
    for (((kind, action), edge), megabytes) in steps.zip([256u64, 384, 256, 128]) {
        let failpoint = format!("{kind}/{action}/{edge}");
        let body = json!({ "hotplugged_size": format!("{megabytes}MB") });
        crash_at_change(site, &failpoint, "/instances/box", body).await;
        let is_right = |seen: &Value| seen["hotplugged_bytes"] == megabytes << 20;
        site.until("box", "its memory", is_right).await;
        // It ends the daemon.
        settles(site, &failpoint).await;
        site.start().await;
    }
}

/// Checks that what programs keep in the memory stays whole: over requests for the memory, a standby, and a fork whose
/// source gives its own memory back. `all` is all memory of the guest, in megabytes.
async fn outlives_standby_and_fork(site: &Harness, all: u64) {
    let sum = shell(site, "box", FILL).await;
    // What programs use is not taken from them.
    let body = json!({ "hotplugged_size": "128MB" });
    asked(site, Method::PATCH, "/instances/box", body).await;
    let is_refused = |seen: &Value| {
        let message = condition(seen).and_then(|condition| condition["message"].as_str());
        message.is_some_and(|message| message.contains("the programs of the guest use it"))
    };
    site.until("box", "memory that is in use", is_refused).await;
    resized(site, "box", HOTPLUG, HOTPLUG).await;
    verb(site, "box", "standby").await;
    verb(site, "box", "restore").await;
    site.until_state("box", "Running").await;
    assert_eq!((shell(site, "box", SUM).await, total(site, "box").await), (sum.clone(), all));

    let fork = json!({ "name": "fork", "from_running": true });
    asked(site, Method::POST, "/instances/box/fork", fork).await;
    site.until_state("fork", "Running").await;
    // Nothing that the source gives back is missing in the fork.
    shell(site, "box", "umount /held").await;
    resized(site, "box", 128, 128).await;
    assert_eq!(shell(site, "fork", SUM).await, sum);
    resized(site, "fork", 384, 384).await;
    assert_eq!((shell(site, "fork", SUM).await, total(site, "fork").await), (sum, all - 128));
}

#[test]
fn a_guest_gives_memory_back_and_gets_it_again_and_what_is_in_it_outlives_standby_and_fork() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        let body = json!({
            "size": "256MB", "hotplug_size": format!("{HOTPLUG}MB"), "vcpus": 1, "hypervisor": "qemu",
            "cmd": ["sh", "-c", "while true; do sleep 1; done"],
        });
        let refused = json!({ "hypervisor": "qemu-microvm", "hotplug_size": "1GB" });
        let body_of_refused = json!({ "name": "other", "image": image("busybox") });
        let refused = merged(body_of_refused, refused);
        let refused = site.request(Method::POST, "/instances", Some(refused)).await;
        assert_eq!(
            (refused.status, &refused.body["code"]),
            (StatusCode::BAD_REQUEST, &json!("not_supported"))
        );
        site.create("box", &image("busybox"), body).await;
        let seen = site.until_state("box", "Running").await;
        assert_eq!(
            (&seen["hotplug_size"], &seen["hotplugged_size"]),
            (&json!("512.0 MB"), &json!("512.0 MB"))
        );
        let all = total(&site, "box").await;
        assert!(all > HOTPLUG, "{all}");

        resized(&site, "box", 128, 128).await;
        let less = total(&site, "box").await;
        assert_eq!(all - less, 384, "{all} and {less}");
        // The kernel of the guest holds a part of the last block.
        let seen = resized(&site, "box", 0, 128).await;
        let message =
            condition(&seen).and_then(|condition| condition["message"].as_str()).unwrap_or_default();
        assert!(message.ends_with("the kernel of the guest uses 128 MB of it"), "{message}");
        resized(&site, "box", HOTPLUG, HOTPLUG).await;
        assert_eq!(total(&site, "box").await, all);
        is_taken_back(&site).await;
        resized(&site, "box", HOTPLUG, HOTPLUG).await;

        outlives_standby_and_fork(&site, all).await;
        site.delete("fork").await;

        // The next boot has the new bound, and the part that should be used of it.
        let body = json!({ "hotplug_size": "384MB", "hotplugged_size": "256MB", "restart": true });
        asked(&site, Method::PATCH, "/instances/box", body).await;
        let is_right = |seen: &Value| {
            seen["state"] == "Running"
                && seen["hotplug_size"] == "384.0 MB"
                && seen["hotplugged_bytes"] == 256u64 << 20
                && seen["pending_changes"].is_null()
        };
        site.until("box", "another boot", is_right).await;
        resized(&site, "box", 384, 384).await;
        crashes_while_it_changes(&mut site).await;
        site.delete("box").await;
        settles(&mut site, "hotplug memory").await;
    });
}

fn merged(mut one: Value, other: Value) -> Value {
    if let (Some(one), Value::Object(other)) = (one.as_object_mut(), other) {
        one.extend(other);
    }
    one
}
