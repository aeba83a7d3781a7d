//! The life of a VM of each machine type in few boots, on the accelerator that the host has.

use std::fs;

use reqwest::Method;
use serde_json::{Value, json};

use crate::fixtures::accelerator;
use crate::harness::{Harness, image};
use crate::invariants::settles;
use crate::machine_types::{COUNTER, counts_on, is_on, made, post, verb};
use crate::namespace::in_namespace;
use crate::socket::{run, shell};
use crate::standby::counted;

/// Number of lines of the copied file.
const LINES: u32 = 50_000;

/// Hides the host's KVM: a device that no driver has takes its place.
const WITHOUT_KVM: &str =
    "if test -e /dev/kvm; then mknod DEVICE c 240 250; mount --bind DEVICE /dev/kvm; fi";

#[test]
fn a_host_that_lacks_the_demanded_kvm_starts_no_vm_and_reports_the_reason() {
    in_namespace(async || {
        let mut site = Harness::new().await;
        let device = site.scratch("no-kvm").join("device");
        site.shell(&WITHOUT_KVM.replace("DEVICE", &device.display().to_string()));
        site.spawn_with(&[("STEAD_ACCELERATOR", "kvm")]);
        site.answers().await;
        let host = site.request(Method::GET, "/capabilities", None).await.body["host"].clone();
        let is_reason = |text: &Value| text.as_str().is_some_and(|text| text.contains("cannot use KVM"));
        assert!(is_reason(&host["accelerator_problem"]), "{host:#}");
        site.create("box", &image("busybox"), json!({ "size": "128MB" })).await;
        let is_refused = |seen: &Value| {
            let conditions = seen["conditions"].as_array().into_iter().flatten();
            conditions
                .clone()
                .any(|one| one["type"] == "Ready" && one["status"] == "False" && is_reason(&one["message"]))
        };
        site.until("box", "the reason", is_refused).await;
        assert_eq!(site.vmms(), [0; 0], "it is not emulated instead");
        site.delete("box").await;
        settles(&mut site, "a host without KVM").await;
    });
}

/// Checks that the daemon reports the accelerator, and that this VM runs on it.
async fn is_accelerated(site: &Harness, name: &str) {
    let runtimes = site.request(Method::GET, "/capabilities", None).await.body["runtimes"].clone();
    let reported: Vec<_> = runtimes.as_array().expect("a list").iter().map(|it| &it["accelerator"]).collect();
    assert_eq!(reported, [accelerator().as_str(); 2], "{runtimes:#}");
    let pid = site.get(name).await["vmm_pid"].clone();
    let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).expect("its VMM runs");
    assert!(line.contains(&format!(",accel={},", accelerator())), "{line}");
}

async fn runs_programs(site: &Harness) {
    let (output, end) = run(site, "box", json!({ "command": ["sh", "-c", "cat; exit 7"] }), b"given").await;
    assert_eq!((&output[..], end), (&b"given"[..], json!({ "exitCode": 7 })));
}

/// Copies a file into the guest and back.
async fn copies(site: &Harness) {
    let scratch = site.scratch("copies");
    let contents: String = (0..LINES).map(|line| format!("{line}\n")).collect();
    fs::write(scratch.join("there"), &contents).expect("written");
    let scratch = scratch.display().to_string();
    site.cli(&format!("cp {scratch}/there box:/kept"));
    assert_eq!(shell(site, "box", "wc -l </kept").await, LINES.to_string());
    site.cli(&format!("cp box:/kept {scratch}/back"));
    assert!(fs::read_to_string(format!("{scratch}/back")).expect("copied") == contents, "another file");
}

async fn sleeps_and_continues(site: &Harness, id: &str) {
    counts_on(site, id).await;
    assert_eq!(verb(site, "box", "standby").await["state"], "Standby");
    assert_eq!(site.vmms(), [0; 0]);
    assert_eq!(verb(site, "box", "restore").await["state"], "Running");
    counts_on(site, id).await;
    let steps = counted(&site.console(id));
    let all: Vec<u64> = (1..).take(steps.len()).collect();
    assert_eq!(steps, all, "a step was lost or repeated");
}

async fn is_forked(site: &Harness, hypervisor: &str) {
    let fork = post(site, "/instances/box/fork", json!({ "name": "fork", "from_running": true })).await;
    assert_eq!(fork["state"], "Running", "{fork:#}");
    is_on(site, "fork", hypervisor).await;
    assert_eq!(shell(site, "fork", "hostname; wc -l </kept").await, format!("fork\n{LINES}"));
    counts_on(site, fork["id"].as_str().expect("an id")).await;
    site.delete("fork").await;
}

/// Kills the daemon, which the VM outlives, then the VMM, which is replaced.
async fn heals(site: &mut Harness, hypervisor: &str) {
    let before = site.get("box").await["vmm_pid"].clone();
    site.kill().await;
    site.start().await;
    assert_eq!(site.until_state("box", "Running").await["vmm_pid"], before);
    assert_eq!(shell(site, "box", "hostname").await, "box");
    // As after a power failure, a guest has only what it has written to its disk.
    shell(site, "box", "sync").await;
    site.shell(&format!("kill -9 {before}"));
    let is_another = |seen: &Value| seen["state"] == "Running" && seen["vmm_pid"] != before;
    site.until("box", "another VMM", is_another).await;
    is_on(site, "box", hypervisor).await;
    assert_eq!(shell(site, "box", "wc -l </kept").await, LINES.to_string(), "its disk");
}

async fn lives(hypervisor: &str) {
    let mut site = Harness::running().await;
    let id = made(&site, "box", hypervisor, COUNTER, json!([])).await;
    is_accelerated(&site, "box").await;
    is_on(&site, "box", hypervisor).await;
    runs_programs(&site).await;
    copies(&site).await;
    sleeps_and_continues(&site, &id).await;
    is_forked(&site, hypervisor).await;
    heals(&mut site, hypervisor).await;
    let stopped = verb(&site, "box", "stop").await;
    assert_eq!((&stopped["state"], &stopped["exit_code"]), (&json!("Stopped"), &json!(143)));
    site.delete("box").await;
    settles(&mut site, "a life").await;
}

#[test]
fn a_q35_vm_lives_on_the_hosts_accelerator() {
    in_namespace(async || lives("qemu").await);
}

#[test]
fn a_microvm_lives_on_the_hosts_accelerator() {
    in_namespace(async || lives("qemu-microvm").await);
}
