//! A hostile web server in a guest that has a health check, beside a healthy one.

use serde_json::{Value, json};

use super::{GROWTH_MAX, make, resident};
use crate::harness::{Harness, image};
use crate::invariants::settles;
use crate::namespace::in_namespace_alone;

fn check(path: &str) -> Value {
    json!({ "type": "http", "http": { "port": 80, "path": path }, "interval": "1s", "timeout": "900ms",
        "start_period": "0s", "failure_threshold": 1 })
}

fn status(seen: &Value) -> &Value {
    &seen["health_status"]["status"]
}

fn successes(seen: &Value) -> u64 {
    seen["health_status"]["consecutive_successes"].as_u64().unwrap_or(0)
}

/// Sets a new check for the hostile instance, so that its results belong to this check.
async fn ask(site: &Harness, path: &str) {
    let body = json!({ "health_check": check(path) });
    let answer = site.request(reqwest::Method::PATCH, "/instances/bad", Some(body)).await;
    assert_eq!(answer.status, 200, "{answer:?}");
}

#[test]
fn a_web_server_that_answers_without_sense_or_end_is_unhealthy_and_costs_nobody_anything() {
    in_namespace_alone(async || {
        let mut site = Harness::running().await;
        make(&site, "web", "/bin/web");
        let well = "mkdir -p /www; echo well >/www/page; httpd -p 80 -h /www; while true; do sleep 1; done";
        let good = json!({ "cmd": ["sh", "-c", well], "health_check": check("/page") });
        site.create("good", &image("busybox"), good).await;
        site.create("bad", &image("web"), json!({ "health_check": check("/") })).await;
        for name in ["good", "bad"] {
            // An endless answer is healthy as soon as its head is.
            site.until(name, "healthy", |seen| status(seen) == "healthy").await;
        }
        let size = resident(&site);
        for path in [
            "/garbage",
            "/nothing",
            "/closed",
            "/trickle",
            "/headers",
            "/header",
            "/continue",
            "/number",
            "/redirect",
        ] {
            let before = successes(&site.get("good").await);
            ask(&site, path).await;
            let seen = site.until("bad", path, |seen| status(seen) == "unhealthy").await;
            let error = seen["health_status"]["last_error"].as_str().unwrap_or_default().to_owned();
            let neighbour = site.until("good", "asked meanwhile", |seen| successes(seen) > before).await;
            let grown = resident(&site).saturating_sub(size);
            eprintln!("{path}: {error}; the daemon grew by {} KiB", grown >> 10);
            assert_eq!(
                (status(&neighbour), &seen["state"]),
                (&json!("healthy"), &json!("Running")),
                "{path}"
            );
            assert!(!error.is_empty() && error.len() < 1000, "{path}: {error}");
            assert!(grown < GROWTH_MAX, "{path}: the daemon grew by {grown} bytes");
        }
        ask(&site, "/").await;
        site.until("bad", "healthy", |seen| status(seen) == "healthy").await;
        site.delete("bad").await;
        site.delete("good").await;
        settles(&mut site, "a hostile web server").await;
    });
}
