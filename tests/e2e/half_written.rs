//! Snapshots are offered only when they are complete: no snapshot that is still being captured, whose capture was
//! interrupted, or whose files were truncated.

use std::path::PathBuf;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::crash::EDGES;
use crate::fixtures::until;
use crate::harness::{BOOT, Harness, MOMENT, image};
use crate::invariants::settles;
use crate::namespace::in_namespace;
use crate::socket::shell;

const CAPTURE: &str = "snapshot/Capture";
const SNAPSHOTS: &str = "/instances/box/snapshots";

async fn sleeping() -> Harness {
    let site = Harness::running().await;
    let body = json!({ "size": "128MB", "cmd": ["sh", "-c", "echo there >/mark; sleep 100000"] });
    site.create("box", &image("busybox"), body).await;
    site.until_state("box", "Running").await;
    until("the mark", BOOT, async || {
        (shell(&site, "box", "cat /mark || true").await == "there").then_some(())
    })
    .await;
    site
}

async fn listed(site: &Harness) -> Vec<String> {
    let answer = site.request(Method::GET, "/snapshots", None).await;
    let ids = answer.body.as_array().expect("a list").iter();
    ids.map(|one| one["id"].as_str().expect("an id").to_owned()).collect()
}

async fn seen(site: &Harness, id: &str) -> Value {
    let answer = site.request(Method::GET, &format!("/snapshots/{id}"), None).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    answer.body
}

/// Checks that the snapshot's status is reported, and that the snapshot is not usable. It is listed only if it failed:
/// its owner has to learn of a snapshot that lost its files.
async fn is_not_offered(site: &Harness, id: &str, status: &str, why: &str) {
    assert_eq!(listed(site).await.contains(&id.to_owned()), status == "failed", "{why}");
    let seen = seen(site, id).await;
    assert_eq!(seen["status"], status, "{seen:#}");
    let fork = format!("/snapshots/{id}/fork");
    let restore = format!("{SNAPSHOTS}/{id}/restore");
    for (path, body) in [(fork, json!({ "name": "fork" })), (restore, json!({}))] {
        let answer = site.request(Method::POST, &path, Some(body)).await;
        assert_eq!(
            (answer.status, &answer.body["code"]),
            (StatusCode::CONFLICT, &json!("conflict")),
            "{path}"
        );
        let message = answer.body["message"].as_str().unwrap_or_default();
        assert!(message.contains(why), "{path}: {message}");
    }
    assert_eq!(site.request(Method::GET, "/instances/fork", None).await.status, StatusCode::NOT_FOUND);
}

/// Checks that a complete snapshot serves a fork.
async fn serves_a_fork(site: &Harness, id: &str) {
    until("the snapshot", BOOT, async || listed(site).await.contains(&id.to_owned()).then_some(())).await;
    assert_eq!(seen(site, id).await["status"], "ready");
    let fork = format!("/snapshots/{id}/fork");
    let answer = site.request(Method::POST, &fork, Some(json!({ "name": "fork" }))).await;
    assert_eq!(
        (answer.status, &answer.body["state"]),
        (StatusCode::CREATED, &json!("Running")),
        "{answer:?}"
    );
    assert_eq!(shell(site, "fork", "hostname; cat /mark").await, "fork\nthere");
    let forced = site.request(Method::DELETE, "/instances/fork?graceful_shutdown=false", None).await;
    assert_eq!(forced.status, StatusCode::NO_CONTENT, "{forced:?}");
}

/// Returns the snapshot that is being captured. Only the daemon's log names it, no list. The log has the captures of
/// earlier snapshots too, and its newest line may come later than the capture begins.
async fn being_taken(site: &Harness, earlier: &[String]) -> String {
    until("a capture", MOMENT, async || {
        let log = site.daemon_log();
        let captures = log.lines().rev().filter(|line| line.contains("action=\"Capture\""));
        let ids = captures
            .filter_map(|line| line.split_once("uid="))
            .map(|(_, rest)| rest.chars().take_while(char::is_ascii_alphanumeric).collect::<String>());
        ids.into_iter().find(|id| !earlier.contains(id))
    })
    .await
}

#[test]
fn a_snapshot_that_is_being_taken_is_not_offered_and_one_that_was_cut_off_is_taken_again() {
    in_namespace(async || {
        let mut site = sleeping().await;
        let pid = site.get("box").await["vmm_pid"].clone();
        let request = || Some(json!({ "kind": "Standby" }));
        let mut earlier = Vec::new();
        for edge in EDGES {
            let failpoint = format!("{CAPTURE}/{edge}");
            // The daemon dies of it. The next one stops at the same step if there is anything left to capture.
            site.stop().await;
            site.spawn(Some(&failpoint));
            site.answers().await;
            site.attempt(Method::POST, SNAPSHOTS, request()).await;
            site.crashed(&failpoint).await;
            site.spawn_held(&format!("{CAPTURE}/before"));
            site.answers().await;
            let cut_off = if edge == "before" {
                site.held(&failpoint).await;
                let id = being_taken(&site, &earlier).await;
                is_not_offered(&site, &id, "pending", "still being taken").await;
                site.let_go();
                id
            } else {
                until("the snapshot", BOOT, async || listed(&site).await.pop()).await
            };
            serves_a_fork(&site, &cut_off).await;
            delete(&site, &cut_off).await;
            earlier.push(cut_off);
        }
        // The capture is in progress: its source is paused and prints nothing.
        site.stop().await;
        site.spawn_held(&format!("{CAPTURE}/before"));
        site.answers().await;
        let asked = site.attempt(Method::POST, SNAPSHOTS, request());
        let observed = async {
            site.held(CAPTURE).await;
            let id = being_taken(&site, &earlier).await;
            site.shell(&format!("kill -STOP {pid}"));
            site.let_go();
            let begun = directory(&site, &id).join("saving");
            until("the capture to begin", MOMENT, async || begun.exists().then_some(())).await;
            is_not_offered(&site, &id, "pending", "still being taken").await;
            id
        };
        let id = tokio::select! {
            answer = asked => panic!("answered while it is taken: {answer:?}"),
            id = observed => id,
        };
        site.kill().await;
        site.shell(&format!("kill -CONT {pid}"));
        assert!(!directory(&site, &id).join("saved").exists(), "nothing of it counts");
        site.start().await;
        serves_a_fork(&site, &id).await;
        assert_eq!(site.until_state("box", "Running").await["vmm_pid"], pid);
        settles(&mut site, "captures that were cut off").await;
    });
}

fn directory(site: &Harness, id: &str) -> PathBuf {
    site.data().join("snapshots").join(id)
}

async fn delete(site: &Harness, id: &str) {
    let answer = site.request(Method::DELETE, &format!("/snapshots/{id}"), None).await;
    assert_eq!(answer.status, StatusCode::NO_CONTENT, "{answer:?}");
    let directory = directory(site, id);
    until("its files to be gone", MOMENT, async || (!directory.exists()).then_some(())).await;
}

#[test]
fn a_snapshot_with_truncated_files_is_refused_and_reported() {
    in_namespace(async || {
        let mut site = sleeping().await;
        let harms = [
            "truncate -s 4096 ram",
            "rm ram",
            "truncate -s 100 state",
            "truncate -s 1M disk.ext4",
            "rm disk.ext4",
            "truncate -s 10 manifest.json",
            "truncate -s 10 snapshot.json",
        ];
        for harm in harms {
            let taken = site.request(Method::POST, SNAPSHOTS, Some(json!({ "kind": "Standby" }))).await;
            assert_eq!(taken.status, StatusCode::CREATED, "{taken:?}");
            let id = taken.body["id"].as_str().expect("an id").to_owned();
            // The damage happens while no daemon runs, and the next daemon finds it.
            site.stop().await;
            site.shell(&format!("cd $DATA/snapshots/{id}/saved; {harm}"));
            site.start().await;
            until(harm, BOOT, async || (seen(&site, &id).await["status"] == "failed").then_some(())).await;
            let why = "missing or were cut off";
            assert!(seen(&site, &id).await["error"].to_string().contains(why), "{harm}");
            is_not_offered(&site, &id, "failed", why).await;
            delete(&site, &id).await;
        }
        behind_its_back(&site).await;
        assert_eq!(site.get("box").await["state"], "Running");
        assert_eq!(site.vmms().len(), 1);
        settles(&mut site, "damaged snapshots").await;
    });
}

/// Checks that a daemon that considers a snapshot complete finds the damage when the snapshot is used.
async fn behind_its_back(site: &Harness) {
    let taken = site.request(Method::POST, SNAPSHOTS, Some(json!({ "kind": "Standby" }))).await;
    let id = taken.body["id"].as_str().expect("an id").to_owned();
    serves_a_fork(site, &id).await;
    site.shell(&format!("truncate -s 4096 $DATA/snapshots/{id}/saved/ram"));
    let path = format!("/snapshots/{id}/fork");
    let asked = site.attempt(Method::POST, &path, Some(json!({ "name": "fork" })));
    let explained = site.until("fork", "told why", |seen| {
        let conditions = seen["conditions"].to_string();
        conditions.contains("not what was taken") || conditions.contains("cut off")
    });
    // The fork is either refused at once, or created with a condition that names what it waits for.
    tokio::select! {
        answer = asked => {
            let answer = answer.expect("answered");
            assert_ne!(answer.body["state"], "Running", "{answer:?}");
            assert!(answer.status.is_client_error() || answer.body["id"].is_string(), "{answer:?}");
        }
        _ = explained => {}
    }
    let gone = site.request(Method::DELETE, "/instances/fork?graceful_shutdown=false", None).await;
    assert!([StatusCode::NO_CONTENT, StatusCode::NOT_FOUND].contains(&gone.status), "{gone:?}");
    delete(site, &id).await;
    // A disk alone has no checksums, but a length.
    let stopped = site.request(Method::POST, "/instances/box/stop", None).await;
    assert_eq!(stopped.status, StatusCode::OK, "{stopped:?}");
    let taken = site.request(Method::POST, SNAPSHOTS, Some(json!({ "kind": "Stopped" }))).await;
    let id = taken.body["id"].as_str().expect("an id").to_owned();
    site.shell(&format!("truncate -s 1M $DATA/snapshots/{id}/saved/disk.ext4"));
    let path = format!("/snapshots/{id}/fork");
    // A fork that should be stopped is stopped from the beginning. It reports the reason when it should run.
    let forked = site.request(Method::POST, &path, Some(json!({ "name": "cold" }))).await;
    assert_eq!(
        (forked.status, &forked.body["state"]),
        (StatusCode::CREATED, &json!("Stopped")),
        "{forked:?}"
    );
    let started = site.attempt(Method::POST, "/instances/cold/start", None);
    // The reason comes from the first to notice: the copy, or the snapshot's own pass.
    let whys = ["1048576 bytes instead of 67108864", "to copy from failed or is gone"];
    let reported = |seen: &Value| {
        let conditions = seen["conditions"].to_string();
        whys.iter().any(|why| conditions.contains(why))
    };
    tokio::select! {
        answer = started => assert!(answer.as_ref().is_some_and(|answer| reported(&answer.body)), "{answer:?}"),
        _ = site.until("cold", "told why", reported) => {}
    }
    let gone = site.request(Method::DELETE, "/instances/cold?graceful_shutdown=false", None).await;
    assert!([StatusCode::NO_CONTENT, StatusCode::NOT_FOUND].contains(&gone.status), "{gone:?}");
    delete(site, &id).await;
    let started = site.request(Method::POST, "/instances/box/start", None).await;
    assert_eq!((started.status, &started.body["state"]), (StatusCode::OK, &json!("Running")), "{started:?}");
}
