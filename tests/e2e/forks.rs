//! Forks and snapshots of real VMs: each fork continues on its own with its own identity, and no copy disturbs its
//! source.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::crash::{EDGES, OF_FORK, OF_POOL, crash_at_request};
use crate::fixtures::{run, until};
use crate::harness::{BOOT, Harness, MOMENT, image};
use crate::invariants::settles;
use crate::namespace::in_namespace;
use crate::socket::shell;

/// Program that counts in memory, prints the count and writes it to the disk. It is slow, because many VMs share two
/// processors.
const COUNTER: &str = "i=0; while true; do i=$((i+1)); echo count $i.; echo $i >>/counts; sleep 1; done";
const FORKS: usize = 20;

/// Command that prints the identity of a guest, all of which must differ, and the parts that the host can verify.
const WHO: &str = "hostname; cat /etc/hostname /etc/machine-id; grep -c $(hostname) /etc/hosts; \
                   head -c 16 /dev/urandom | od -An -tx1; cat /sys/class/net/eth0/address; \
                   ip -4 -o addr show eth0 | awk '{print $4}'; ip route | grep -c default";

async fn counting() -> (Harness, String) {
    let site = Harness::running().await;
    let more = json!({ "size": "128MB", "cmd": ["sh", "-c", COUNTER] });
    let id = site.create("box", &image("busybox"), more).await;
    site.until_state("box", "Running").await;
    site.until_console(&id, "count 3.").await;
    (site, id)
}

async fn made(site: &Harness, path: &str, body: Value) -> Value {
    let answer = site.request(Method::POST, path, Some(body)).await;
    assert_eq!(answer.status, StatusCode::CREATED, "{path}: {answer:?}\n{}", site.daemon_log());
    answer.body
}

async fn refused(site: &Harness, path: &str, body: Value, status: StatusCode, code: &str) {
    let answer = site.request(Method::POST, path, Some(body.clone())).await;
    assert_eq!((answer.status, &answer.body["code"]), (status, &json!(code)), "{path} {body}: {answer:?}");
}

async fn count(site: &Harness, name: &str) -> u64 {
    shell(site, name, "sed -n '$p' /counts").await.parse().expect("a number")
}

fn private_kib(pid: &Value) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("it lives");
    let fields = rollup.lines().filter(|line| line.starts_with("Private_"));
    fields.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum()
}

#[test]
fn twenty_forks_of_a_running_vm_are_twenty_others_and_the_source_runs_on() {
    in_namespace(async || {
        let (mut site, id) = counting().await;
        let before = site.get("box").await;
        refused(&site, "/instances/box/fork", json!({ "name": "x" }), StatusCode::CONFLICT, "invalid_state")
            .await;
        let (mut addresses, mut guests) = (BTreeSet::new(), BTreeSet::new());
        for number in 0..FORKS {
            let at_least = count(&site, "box").await;
            let name = format!("fork-{number}");
            let fork =
                made(&site, "/instances/box/fork", json!({ "name": name, "from_running": true })).await;
            assert_eq!((&fork["state"], &fork["name"]), (&json!("Running"), &json!(name)), "{fork:#}");
            let who = shell(&site, &name, WHO).await;
            let lines: Vec<&str> = who.lines().map(str::trim).collect();
            let network = &fork["network"];
            let ip = network["ip"].as_str().expect("an address");
            assert_eq!((lines[0], lines[1], lines[3]), (name.as_str(), name.as_str(), "1"), "{who}");
            assert_eq!((lines[5], lines[6]), (network["mac"].as_str().expect("one"), &*format!("{ip}/24")));
            assert_eq!(lines[7], "1", "{who}");
            assert!(guests.insert((lines[2].to_owned(), lines[4].to_owned())), "{who}");
            assert!(addresses.insert(ip.to_owned()));
            // The fork continues at the source's count, on its own.
            assert!(count(&site, &name).await >= at_least);
            run("/bin/busybox", &["ping", "-c", "1", "-w", "10", ip]);
        }
        have_tokens_of_their_own(&site, FORKS + 1);
        for location in 0..2 {
            let distinct: BTreeSet<_> =
                guests.iter().map(|guest| if location == 0 { &guest.0 } else { &guest.1 }).collect();
            assert_eq!(distinct.len(), FORKS, "{guests:?}");
        }
        let after = site.get("box").await;
        for key in ["vmm_pid", "started_at", "state", "network"] {
            assert_eq!(after[key], before[key], "the source: {key}");
        }
        let numbers = site.console(&id);
        let numbers: Vec<&str> =
            numbers.split("count ").skip(1).filter_map(|rest| rest.split('.').next()).collect();
        let expected: Vec<String> = (1..=numbers.len()).map(|number| number.to_string()).collect();
        assert_eq!(numbers, expected, "the source lost no step");
        assert!(
            site.request(Method::GET, "/snapshots", None).await.body.as_array().expect("a list").is_empty()
        );
        until("the snapshots of forks to be gone", MOMENT, async || {
            snapshots(&site).is_empty().then_some(())
        })
        .await;
        for number in 2..FORKS {
            let path = format!("/instances/fork-{number}?graceful_shutdown=false");
            let answer = site.request(Method::DELETE, &path, None).await;
            assert_eq!(answer.status, StatusCode::NO_CONTENT, "{answer:?}");
        }
        is_an_instance_like_any_other(&site).await;
        settles(&mut site, "forks").await;
    });
}

/// Checks that the guest has the link-local address derived from its own card's address, and no other.
async fn has_a_link_local_address_of_its_own(site: &Harness, name: &str, fork: &Value) {
    let mac = fork["network"]["mac"].as_str().expect("one");
    let bytes: Vec<&str> = mac.split(':').collect();
    let seen = shell(site, name, "grep ' eth0$' /proc/net/if_inet6 | cut -d ' ' -f 1").await;
    assert!(
        seen.starts_with("fe80") && seen.ends_with(&format!("fffe{}", bytes[3..].concat())),
        "{mac}: {seen}"
    );
}

/// Runs a standby and restore, a fork of the fork, and a crash of its VMM.
async fn is_an_instance_like_any_other(site: &Harness) {
    let kept = count(site, "fork-0").await;
    for verb in ["standby", "restore"] {
        let answer = site.request(Method::POST, &format!("/instances/fork-0/{verb}"), None).await;
        assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    }
    assert!(count(site, "fork-0").await >= kept);
    // The first fork's memory is its own by now, and the second fork's memory is still the snapshot's.
    for (source, name) in [("fork-0", "again"), ("fork-1", "another")] {
        let body = json!({ "name": name, "from_running": true });
        made(site, &format!("/instances/{source}/fork"), body).await;
        assert_eq!(shell(site, name, "hostname").await, name);
    }
    let pid = site.get("fork-1").await["vmm_pid"].clone();
    site.shell(&format!("kill -9 {pid}"));
    site.until("fork-1", "another VMM", |seen| seen["state"] == "Running" && seen["vmm_pid"] != pid).await;
    assert_eq!(shell(site, "fork-1", "hostname").await, "fork-1");
}

/// Returns the tokens of the guests that run here. None of the guests has yet to take another.
fn tokens(site: &Harness) -> Vec<String> {
    let records = fs::read_dir(site.run_dir().join("vm")).expect("there").flatten();
    let records = records.map(|entry| fs::read(entry.path().join("machine.json")).expect("a record"));
    let known = records.map(|bytes| {
        let record: Value = serde_json::from_slice(&bytes).expect("whole");
        assert_eq!(record["new_token"], Value::Null, "a guest that runs has taken its new token");
        record["token"].as_str().expect("a token").to_owned()
    });
    known.collect()
}

/// Checks that no two guests have the same token.
fn have_tokens_of_their_own(site: &Harness, guests: usize) {
    let distinct: BTreeSet<String> = tokens(site).into_iter().collect();
    assert_eq!(distinct.len(), guests, "guests: {guests}");
}

/// Lists the directories of snapshots.
fn snapshots(site: &Harness) -> Vec<PathBuf> {
    let entries = fs::read_dir(site.data().join("snapshots")).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

/// Saves several VMs that map the same RAM. Each save keeps the VM's own pages, and the others are not affected.
async fn go_to_standby_and_back_beside_each_other(site: &Harness, names: &[&str]) {
    for name in names {
        let before = count(site, name).await;
        let answer = site.request(Method::POST, &format!("/instances/{name}/standby"), None).await;
        assert_eq!((answer.status, &answer.body["state"]), (StatusCode::OK, &json!("Standby")));
        let uid = answer.body["id"].as_str().expect("an id").to_owned();
        let saved = site.data().join("memory").join(uid).join("saved");
        let state = fs::metadata(saved.join("state")).expect("saved").len();
        assert!(state < 1 << 20, "{state} bytes of device state: with RAM");
        let answer = site.request(Method::POST, &format!("/instances/{name}/restore"), None).await;
        assert_eq!((answer.status, &answer.body["state"]), (StatusCode::OK, &json!("Running")));
        let after = count(site, name).await;
        assert!((before..before + 60).contains(&after), "{name}: {before}, then {after}");
    }
}

/// Checks that a restore is in place: the disk and the memory of that moment, under the same name and address.
async fn is_restored_in_place(site: &Harness, snapshot: &Value, at_first: u64) {
    let restore = format!("/instances/box/snapshots/{}/restore", snapshot["id"].as_str().expect("an id"));
    refused(site, &restore, json!({}), StatusCode::CONFLICT, "invalid_state").await;
    let mut known = BTreeSet::from([tokens(site)]);
    for verb in ["standby", "stop"] {
        if verb == "stop" {
            site.until_state("box", "Running").await;
        }
        let answer = site.request(Method::POST, &format!("/instances/box/{verb}"), None).await;
        assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
        let before = site.get("box").await;
        let restored = site.request(Method::POST, &restore, None).await;
        assert_eq!(
            (restored.status, &restored.body["state"]),
            (StatusCode::OK, &json!("Running")),
            "{restored:?}"
        );
        assert_eq!(restored.body["network"], before["network"]);
        assert!(known.insert(tokens(site)), "the guest of an earlier moment has a token of its own");
        assert!(count(site, "box").await <= at_first + 40, "{verb}");
        assert_eq!(
            shell(site, "box", "ls /later 2>&1 || true").await,
            "ls: /later: No such file or directory"
        );
        shell(site, "box", "echo later >/later; sync").await;
    }
}

/// Checks that a fork of a memory is an instance of its own, and has less memory of its own than a VM that booted.
async fn shares_pages(site: &Harness, path: &str, name: &str, at_first: u64, booted: u64) {
    let fork = made(site, path, json!({ "name": name })).await;
    assert_eq!(fork["state"], "Running", "{fork:#}");
    assert_eq!(shell(site, name, "hostname").await, name);
    has_a_link_local_address_of_its_own(site, name, &fork).await;
    assert!(count(site, name).await <= at_first + 60);
    let private = private_kib(&fork["vmm_pid"]);
    assert!(private < booted, "{name}: {private} KiB of its own, a VM that booted has {booted}");
}

#[test]
fn snapshots_outlive_their_source_are_restored_in_place_and_forks_of_one_share_its_pages() {
    in_namespace(async || {
        let (mut site, id) = counting().await;
        let path = "/instances/box/snapshots";
        for (body, code) in [
            (json!({}), "invalid_request"),
            (json!({ "kind": "standby" }), "invalid_request"),
            (json!({ "kind": "Standby", "name": "Not A Name" }), "invalid_request"),
        ] {
            refused(&site, path, body, StatusCode::BAD_REQUEST, code).await;
        }
        refused(&site, path, json!({ "kind": "Stopped" }), StatusCode::CONFLICT, "invalid_state").await;
        let pid = site.get("box").await["vmm_pid"].clone();
        let body = json!({ "kind": "Standby", "name": "first", "tags": { "a": "b" } });
        let first = made(&site, path, body.clone()).await;
        refused(&site, path, body, StatusCode::CONFLICT, "name_conflict").await;
        assert_eq!(site.get("box").await["vmm_pid"], pid, "the source runs on");
        assert!(first["size_bytes"].as_u64().expect("a number") > 1 << 20, "{first:#}");
        let at_first = count(&site, "box").await;
        shell(&site, "box", "echo later >/later; sync").await;

        is_restored_in_place(&site, &first, at_first).await;

        // This snapshot has the kind Stopped: the disk alone, which contains the later file.
        let stopped = site.request(Method::POST, "/instances/box/stop", None).await;
        assert_eq!(stopped.status, StatusCode::OK);
        let second = made(&site, path, json!({ "kind": "Stopped" })).await;
        let fork = |snapshot: &Value| format!("/snapshots/{}/fork", snapshot["id"].as_str().expect("an id"));
        let standby = json!({ "name": "x", "target_state": "Standby" });
        refused(&site, &fork(&second), standby, StatusCode::BAD_REQUEST, "invalid_request").await;
        let cold = made(&site, &fork(&second), json!({ "name": "cold" })).await;
        assert_eq!(cold["state"], "Stopped");
        site.delete("box").await;
        until("its files", MOMENT, async || site.console(&id).is_empty().then_some(())).await;
        let offered =
            site.request(Method::GET, "/snapshots?kind=Standby&name=first&tags[a]=b", None).await.body;
        assert_eq!(
            (offered[0]["id"].clone(), offered.as_array().expect("a list").len()),
            (first["id"].clone(), 1)
        );

        // Forks of one snapshot share its pages. A fork in standby has no process at all.
        let answer = site.request(Method::POST, "/instances/cold/start", None).await;
        assert_eq!((answer.status, &answer.body["state"]), (StatusCode::OK, &json!("Running")));
        assert_eq!(shell(&site, "cold", "cat /later").await, "later");
        let booted = private_kib(&site.get("cold").await["vmm_pid"]);
        for name in ["warm-a", "warm-b"] {
            shares_pages(&site, &fork(&first), name, at_first, booted).await;
        }
        let asleep = made(&site, &fork(&first), json!({ "name": "asleep", "target_state": "Standby" })).await;
        assert_eq!((&asleep["state"], &asleep["has_snapshot"]), (&json!("Standby"), &json!(true)));
        for snapshot in [&first, &second] {
            let path = format!("/snapshots/{}", snapshot["id"].as_str().expect("an id"));
            assert_eq!(site.request(Method::DELETE, &path, None).await.status, StatusCode::NO_CONTENT);
            assert_eq!(site.request(Method::GET, &path, None).await.status, StatusCode::NOT_FOUND);
        }
        // The instances made from it do not need it.
        let woken = site.request(Method::POST, "/instances/asleep/restore", None).await;
        assert_eq!((woken.status, &woken.body["state"]), (StatusCode::OK, &json!("Running")), "{woken:?}");
        assert_eq!(shell(&site, "asleep", "hostname").await, "asleep");
        assert_eq!(snapshots(&site), Vec::<PathBuf>::new());
        go_to_standby_and_back_beside_each_other(&site, &["warm-a", "warm-b", "asleep"]).await;
        let path = "/instances/warm-b/fork";
        let again = made(&site, path, json!({ "name": "again", "from_running": true })).await;
        assert_eq!(shell(&site, "again", "hostname").await, "again");
        let private = private_kib(&again["vmm_pid"]);
        assert!(private < booted, "{private} KiB of its own, a VM that booted has {booted}");
        settles(&mut site, "snapshots").await;
    });
}

#[test]
fn a_crash_at_any_step_of_a_fork_leaves_the_source_running_and_a_whole_fork_or_none() {
    in_namespace(async || {
        let (mut site, id) = counting().await;
        let pid = site.get("box").await["vmm_pid"].clone();
        for (kind, action) in OF_FORK {
            for edge in EDGES {
                let failpoint = format!("{kind}/{action}/{edge}");
                let body = json!({ "name": "fork", "from_running": true });
                crash_at_request(&mut site, &failpoint, &format!("/instances/{id}/fork"), body).await;
                // The spec was stored: the next daemon carries it out.
                site.until_state("fork", "Running").await;
                assert_eq!(shell(&site, "fork", "hostname").await, "fork", "{failpoint}");
                let source = site.until_state("box", "Running").await;
                assert_eq!(source["vmm_pid"], pid, "{failpoint}");
                have_tokens_of_their_own(&site, 2);
                until("the snapshot to be gone", BOOT, async || snapshots(&site).is_empty().then_some(()))
                    .await;
                let forced =
                    site.request(Method::DELETE, "/instances/fork?graceful_shutdown=false", None).await;
                assert_eq!(forced.status, StatusCode::NO_CONTENT, "{forced:?}");
            }
        }
        settles(&mut site, "crashes of forks").await;
    });
}

pub(crate) async fn pool(site: &Harness, snapshot: &str, ready: u32) {
    let path = format!("/snapshots/{snapshot}");
    until("the pool", BOOT, async || {
        let seen = site.request(Method::GET, &path, None).await.body;
        (seen["pool_ready"] == ready && seen["pool_size"] == ready).then_some(())
    })
    .await;
}

#[test]
fn a_pool_holds_forks_ready_is_filled_again_and_survives_crashes_of_daemon_and_vmms() {
    in_namespace(async || {
        let (mut site, _) = counting().await;
        let snapshot = made(&site, "/instances/box/snapshots", json!({ "kind": "Standby" })).await;
        let id = snapshot["id"].as_str().expect("an id");
        let path = format!("/snapshots/{id}");
        for wrong in [json!({ "pool_size": 65 }), json!({ "pool_size": -1 }), json!({})] {
            let answer = site.request(Method::PATCH, &path, Some(wrong.clone())).await;
            assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{wrong}");
        }
        let mut desired = 0;
        for edge in EDGES {
            desired += 1;
            let (kind, action) = OF_POOL;
            let failpoint = format!("{kind}/{action}/{edge}");
            site.stop().await;
            site.spawn(Some(&failpoint));
            site.answers().await;
            site.attempt(Method::PATCH, &path, Some(json!({ "pool_size": desired }))).await;
            site.crashed(&failpoint).await;
            site.start().await;
            pool(&site, id, desired).await;
        }
        // The pooled instances have no owner yet: they are neither listed nor counted among instances, but they
        // exist.
        let listed = site.request(Method::GET, "/instances", None).await.body;
        assert_eq!(listed.as_array().expect("a list").len(), 1, "{listed:#}");
        let held = site.vmms();
        assert_eq!(held.len(), 3);
        for (number, name) in ["one", "two", "three"].into_iter().enumerate() {
            let held = site.vmms();
            let fork = made(&site, &format!("/snapshots/{id}/fork"), json!({ "name": name })).await;
            assert_eq!((&fork["state"], &fork["name"]), (&json!("Running"), &json!(name)), "{fork:#}");
            assert_eq!(shell(&site, name, "hostname").await, name);
            let pid = u32::try_from(fork["vmm_pid"].as_u64().expect("a pid")).expect("a pid");
            // The first forks take pooled instances. A fork that comes too fast is made like any other.
            assert!(number > 1 || held.contains(&pid), "{name}: {pid} of {held:?}");
        }
        pool(&site, id, 2).await;
        let fresh: Vec<u32> = site.vmms().into_iter().filter(|pid| !held.contains(pid)).collect();
        let all = site.vmms();
        site.shell(&format!("kill -9 {}", fresh[0]));
        // The pooled instance is used up: another one replaces it.
        until("another member", BOOT, async || {
            let now = site.vmms();
            (now.len() == all.len() && now.iter().any(|pid| !all.contains(pid))).then_some(())
        })
        .await;
        pool(&site, id, 2).await;
        settles(&mut site, "a pool").await;
        site.start().await;
        // The pool is removed with its snapshot.
        let deleted = site.request(Method::DELETE, &path, None).await;
        assert_eq!(deleted.status, StatusCode::NO_CONTENT);
        until("the pool to be gone", BOOT, async || (site.vmms().len() == 4).then_some(())).await;
        settles(&mut site, "a deleted pool").await;
    });
}
