//! Changes of an instance that its program sees from its next start on, on a real VM.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::crash::{EDGES, OF_CHANGES, crash_at_change};
use crate::fixtures::until;
use crate::harness::{Harness, MOMENT, image};
use crate::invariants::settles;
use crate::machine_types::verb;
use crate::namespace::in_namespace;
use crate::socket::shell;

/// Writes the variable that the program was started with.
const PROGRAM: &str = "echo ${ADDED:-none} >/variable; while true; do sleep 1; done";
/// Prints the number of processors, 1 if the memory is above 200 MB, and the variable of the program.
const HAS: &str = "echo $(nproc) $(awk '/MemTotal/ { print ($2 > 200000) }' /proc/meminfo) $(cat /variable)";

/// Waits until a VM has this. Its program may not have written its variable when it is Running.
async fn has(site: &Harness, name: &str, expected: &str) {
    until(expected, MOMENT, async || (shell(site, name, HAS).await == expected).then_some(())).await;
}

pub(crate) async fn patched(site: &Harness, body: Value) -> Value {
    let answer = site.request(Method::PATCH, "/instances/box", Some(body)).await;
    assert!(answer.status.is_success(), "{answer:?}");
    answer.body
}

/// Waits until the program runs in a VM that is not the one of this process.
pub(crate) async fn is_started_again(site: &Harness, pid: &Value) {
    let is_new = |seen: &Value| seen["state"] == "Running" && seen["vmm_pid"] != *pid;
    site.until("box", "another VM", is_new).await;
}

/// Crashes at the step that carries changes out, before and after it.
async fn crashes_while_it_changes(site: &mut Harness) {
    let (kind, action) = OF_CHANGES;
    for (edge, vcpus) in EDGES.into_iter().zip([1, 2]) {
        let failpoint = format!("{kind}/{action}/{edge}");
        let body = json!({ "vcpus": vcpus, "restart": true });
        crash_at_change(site, &failpoint, "/instances/box", body).await;
        let is_right = |seen: &Value| seen["state"] == "Running" && seen["pending_changes"].is_null();
        site.until("box", "the change", is_right).await;
        assert_eq!(shell(site, "box", "nproc").await, vcpus.to_string());
        // It ends the daemon.
        settles(site, &failpoint).await;
        site.start().await;
    }
}

#[test]
fn a_guest_sees_changes_from_its_next_start_on_and_a_memory_keeps_the_machine_of_its_save() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        let body = json!({
            "size": "128MB", "vcpus": 1, "hypervisor": "qemu", "cmd": ["sh", "-c", PROGRAM],
        });
        site.create("box", &image("busybox"), body).await;
        site.until_state("box", "Running").await;
        has(&site, "box", "1 0 none").await;

        let waits = patched(&site, json!({ "vcpus": 2, "size": "256MB", "env": { "ADDED": "yes" } })).await;
        assert_eq!(waits["pending_changes"]["vcpus"], 2, "{waits:#}");
        // The restored program is the same, in the machine that it was saved of.
        verb(&site, "box", "standby").await;
        verb(&site, "box", "restore").await;
        site.until_state("box", "Running").await;
        has(&site, "box", "1 0 none").await;
        // So is a fork of it, which waits for nothing.
        let fork = json!({ "name": "fork", "from_running": true });
        let fork = site.request(Method::POST, "/instances/box/fork", Some(fork)).await;
        assert_eq!(fork.status, StatusCode::CREATED, "{fork:?}");
        site.until_state("fork", "Running").await;
        has(&site, "fork", "1 0 none").await;
        assert!(site.get("fork").await["pending_changes"].is_null());
        site.delete("fork").await;

        // The death of its VMM is a start, too.
        let pid = site.get("box").await["vmm_pid"].clone();
        site.shell(&format!("kill -9 {pid}"));
        is_started_again(&site, &pid).await;
        has(&site, "box", "2 1 yes").await;

        let pid = site.get("box").await["vmm_pid"].clone();
        let changed = patched(
            &site,
            json!({ "hypervisor": "qemu-microvm", "env": { "ADDED": null }, "restart": true }),
        )
        .await;
        assert_eq!(changed["changes"], json!({ "hypervisor": "with_restart", "env": "with_restart" }));
        is_started_again(&site, &pid).await;
        has(&site, "box", "2 1 none").await;
        assert_eq!(shell(&site, "box", "ls /sys/bus/pci/devices | wc -l").await, "0");
        crashes_while_it_changes(&mut site).await;
        site.delete("box").await;
        settles(&mut site, "changes").await;
    });
}
