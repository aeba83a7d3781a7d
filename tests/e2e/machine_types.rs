//! The second machine type: a VM works on it as on the first, and a disk moves between the two.

use std::fs;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::crash::clock_is_right;
use crate::fixtures::{accelerator, until};
use crate::harness::{BOOT, Harness, MOMENT, image};
use crate::invariants::settles;
use crate::namespace::in_namespace;
use crate::socket::{Received, Socket, shell};
use crate::standby::counted;

pub(crate) const COUNTER: &str = "i=0; while true; do i=$((i+1)); echo count $i.; sleep 0.1; done";
/// Command that pings the host's end of the network from inside.
const PING: &str = "ping -c 1 -w 3 10.185.0.1 >/dev/null && echo answered || true";
/// Command that reads the tables that the firmware left for the guest's kernel.
const TABLES: &str = "cd /sys/firmware/acpi/tables && cat FACP APIC DSDT | md5sum";
const KEPT: &str = "cat /kept /data/kept; ls /later /data/later 2>/dev/null || true";
const STANDBYS: usize = 5;

/// Creates an instance on the machine type that the request names.
pub(crate) async fn made(site: &Harness, name: &str, hypervisor: &str, cmd: &str, volumes: Value) -> String {
    let body = json!({
        "size": "128MB", "hypervisor": hypervisor, "cmd": ["sh", "-c", cmd], "volumes": volumes,
    });
    let id = site.create(name, &image("busybox"), body).await;
    site.until_state(name, "Running").await;
    id
}

pub(crate) async fn post(site: &Harness, path: &str, body: Value) -> Value {
    let answer = site.request(Method::POST, path, Some(body)).await;
    assert!(answer.status.is_success(), "{path}: {answer:?}\n{}", site.daemon_log());
    answer.body
}

pub(crate) async fn verb(site: &Harness, name: &str, verb: &str) -> Value {
    post(site, &format!("/instances/{name}/{verb}"), json!({})).await
}

async fn refused(site: &Harness, path: &str, body: Value, code: &str, message: &str) {
    let answer = site.request(Method::POST, path, Some(body)).await;
    assert_eq!((answer.status, &answer.body["code"]), (StatusCode::BAD_REQUEST, &json!(code)), "{answer:?}");
    assert!(answer.body["message"].as_str().is_some_and(|text| text.contains(message)), "{answer:?}");
}

/// Checks that the machine type is reported, that it is the one that runs, and that the guest finds its devices.
pub(crate) async fn is_on(site: &Harness, name: &str, hypervisor: &str) {
    let seen = site.get(name).await;
    assert_eq!((&seen["hypervisor"], &seen["state"]), (&json!(hypervisor), &json!("Running")), "{seen:#}");
    let line = fs::read(format!("/proc/{}/cmdline", seen["vmm_pid"])).expect("its VMM runs");
    let machine_type = if hypervisor == "qemu" { "q35,memory" } else { "microvm,memory" };
    assert!(String::from_utf8_lossy(&line).contains(machine_type), "{name} is on another board");
    let on_pci = shell(site, name, "ls /sys/bus/pci/devices | wc -l").await;
    assert_eq!(on_pci == "0", hypervisor != "qemu", "{on_pci} devices");
    until("its network", MOMENT, async || (shell(site, name, PING).await == "answered").then_some(())).await;
}

pub(crate) async fn counts_on(site: &Harness, id: &str) {
    let kept = counted(&site.console(id)).len();
    until("the counter goes on", BOOT, async || (counted(&site.console(id)).len() > kept).then_some(()))
        .await;
}

#[test]
fn a_vm_without_pci_runs_is_kept_heals_is_forked_and_ends_as_any_other() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        let runtimes = site.request(Method::GET, "/capabilities", None).await.body["runtimes"].clone();
        let names: Vec<_> = runtimes.as_array().expect("a list").iter().map(|one| &one["name"]).collect();
        assert_eq!(names, ["qemu", "qemu-microvm"], "{runtimes:#}");
        assert!(runtimes.as_array().is_some_and(|all| all.iter().all(|one| one["available"] == true)));
        let id = made(&site, "box", "qemu-microvm", COUNTER, json!([])).await;
        is_on(&site, "box", "qemu-microvm").await;
        // The clock needs no exit from the guest: it is the processor's counter, or KVM's own where that may change.
        let clock = "cat /sys/devices/system/clocksource/clocksource0/current_clocksource";
        // The kernel takes the counter a second after its start.
        until("the clock", MOMENT, async || {
            let clock = shell(&site, "box", clock).await;
            (clock == "tsc" || (clock == "kvm-clock" && accelerator() == "kvm")).then_some(())
        })
        .await;

        let pid = site.get("box").await["vmm_pid"].clone();
        site.shell("ip link del $TAP");
        until("another TAP", MOMENT, async || (site.taps() == 1).then_some(())).await;
        until("its network", MOMENT, async || (shell(&site, "box", PING).await == "answered").then_some(()))
            .await;
        assert_eq!(site.get("box").await["vmm_pid"], pid, "it ran on");

        let tables = shell(&site, "box", TABLES).await;
        for round in 0..STANDBYS {
            counts_on(&site, &id).await;
            assert_eq!(verb(&site, "box", "standby").await["state"], "Standby");
            assert_eq!(site.vmms(), [0; 0], "round {round}");
            assert_eq!(verb(&site, "box", "restore").await["state"], "Running");
        }
        counts_on(&site, &id).await;
        let steps = counted(&site.console(&id));
        let expected: Vec<u64> = (1..).take(steps.len()).collect();
        assert_eq!(steps, expected, "it goes on from where it was");
        assert_eq!(shell(&site, "box", TABLES).await, tables, "they are in no file but the RAM's");
        is_on(&site, "box", "qemu-microvm").await;
        clock_is_right(&site).await;

        let fork = post(&site, "/instances/box/fork", json!({ "name": "fork", "from_running": true })).await;
        assert_eq!(fork["state"], "Running", "{fork:#}");
        is_on(&site, "fork", "qemu-microvm").await;
        assert_eq!(shell(&site, "fork", "hostname").await, "fork");
        counts_on(&site, fork["id"].as_str().expect("an id")).await;
        counts_on(&site, &id).await;
        // A guest that reboots has ended its run.
        let reboot = json!({ "command": ["reboot", "-f"] });
        let mut ending = Socket::exec(&site, "fork", &reboot).await;
        while !matches!(ending.next().await, Received::End) {}
        site.until_state("fork", "Stopped").await;

        let stopped = verb(&site, "box", "stop").await;
        assert_eq!((&stopped["state"], &stopped["exit_code"]), (&json!("Stopped"), &json!(143)));
        settles(&mut site, "a life on the other board").await;
    });
}

#[test]
fn a_disk_moves_between_machine_types_and_a_memory_does_not() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        post(&site, "/volumes", json!({ "name": "data", "size_gb": 1 })).await;
        let volumes = json!([{ "volume_id": "data", "mount_path": "/data" }]);
        made(&site, "box", "qemu", "sleep 100000", volumes).await;
        is_on(&site, "box", "qemu").await;
        shell(&site, "box", "echo precious >/kept; echo dear >/data/kept; sync").await;
        verb(&site, "box", "stop").await;
        let disk_snapshot = post(&site, "/instances/box/snapshots", json!({ "kind": "Stopped" })).await;
        assert_eq!(disk_snapshot["source_hypervisor"], "qemu");
        let disk_snapshot = disk_snapshot["id"].as_str().expect("an id").to_owned();
        let fork = format!("/snapshots/{disk_snapshot}/fork");
        let in_place = format!("/instances/box/snapshots/{disk_snapshot}/restore");
        for path in [&fork, &in_place] {
            for (word, code, message) in [
                ("firecracker", "not_supported", "target_hypervisor firecracker"),
                ("xen", "invalid_request", "target_hypervisor must be one of"),
            ] {
                refused(&site, path, json!({ "name": "x", "target_hypervisor": word }), code, message).await;
            }
        }

        let as_other = json!({ "target_hypervisor": "qemu-microvm", "target_state": "Running" });
        let target = "--target-hypervisor qemu-microvm --target-state Running";
        site.cli(&format!("snapshot fork {disk_snapshot} --name fork {target}"));
        is_on(&site, "fork", "qemu-microvm").await;
        assert_eq!(shell(&site, "fork", "cat /kept /data/kept").await, "precious\ndear");
        // A memory cannot move to another machine type.
        let memory_snapshot = post(&site, "/instances/fork/snapshots", json!({ "kind": "Standby" })).await;
        assert_eq!(memory_snapshot["source_hypervisor"], "qemu-microvm");
        let memory_snapshot = memory_snapshot["id"].as_str().expect("an id").to_owned();
        verb(&site, "fork", "standby").await;
        let message = "target_hypervisor must be qemu-microvm";
        let other = json!({ "name": "x", "target_hypervisor": "qemu" });
        refused(&site, &format!("/snapshots/{memory_snapshot}/fork"), other, "invalid_request", message)
            .await;
        let back = format!("/instances/fork/snapshots/{memory_snapshot}/restore");
        refused(&site, &back, json!({ "target_hypervisor": "qemu" }), "invalid_request", message).await;
        post(&site, &back, json!({ "target_hypervisor": "qemu-microvm" })).await;
        is_on(&site, "fork", "qemu-microvm").await;
        site.delete("fork").await;

        // The restore is in place, in both directions; data written since the snapshot is gone each time.
        for (hypervisor, body) in [
            ("qemu-microvm", as_other),
            ("qemu", json!({ "target_hypervisor": "qemu", "target_state": "Running" })),
        ] {
            post(&site, &in_place, body).await;
            is_on(&site, "box", hypervisor).await;
            assert_eq!(shell(&site, "box", KEPT).await, "precious\ndear");
            shell(&site, "box", "touch /later /data/later; sync").await;
            verb(&site, "box", "stop").await;
        }
        // Without a choice the machine type is the snapshot's.
        let restored = post(&site, &in_place, json!({})).await;
        assert_eq!((&restored["state"], &restored["hypervisor"]), (&json!("Stopped"), &json!("qemu")));
        settles(&mut site, "boards that change").await;
    });
}
