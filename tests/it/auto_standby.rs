//! Auto-standby over the API: its policy, every status that a client can cause, the hold.

use std::time::Duration;

use serde_json::{Value, json};

use crate::server::{IMAGE, Server, token};

async fn status(server: &Server) -> Value {
    server.send("GET", "/instances/web/auto-standby/status", None).await.body
}

async fn stands(server: &Server, status_word: &str, reason: &str) -> Value {
    let mut seen = Value::Null;
    let observed = tokio::time::timeout(Duration::from_secs(60), async {
        loop {
            seen = status(server).await;
            if (&seen["status"], &seen["reason"]) == (&json!(status_word), &json!(reason)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    assert!(observed.await.is_ok(), "not {status_word}, {reason}: {seen:#}");
    for key in
        ["supported", "configured", "enabled", "eligible", "active_inbound_connections", "tracking_mode"]
    {
        assert!(seen.get(key).is_some(), "{key} is required: {seen}");
    }
    seen
}

async fn patch(server: &Server, policy: Value) {
    let answer = server.send("PATCH", "/instances/web", Some(json!({ "auto_standby": policy }))).await;
    assert_eq!((answer.status, &answer.body["auto_standby"]["enabled"]), (200, &policy["enabled"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_is_stored_changed_held_and_carried_out_and_its_status_shows_it() {
    let server = Server::start().await;
    let hold = "/instances/web/auto-standby/hold";
    server.create(json!({"name": "web", "image": IMAGE, "size": "256MB"})).await;
    let seen = stands(&server, "disabled", "policy_missing").await;
    assert_eq!((&seen["configured"], &seen["idle_timeout"]), (&json!(false), &Value::Null));
    assert_eq!(server.send("POST", hold, None).await.status, 200, "a hold without a policy is nothing");
    let policy = |timeout: &str, is_enabled: bool| json!({"enabled": is_enabled, "idle_timeout": timeout});
    patch(&server, policy("1h", false)).await;
    stands(&server, "disabled", "policy_disabled").await;
    patch(&server, policy("1h", true)).await;
    let seen = stands(&server, "idle_countdown", "idle_timeout_not_elapsed").await;
    assert_eq!((&seen["eligible"], &seen["idle_timeout"]), (&json!(true), &json!("1h0m0s")), "{seen}");
    assert!(seen["next_standby_at"].is_string() && seen["hold_until"].is_null(), "{seen}");
    let held = server.send("POST", hold, None).await;
    assert_eq!(held.status, 200);
    assert!(held.body["hold_until"].as_str() >= seen["next_standby_at"].as_str(), "{}", held.body);
    // With the hold it keeps running, whatever the timeout is by now.
    patch(&server, policy("1s", true)).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let seen = stands(&server, "idle_countdown", "idle_timeout_not_elapsed").await;
    assert_eq!(seen["hold_until"], held.body["hold_until"]);
    let held = server.send("POST", hold, None).await;
    assert!(held.body["hold_until"].as_str() < seen["hold_until"].as_str(), "a later hold takes its place");
    // The wait succeeds for a state that is reached without a request.
    let waited = server.send("GET", "/instances/web/wait?state=Standby&timeout=20s", None).await;
    assert_eq!(waited.body, json!({"state": "Standby", "timed_out": false}));
    stands(&server, "ineligible", "instance_not_running").await;
    let refused = server.send("POST", hold, None).await;
    assert_eq!((refused.status, &refused.body["code"]), (409, &json!("instance_in_standby")));
    assert_eq!(refused.headers["x-should-retry"], "false");
    let back = server.send("POST", "/instances/web/restore", None).await;
    assert_eq!((back.status, &back.body["power_by"]), (200, &json!("client")));
    let reader = token(&server.keys, &["instance:read"], 60);
    let path = "/instances/web/auto-standby/status";
    assert_eq!(server.send_as("GET", path, None, &reader).await.status, 200);
    assert_eq!(server.send_as("POST", hold, None, &reader).await.status, 403);
    let absent = server.send("GET", "/instances/nobody/auto-standby/status", None).await;
    assert_eq!((absent.status, &absent.body["code"]), (404, &json!("not_found")));
    let without = json!({"name": "deaf", "image": IMAGE, "size": "256MB", "network": {"enabled": false},
        "auto_standby": policy("1s", true)});
    server.create(without).await;
    let seen = server.send("GET", "/instances/deaf/auto-standby/status", None).await.body;
    assert_eq!((&seen["status"], &seen["reason"]), (&json!("ineligible"), &json!("network_disabled")));
}
