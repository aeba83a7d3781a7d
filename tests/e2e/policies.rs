//! Automatic actions on an instance, on real VMs: restarts, expiry, phases.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::fixtures::until;
use crate::harness::{BOOT, Harness, image};
use crate::invariants::settles;
use crate::namespace::in_namespace_alone;

fn attempts(seen: &Value) -> u64 {
    seen["restart_status"]["attempts"].as_u64().unwrap_or(0)
}

#[test]
fn a_failed_program_is_restarted_as_its_policy_allows_and_after_crashes() {
    in_namespace_alone(async || {
        let mut site = Harness::running().await;
        let script = "echo run >>/runs; echo $(wc -l </runs) runs; exit 3";
        let policy = json!({ "policy": "on_failure", "backoff": "500ms", "max_attempts": 2 });
        let body = json!({ "cmd": ["sh", "-c", script], "restart_policy": policy });
        let id = site.create("box", &image("busybox"), body).await;
        // The daemon dies in the delay before a restart, and the next one continues with it.
        let waiting = |seen: &Value| attempts(seen) == 1 && seen["exit_code"] == 3;
        site.until("box", "waiting for its restart", waiting).await;
        site.kill().await;
        site.start().await;
        let over = |seen: &Value| {
            seen["state"] == "Stopped" && seen["restart_status"]["blocked_reason"] == "max_attempts_exceeded"
        };
        let seen = site.until("box", "given up", over).await;
        assert_eq!((attempts(&seen), &seen["exit_code"]), (2, &json!(3)), "{seen:#}");
        assert!(seen["restart_status"]["last_attempt_at"].is_string(), "{seen:#}");
        assert!(
            site.console(&id).contains("3 runs"),
            "the disk is kept over restarts: {}",
            site.console(&id)
        );
        // A policy that allows more takes effect, and a start begins anew.
        let path = format!("/instances/{id}");
        let slow = json!({ "restart_policy": { "policy": "always", "backoff": "2m" } });
        let patched = site.request(Method::PATCH, &path, Some(slow)).await;
        assert_eq!(
            (patched.status, &patched.body["restart_policy"]["backoff"]),
            (StatusCode::OK, &json!("2m0s"))
        );
        site.request(Method::POST, &format!("{path}/start"), None).await;
        let delayed = |seen: &Value| {
            seen["state"] == "Stopped" && seen["restart_status"]["next_attempt_at"].is_string()
        };
        let seen = site.until("box", "delayed", delayed).await;
        assert_eq!((attempts(&seen), &seen["state"]), (1, &json!("Stopped")), "{seen:#}");
        // A manual stop holds, although nothing runs at that moment.
        let stopped = site.request(Method::POST, &format!("{path}/stop"), None).await;
        assert_eq!(stopped.status, StatusCode::OK, "{stopped:?}");
        let manual = |seen: &Value| seen["restart_status"]["blocked_reason"] == "manual_stop";
        let seen = site.until("box", "stopped by hand", manual).await;
        assert!(seen["restart_status"]["next_attempt_at"].is_null(), "{seen:#}");
        let phases = &seen["phase_durations_ms"];
        assert!(
            phases["running"].as_u64() > Some(0) && phases["initializing"].as_u64() > Some(0),
            "{phases}"
        );
        assert_eq!(seen["current_phase"], "stopped");
        site.delete("box").await;
        settles(&mut site, "restarts").await;
    });
}

#[test]
fn an_instance_expires_in_time_even_when_no_daemon_ran() {
    in_namespace_alone(async || {
        let mut site = Harness::running().await;
        let idle = json!({ "cmd": ["sleep", "10000"], "ttl": "1h" });
        let id = site.create("box", &image("busybox"), idle).await;
        site.until_state("box", "Running").await;
        let path = format!("/instances/{id}");
        for (body, status, code) in [
            (json!({ "ttl": "1s", "expires_at": "2030-01-01T00:00:00Z" }), 400, "invalid_ttl"),
            (json!({ "expires_at": "2020-01-01T00:00:00Z" }), 400, "invalid_expires_at"),
            (json!({}), 400, "invalid_request"),
            (json!({ "env": { "A=": "b" } }), 400, "invalid_request"),
            (json!({ "restart_policy": { "policy": "sometimes" } }), 400, "invalid_restart_policy"),
        ] {
            let refused = site.request(Method::PATCH, &path, Some(body.clone())).await;
            assert_eq!((refused.status.as_u16(), &refused.body["code"]), (status, &json!(code)), "{body}");
        }
        let off = site.request(Method::PATCH, &path, Some(json!({ "ttl": "0s" }))).await;
        assert_eq!((off.status, &off.body["expires_at"]), (StatusCode::OK, &Value::Null));
        let soon = site.request(Method::PATCH, &path, Some(json!({ "ttl": "2s" }))).await;
        assert!(soon.body["expires_at"].is_string(), "{soon:?}");
        // The instance's time ends while no daemon runs.
        site.kill().await;
        until("the end of its time", BOOT, async || {
            let at: jiff::Timestamp = soon.body["expires_at"].as_str()?.parse().ok()?;
            (jiff::Timestamp::now() > at).then_some(())
        })
        .await;
        assert_eq!(site.vmms().len(), 1);
        site.start().await;
        until("its deletion", BOOT, async || {
            let answer = site.request(Method::GET, &path, None).await;
            (answer.status == StatusCode::NOT_FOUND).then_some(())
        })
        .await;
        // The timer of a running daemon ends it as well.
        let short = json!({ "cmd": ["sleep", "10000"], "ttl": "5s" });
        let id = site.create("short", &image("busybox"), short).await;
        let seen = site.get("short").await;
        let at: jiff::Timestamp = seen["expires_at"].as_str().expect("reported").parse().expect("a time");
        until("its deletion", BOOT, async || {
            let answer = site.request(Method::GET, &format!("/instances/{id}"), None).await;
            (answer.status == StatusCode::NOT_FOUND).then_some(())
        })
        .await;
        assert!(jiff::Timestamp::now() >= at, "it went before its time");
        settles(&mut site, "expiry").await;
    });
}
