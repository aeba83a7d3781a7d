//! Requests to a real VM in an unsuitable state are refused with the state and the legal requests, and no state lasts
//! against the desired state.
//!
//! The whole table, with `Paused`, is `controllers/src/verbs.rs`: an instance is paused only within a pass, so that
//! no client observes it.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::harness::{Answer, Harness, image};
use crate::invariants::settles;
use crate::namespace::in_namespace;

/// Verbs, with the states below in which each is accepted. A state change in progress is requested again by a start,
/// and ended by a stop.
const VERBS: [(&str, &[&str]); 10] = [
    ("start", &["Created", "Initializing", "Shutdown", "Stopped", "Unknown"]),
    ("stop", &["Created", "Initializing", "Running", "Shutdown", "Unknown"]),
    ("standby", &["Running"]),
    ("restore", &["Standby"]),
    ("fork", &["Stopped", "Standby"]),
    ("fork from running", &["Stopped", "Standby", "Running"]),
    ("snapshot Standby", &["Running", "Standby"]),
    ("snapshot Stopped", &["Stopped"]),
    ("restore in place", &["Stopped", "Standby"]),
    ("stat", &["Running"]),
];

async fn asked(site: &Harness, verb: &str, snapshot: &str) -> Answer {
    let post = |path: &str, body: Value| {
        let path = format!("/instances/box/{path}");
        async move { site.request(Method::POST, &path, Some(body)).await }
    };
    match verb {
        "fork" => post("fork", json!({ "name": "x" })).await,
        "fork from running" => post("fork", json!({ "name": "x", "from_running": true })).await,
        "snapshot Standby" => post("snapshots", json!({ "kind": "Standby" })).await,
        "snapshot Stopped" => post("snapshots", json!({ "kind": "Stopped" })).await,
        "restore in place" => post(&format!("snapshots/{snapshot}/restore"), json!({})).await,
        "stat" => site.request(Method::GET, "/instances/box/stat?path=/", None).await,
        verb => site.request(Method::POST, &format!("/instances/box/{verb}"), None).await,
    }
}

/// Checks that every illegal verb is refused, and changes nothing.
async fn refuses(site: &Harness, state: &str, snapshot: Option<&str>) {
    let before = site.until_state("box", state).await;
    for (verb, legal) in VERBS {
        // There is no snapshot of an instance that has not run yet.
        let Some(snapshot) = snapshot.or((verb != "restore in place").then_some("")) else { continue };
        if legal.contains(&state) {
            continue;
        }
        let answer = asked(site, verb, snapshot).await;
        let reported = (answer.status, &answer.body["code"]);
        assert_eq!(
            reported,
            (StatusCode::CONFLICT, &json!("invalid_state")),
            "{verb} when {state}: {answer:?}"
        );
        let message = answer.body["message"].as_str().unwrap_or_default();
        // The agent is either asked or unreachable.
        let names_states = verb == "stat" || message.contains(&format!("that is {state}: it must be "));
        assert!(names_states, "{verb} when {state}: {message}");
    }
    let after = site.get("box").await;
    for key in ["state", "generation", "vmm_pid"] {
        assert_eq!(after[key], before[key], "{key} when {state}");
    }
}

async fn verb(site: &Harness, verb: &str, state: &str) {
    let answer = site.request(Method::POST, &format!("/instances/box/{verb}"), None).await;
    assert_eq!((answer.status, &answer.body["state"]), (StatusCode::OK, &json!(state)), "{verb}: {answer:?}");
}

/// Holds a daemon at the step before which the state is the given one, then lets it continue to the desired state.
async fn passes_through(site: &mut Harness, state: &str, step: &str, ask: &str, snapshot: &str, end: &str) {
    site.stop().await;
    site.spawn_held(step);
    site.answers().await;
    let path = format!("/instances/box/{ask}");
    let asked = site.attempt(Method::POST, &path, None);
    let met = async {
        site.held(step).await;
        refuses(site, state, Some(snapshot)).await;
        site.let_go();
    };
    tokio::join!(asked, met);
    site.until_state("box", end).await;
}

#[test]
fn in_every_state_illegal_verbs_are_refused_and_the_spec_is_reached() {
    in_namespace(async || {
        let mut site = Harness::new().await;
        site.spawn_held("disk/Create/before");
        site.answers().await;
        let program = json!({ "size": "128MB", "cmd": ["sh", "-c", "trap 'exit 4' TERM; while true; do sleep 0.1; done"] });
        site.create("box", &image("busybox"), program).await;
        site.held("disk/Create").await;
        refuses(&site, "Created", None).await;
        site.let_go();
        site.until_state("box", "Running").await;
        let taken =
            site.request(Method::POST, "/instances/box/snapshots", Some(json!({ "kind": "Standby" })));
        let taken = taken.await.body["id"].as_str().expect("an id").to_owned();
        refuses(&site, "Running", Some(&taken)).await;
        verb(&site, "standby", "Standby").await;
        refuses(&site, "Standby", Some(&taken)).await;
        verb(&site, "restore", "Running").await;
        verb(&site, "stop", "Stopped").await;
        refuses(&site, "Stopped", Some(&taken)).await;
        passes_through(&mut site, "Initializing", "instance/Configure/before", "start", &taken, "Running")
            .await;
        passes_through(&mut site, "Shutdown", "instance/AcknowledgeExit/before", "stop", &taken, "Stopped")
            .await;
        verb(&site, "start", "Running").await;
        // A VMM that does not answer is ended after a grace period, and its VM comes back.
        let pid = site.get("box").await["vmm_pid"].clone();
        site.shell(&format!("kill -STOP {pid}"));
        // A change of the spec triggers an observation: a stopped process causes no event.
        let policy = json!({ "restart_policy": { "policy": "on_failure" } });
        let patched = site.request(Method::PATCH, "/instances/box", Some(policy)).await;
        assert_eq!(patched.status, StatusCode::OK, "{patched:?}");
        let blind = site.until("box", "Unknown", |seen| seen["state"] == "Unknown").await;
        assert!(blind["state_error"].is_string(), "{blind:#}");
        refuses(&site, "Unknown", Some(&taken)).await;
        let back = site.until_state("box", "Running").await;
        assert_ne!(back["vmm_pid"], pid);
        settles(&mut site, "transitions").await;
    });
}
