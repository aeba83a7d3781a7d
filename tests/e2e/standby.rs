//! Standby and restore on real VMs: the memory goes on, the disk stays whole, nothing is left over.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::crash::{EDGES, OF_RESTORE, OF_STANDBY, crash_at_verb};
use crate::judge::settles;
use crate::namespace::in_namespace;
use crate::site::{BOOT, MOMENT, Site, image};
use crate::stage::until;

/// A counter in memory, told on the console and written to the disk with every step.
const COUNTER: &str =
    "i=0; while true; do i=$((i+1)); echo count $i.; echo $i >>/counts; sleep 0.05 || sleep 1; done";

/// The numbers that the console shows, in order.
fn counted(console: &str) -> Vec<u64> {
    let numbers = console.split("count ").skip(1);
    numbers.filter_map(|rest| rest.split_once('.')?.0.parse().ok()).collect()
}

async fn verb(site: &Site, verb: &str) -> Value {
    let answer = site.request(Method::POST, &format!("/instances/box/{verb}"), None).await;
    assert_eq!(answer.status, StatusCode::OK, "{verb}: {answer:?}");
    answer.body
}

async fn counts_on(site: &Site, id: &str, beyond: usize) {
    until("the counter goes on", BOOT, async || (counted(&site.console(id)).len() > beyond).then_some(()))
        .await;
}

#[test]
fn a_vm_goes_to_standby_and_back_with_its_memory_and_without_a_process_meanwhile() {
    in_namespace(async || {
        let mut site = Site::running().await;
        let id = site.create("box", &image("busybox"), json!({ "cmd": ["sh", "-c", COUNTER] })).await;
        site.until_state("box", "Running").await;
        for round in 0..5 {
            let before = counted(&site.console(&id)).len();
            counts_on(&site, &id, before).await;
            let seen = verb(&site, "standby").await;
            assert_eq!(
                (&seen["state"], &seen["has_snapshot"]),
                (&json!("Standby"), &json!(true)),
                "{seen:#}"
            );
            assert_eq!(site.vmms(), [0; 0], "round {round}");
            let again = site.request(Method::POST, "/instances/box/standby", None).await;
            assert_eq!((again.status, &again.body["code"]), (StatusCode::CONFLICT, &json!("invalid_state")));
            let start = site.request(Method::POST, "/instances/box/start", None).await;
            assert_eq!(start.status, StatusCode::CONFLICT, "{start:?}");
            if round == 1 {
                // A daemon that comes later finds it as it is.
                site.kill().await;
                site.start().await;
            }
            let kept = counted(&site.console(&id)).len();
            let seen = verb(&site, "restore").await;
            assert_eq!(
                (&seen["state"], &seen["has_snapshot"]),
                (&json!("Running"), &json!(false)),
                "{seen:#}"
            );
            counts_on(&site, &id, kept).await;
        }
        never_went_back(&site, &id);
        is_whole_after_stop(&mut site).await;
    });
}

#[test]
fn a_crash_at_any_step_to_standby_and_back_keeps_the_memory_and_the_disk() {
    in_namespace(async || {
        let mut site = Site::running().await;
        let id = site.create("box", &image("busybox"), json!({ "cmd": ["sh", "-c", COUNTER] })).await;
        site.until_state("box", "Running").await;
        let path = |verb: &str| format!("/instances/{id}/{verb}");
        let steps = |table: &[(&str, &str)]| -> Vec<String> {
            let edges = table.iter().flat_map(|step| EDGES.map(|edge| (*step, edge)));
            edges.map(|((kind, action), edge)| format!("{kind}/{action}/{edge}")).collect()
        };
        let (to, back) = (steps(&OF_STANDBY), steps(&OF_RESTORE));
        for round in 0..to.len().max(back.len()) {
            let failpoint = &to[round % to.len()];
            crash_at_verb(&mut site, failpoint, &path("standby")).await;
            site.until_state("box", "Standby").await;
            settles(&mut site, failpoint).await;
            assert_eq!(site.vmms(), [0; 0], "{failpoint}");
            site.start().await;
            let kept = counted(&site.console(&id)).len();
            let failpoint = &back[round % back.len()];
            crash_at_verb(&mut site, failpoint, &path("restore")).await;
            site.until_state("box", "Running").await;
            counts_on(&site, &id, kept).await;
            settles(&mut site, failpoint).await;
            site.start().await;
        }
        never_went_back(&site, &id);
        is_whole_after_stop(&mut site).await;
    });
}

#[test]
fn a_memory_that_is_older_than_its_disk_or_damaged_is_not_restored_and_says_why() {
    in_namespace(async || {
        let mut site = Site::running().await;
        let id = site.create("box", &image("busybox"), json!({ "cmd": ["sh", "-c", COUNTER] })).await;
        site.until_state("box", "Running").await;
        verb(&site, "standby").await;
        site.shell(&format!("printf x >> {}/memory/{id}/saved/state", site.data().display()));
        let path = format!("/instances/{id}/restore");
        // Its answer comes when the restore is done or given up on: not waited for.
        let _ = tokio::time::timeout(MOMENT, site.attempt(Method::POST, &path, None)).await;
        let explained = |seen: &Value| {
            seen["state"] == "Standby" && seen["conditions"].to_string().contains("not what was saved")
        };
        site.until("box", "refused with the reason", explained).await;
        assert_eq!(site.vmms(), [0; 0]);
        // It is no trap: a stop lets the memory go, a start begins anew.
        verb(&site, "stop").await;
        let seen = verb(&site, "start").await;
        assert_eq!((&seen["state"], &seen["has_snapshot"]), (&json!("Running"), &json!(false)), "{seen:#}");
        is_whole_after_stop(&mut site).await;
    });
}

fn never_went_back(site: &Site, id: &str) {
    let numbers = counted(&site.console(id));
    let expected: Vec<u64> = (1..=numbers.len() as u64).collect();
    assert_eq!(numbers, expected, "no number is lost, said twice or begun again");
}

/// Nothing of the VM is left, and its file system has no error.
async fn is_whole_after_stop(site: &mut Site) {
    verb(site, "stop").await;
    settles(site, "stopped").await;
    let disks = format!("{}/disks", site.data().display());
    let checked = site.shell(&format!("for disk in {disks}/*.ext4; do e2fsck -y -E journal_only $disk || true; e2fsck -fn $disk 2>&1 && echo whole || echo code $?; done"));
    assert!(checked.contains("whole"), "{checked}");
}
