//! A snapshot schedule of a real VM: a run that was due without a daemon, crashes at every step, and foreign
//! snapshots untouched.

use std::process::Command;
use std::time::Duration;

use jiff::Timestamp;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::crash::{EDGES, OF_SCHEDULE};
use crate::fixtures::until;
use crate::harness::{BOOT, Harness, LISTEN, image};
use crate::invariants::settles;
use crate::namespace::in_namespace;

const PATH: &str = "/instances/box/snapshot-schedule";
/// Time that covers the shortest interval and the largest deviation of a run from it.
const RUN: Duration = Duration::from_secs(70);

async fn schedule(site: &Harness) -> Value {
    let answer = site.request(Method::GET, PATH, None).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    answer.body
}

async fn snapshots(site: &Harness) -> Vec<Value> {
    let answer = site.request(Method::GET, "/snapshots", None).await;
    answer.body.as_array().expect("a list").clone()
}

fn time(value: &Value) -> Timestamp {
    value.as_str().and_then(|text| text.parse().ok()).unwrap_or_else(|| panic!("{value} is no time"))
}

/// Starts a daemon that dies at the step's failpoint, and then another without a failpoint.
async fn dies_at(site: &mut Harness, step: (&str, &str), edge: &str) {
    let failpoint = format!("{}/{}/{edge}", step.0, step.1);
    site.spawn(Some(&failpoint));
    site.crashed(&failpoint).await;
}

async fn the_command_line_sets_and_removes_it(site: &Harness) {
    let command = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stead"));
        command.args(arguments).env("STEAD_BASE_URL", format!("http://{LISTEN}"));
        let output = command.env("STEAD_API_KEY", site.token()).output().expect("it runs");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let reported = command(&["snapshot", "schedule", "set", "box", "--every", "2h", "--keep", "3"]);
    assert!(reported.contains("2h0m0s"), "{reported}");
    assert!(command(&["logs", "-s", "stead", "box"]).contains("snapshot_schedule: Take"));
    assert_eq!(command(&["snapshot", "schedule", "rm", "box"]).trim(), "box");
    assert_eq!(site.request(Method::DELETE, PATH, None).await.status, StatusCode::NOT_FOUND);
}

#[test]
fn a_schedule_catches_up_with_a_missed_run_over_crashes_and_deletes_only_its_own() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        let id = site.create("box", &image("busybox"), json!({ "cmd": ["sleep", "10000"] })).await;
        site.until_state("box", "Running").await;
        assert_eq!(site.request(Method::GET, PATH, None).await.status, StatusCode::NOT_FOUND);
        for wrong in [json!({}), json!({ "interval": "1s", "retention": { "max_count": 1 } })] {
            let refused = site.request(Method::PUT, PATH, Some(wrong.clone())).await;
            let reported = (refused.status, &refused.body["code"]);
            assert_eq!(reported, (StatusCode::BAD_REQUEST, &json!("invalid_request")), "{wrong}");
        }
        let mine = json!({ "kind": "Standby", "name": "mine" });
        let mine = site.request(Method::POST, "/instances/box/snapshots", Some(mine)).await;
        assert_eq!(mine.status, StatusCode::CREATED, "{mine:?}");
        let keep = |age: &str| {
            json!({ "interval": "1m", "retention": { "max_count": 1, "max_age": age },
                "name_prefix": "nightly", "metadata": { "by": "clock" } })
        };
        let put = site.request(Method::PUT, PATH, Some(keep("1h"))).await;
        assert_eq!((put.status, &put.body["instance_id"]), (StatusCode::OK, &json!(id)), "{put:?}");
        let due = time(&put.body["next_run_at"]);
        site.kill().await;
        until("the run's time", RUN, async || (Timestamp::now() > due).then_some(())).await;

        let [take, prune] = OF_SCHEDULE;
        for edge in EDGES {
            dies_at(&mut site, take, edge).await;
        }
        site.start().await;
        let run = until("the run", BOOT, async || {
            let seen = schedule(&site).await;
            seen["last_snapshot_id"].is_string().then_some(seen)
        })
        .await;
        assert_eq!(run["last_error"], Value::Null, "{run:#}");
        assert_eq!(time(&run["next_run_at"]).duration_since(due).as_secs() % 60, 0, "{run:#}");
        let all = snapshots(&site).await;
        let own: Vec<&Value> = all.iter().filter(|one| one["id"] == run["last_snapshot_id"]).collect();
        assert_eq!((all.len(), own.len()), (2, 1), "one run, one snapshot: {all:#?}");
        assert_eq!((&own[0]["kind"], &own[0]["tags"]["by"]), (&json!("Standby"), &json!("clock")));
        assert!(own[0]["name"].as_str().is_some_and(|name| name.starts_with("nightly-20")), "{own:?}");
        assert_eq!(site.get("box").await["state"], "Running");

        // The schedule keeps fewer: the snapshot it took is removed, the manual snapshot is kept.
        site.stop().await;
        for (edge, age) in EDGES.into_iter().zip(["2s", "1s"]) {
            site.spawn(Some(&format!("{}/{}/{edge}", prune.0, prune.1)));
            if edge == "before" {
                site.answers().await;
                site.attempt(Method::PUT, PATH, Some(keep(age))).await;
            }
            site.crashed(edge).await;
        }
        site.start().await;
        let mine = vec![mine.body["id"].clone()];
        until("its own snapshot to be gone", BOOT, async || {
            let ids: Vec<Value> = snapshots(&site).await.iter().map(|one| one["id"].clone()).collect();
            (ids == mine).then_some(())
        })
        .await;
        the_command_line_sets_and_removes_it(&site).await;
        let path = format!("/snapshots/{}", mine[0].as_str().expect("an id"));
        assert_eq!(site.request(Method::DELETE, &path, None).await.status, StatusCode::NO_CONTENT);
        site.delete("box").await;
        settles(&mut site, "schedules").await;
    });
}
