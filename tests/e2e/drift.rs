//! Changes of the host by others while a daemon runs: noticed and undone by the events that they cause.
//!
//! Without an event, the host is compared with the specs only every five minutes (`RESYNC_INTERVAL`). Each change
//! must be undone well before. How fast that is on an idle machine is a figure of `stead-bench heal`.

use reqwest::Method;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use stead_schemas::limits::RESYNC_INTERVAL;

use crate::fixtures::until;
use crate::harness::{Harness, MOMENT, image};
use crate::invariants::settles;
use crate::namespace::in_namespace;

const _: () = assert!(MOMENT.as_secs() < RESYNC_INTERVAL.as_secs(), "a comparison could undo the damage");

fn pid(seen: &Value) -> u32 {
    seen["vmm_pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).expect("a VMM runs")
}

fn kill_vmm(pid: u32) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a pid");
    kill_process(pid, Signal::KILL).expect("it runs");
}

async fn running(site: &Harness, name: &str) -> Value {
    let body = json!({ "cmd": ["sh", "-c", "echo up; while true; do sleep 1; done"] });
    site.create(name, &image("busybox"), body).await;
    site.until_state(name, "Running").await
}

#[test]
fn a_killed_vmm_is_noticed_by_its_end_and_replaced() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        running(&site, "box").await;
        let before = pid(&site.until_state("box", "Running").await);
        kill_vmm(before);
        until("the death is noticed", MOMENT, async || {
            (site.get("box").await["vmm_pid"] != before).then_some(())
        })
        .await;
        let healed = site.until_state("box", "Running").await;
        assert_ne!(pid(&healed), before);
        assert_eq!(site.vmms(), [pid(&healed)]);
        settles(&mut site, "the death of a VMM").await;
    });
}

#[test]
fn a_daemon_that_is_killed_leaves_its_vms_running_and_the_next_one_adopts_them() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        let before = running(&site, "box").await;
        site.kill().await;
        assert_eq!(site.vmms(), [pid(&before)]);
        // The record is as if the VM had run for years: no deadline of its boot may count any more.
        site.shell("sed -i 's/\\(\"launched_at\":\"\\)20../\\12001/' $DATA/../run/vm/*/machine.json");
        assert!(site.shell("cat $DATA/../run/vm/*/machine.json").contains("\"2001-"));
        site.start().await;
        // The new daemon knows the state from its first answer on: no other state is shown.
        let mut after = site.get("box").await;
        for _ in 0..200 {
            assert_eq!(after["state"], "Running", "{after:#}");
            after = site.get("box").await;
        }
        assert_eq!((pid(&after), &after["started_at"]), (pid(&before), &before["started_at"]));
        // The new daemon controls the VM, and does not only observe it.
        site.kill().await;
        site.start().await;
        let path = format!("/instances/{}/stop", before["id"].as_str().expect("an id"));
        let stopped = site.request(Method::POST, &path, None).await.body;
        assert_eq!((&stopped["state"], site.vmms()), (&json!("Stopped"), Vec::new()));
        // A death while no daemon ran is noticed by the next daemon.
        site.request(Method::POST, &path.replace("stop", "start"), None).await;
        let running = pid(&site.until_state("box", "Running").await);
        site.kill().await;
        kill_vmm(running);
        site.start().await;
        let healed =
            site.until("box", "healed", |seen| seen["state"] == "Running" && seen["vmm_pid"] != running);
        assert_ne!(pid(&healed.await), running);
        settles(&mut site, "the death of both").await;
    });
}

/// Changes to the network of an instance, with the evidence that each is undone.
const NETWORK: [(&str, &str); 8] = [
    ("ip link del $TAP", "ip link show master $BRIDGE up | grep -q tp && test -n \"$TAP\""),
    ("ip link set $TAP nomaster", "ip link show master $BRIDGE | grep -q $TAP"),
    ("ip link set $TAP down", "ip link show $TAP up | grep -q $TAP"),
    (
        "ip link del $BRIDGE",
        "ip addr show $BRIDGE | grep -q 10.185.0.1/24 && ip link show master $BRIDGE | grep -q tp",
    ),
    ("ip addr flush dev $BRIDGE", "ip addr show $BRIDGE | grep -q 10.185.0.1/24"),
    ("nft delete table bridge $TABLE", "nft list set bridge $TABLE ports | grep -q tp"),
    ("nft flush table inet $TABLE", "nft list table inet $TABLE | grep -q masquerade"),
    (
        // Switching it on and off also switches it off on the links.
        "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 0 > /proc/sys/net/ipv4/ip_forward",
        "grep -q 1 /proc/sys/net/ipv4/conf/$BRIDGE/forwarding",
    ),
];

#[test]
fn what_is_taken_from_an_instance_is_restored_by_the_event_of_its_loss() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        site.create("box", &image("busybox"), json!({ "cmd": ["sleep", "1000"] })).await;
        let running = site.until_state("box", "Running").await;
        for (damage, is_undone) in NETWORK {
            is_healed(&site, damage, is_undone).await;
        }
        assert_eq!(pid(&site.get("box").await), pid(&running));
        // A stopped instance keeps its disk and gives its TAP back.
        site.request(Method::POST, "/instances/box/stop", None).await;
        until("no TAP", MOMENT, async || (site.taps() == 0).then_some(())).await;
        is_healed(&site, "rm $DATA/disks/*.ext4", "test -e $DATA/disks/*.ext4").await;
        settles(&mut site, "all this damage").await;
    });
}

async fn is_healed(site: &Harness, damage: &str, is_undone: &str) {
    let line = format!("if {is_undone}; then echo undone; fi 2>/dev/null");
    site.shell(damage);
    until(damage, MOMENT, async || site.shell(&line).contains("undone").then_some(())).await;
}

#[test]
fn a_missing_guest_kernel_is_reported_and_used_as_soon_as_it_is_there() {
    in_namespace(async || {
        let mut site = Harness::new().await;
        let kernel = site.kernel_dir.clone();
        site.kernel_dir = site.scratch("kernel");
        site.start().await;
        site.create("box", &image("busybox"), json!({ "cmd": ["sleep", "1000"] })).await;
        let reported = |seen: &Value| seen["conditions"].to_string().contains("guest kernel");
        site.until("box", "told of the kernel", reported).await;
        for entry in std::fs::read_dir(&kernel).expect("there").flatten() {
            let location = site.kernel_dir.join(entry.file_name());
            std::os::unix::fs::symlink(entry.path(), location).expect("linked");
        }
        site.until_state("box", "Running").await;
        site.delete("box").await;
        settles(&mut site, "a missing kernel").await;
    });
}
