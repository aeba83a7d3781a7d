//! A guest that is hostile from its first process on, beside an honest one.

mod health;

use std::time::Instant;

use serde_json::{Value, json};

use crate::agent::waiting;
use crate::fixtures::until;
use crate::harness::{Harness, MOMENT, image};
use crate::invariants::settles;
use crate::namespace::in_namespace_alone;
use crate::socket::run;

const ROUNDS: usize = 15;
/// Limit on the slowdown of the neighbour. A hostile VM keeps one of this machine's two processors busy, which alone
/// costs the neighbour a factor of about three. A daemon that was kept busy would cost it far more.
const SLOWER_MAX: f64 = 10.0;
const GROWTH_MAX: u64 = 24 << 20;

/// Adds an image to the site's layout, named after its program, whose source file is beside this one.
fn make(site: &Harness, name: &str, location: &str) {
    let root = site.scratch("hostile-root");
    let program = root.join(name).display().to_string();
    let source = format!("{}/tests/e2e/hostile_guest/{name}.rs", env!("CARGO_MANIFEST_DIR"));
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let options =
        ["--edition=2024", "-Copt-level=2", "-Ctarget-feature=+crt-static", "-Cstrip=symbols", "-o"];
    crate::fixtures::run(&rustc, &[&options[..], &[&program, &source]].concat());
    let layout = site.layout();
    let target = format!("{layout}:{name}");
    crate::fixtures::run("umoci", &["tag", "--image", &format!("{layout}:busybox"), name]);
    crate::fixtures::run("umoci", &["insert", "--image", &target, &program, location]);
    crate::fixtures::run("umoci", &["config", "--image", &target, &format!("--config.cmd={location}")]);
    site.push(&layout, name);
}

fn resident(site: &Harness) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", site.daemon_pid())).expect("it lives");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("reported");
    line.split_whitespace().next().and_then(|word| word.parse::<u64>().ok()).expect("a number") << 10
}

/// Returns the median time of an exec on the neighbour, in seconds.
async fn exec_time(site: &Harness) -> f64 {
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let start = Instant::now();
        let (_, end) = run(site, "good", json!({ "command": ["/bin/true"] }), b"").await;
        assert_eq!(end, json!({ "exitCode": 0 }));
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    times[ROUNDS / 2]
}

#[test]
fn a_guest_that_is_hostile_from_pid_1_on_harms_neither_its_neighbour_nor_the_daemon() {
    in_namespace_alone(async || {
        let mut site = Harness::running().await;
        make(&site, "guest", "/sbin/init");
        waiting(&site, "good", json!({})).await;
        let (calm, size) = (exec_time(&site).await, resident(&site));
        let bad = site.create("bad", &image("guest"), json!({})).await;
        site.until_console(&bad, "hostile: token found").await;
        for attack in
            ["floods", "lies about sizes", "speaks on streams", "nests", "flaps", "boasts", "is silent"]
        {
            site.until_console(&bad, &format!("hostile: {attack}")).await;
            let (slow, grown) = (exec_time(&site).await, resident(&site).saturating_sub(size));
            eprintln!(
                "{attack}: exec {calm:.4} s before, {slow:.4} s now; the daemon grew by {} KiB",
                grown >> 10
            );
            assert!(slow < calm * SLOWER_MAX, "{attack}: an exec took {slow:.3} s, and {calm:.3} s before");
            assert!(grown < GROWTH_MAX, "{attack}: the daemon grew by {grown} bytes");
        }
        // The hostile guest still has its token, so its messages about itself are accepted, and no others.
        let good = site.get("good").await;
        assert_eq!((&good["state"], &good["exit_code"]), (&json!("Running"), &Value::Null), "{good:#}");
        // A guest that reads nothing is ended all the same, and starts again.
        let path = "/instances/bad";
        let stopped = site.request(reqwest::Method::POST, &format!("{path}/stop"), None).await;
        assert_eq!(stopped.body["state"], "Stopped", "{stopped:?}");
        site.request(reqwest::Method::POST, &format!("{path}/start"), None).await;
        site.until_console(&bad, "hostile: replayed").await;
        let seen = site.get("bad").await;
        assert_eq!((&seen["state"], &seen["exit_code"]), (&json!("Running"), &Value::Null), "{seen:#}");
        site.delete("bad").await;
        until("the daemon as small as before", MOMENT, async || {
            (resident(&site) < size + GROWTH_MAX).then_some(())
        })
        .await;
        site.delete("good").await;
        settles(&mut site, "a hostile guest").await;
    });
}
