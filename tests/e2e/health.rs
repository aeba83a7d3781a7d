//! Health checks on real VMs: their results and consequences, unaffected by crashes and hostile guests.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::crash::{EDGES, OF_HEALTH};
use crate::fixtures::until;
use crate::harness::{BOOT, Harness, LISTEN, MOMENT, Program, image};
use crate::invariants::settles;
use crate::namespace::in_namespace;
use crate::socket::run;

/// Program of a web server with one page, which every start creates anew.
const WEB: &str = "mkdir -p /www; echo well >/www/page; echo >>/boots; httpd -p 80 -h /www; \
                   trap 'exit 0' TERM; while true; do sleep 1; done";

fn word(seen: &Value) -> &str {
    seen["health_status"]["status"].as_str().unwrap_or_default()
}

fn count(seen: &Value, of: &str) -> u64 {
    seen["health_status"][of].as_u64().unwrap_or(0)
}

/// Returns a check with short times. `of` describes the probe.
fn check(kind: &str, of: Value) -> Value {
    let mut check = json!({ "type": kind, "interval": "1s", "timeout": "900ms", "start_period": "0s",
        "failure_threshold": 2 });
    check[kind] = of;
    json!({ "health_check": check })
}

async fn patch(site: &Harness, body: Value) -> Value {
    let answer = site.request(Method::PATCH, "/instances/box", Some(body)).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    answer.body
}

async fn shell(site: &Harness, line: &str) -> String {
    let command = json!({ "command": ["sh", "-c", line], "wait_for_agent": 20 });
    let (output, end) = run(site, "box", command, b"").await;
    assert_eq!(end, json!({ "exitCode": 0 }), "{line}");
    String::from_utf8_lossy(&output).trim().to_owned()
}

fn stead(site: &Harness, arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stead"));
    command.args(arguments).env("STEAD_BASE_URL", format!("http://{LISTEN}"));
    let output = command.env("STEAD_API_KEY", site.token()).output().expect("it runs");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Creates a site with a healthy web server that its policy restarts.
async fn healthy() -> (Harness, String) {
    let site = Harness::running().await;
    let mut body = check("http", json!({ "port": 80, "path": "/page" }));
    body["cmd"] = json!(["sh", "-c", WEB]);
    body["restart_policy"] = json!({ "policy": "on_failure", "backoff": "500ms" });
    let id = site.create("box", &image("busybox"), body).await;
    let seen = site.until("box", "healthy", |seen| word(seen) == "healthy").await;
    assert_eq!((&seen["state"], count(&seen, "consecutive_failures")), (&json!("Running"), 0), "{seen:#}");
    (site, id)
}

/// Checks that the daemon's own log of the instance contains the actions and reasons, across two crashes.
fn the_log_has_actions_and_reasons(site: &Harness) {
    let reported = stead(site, &["logs", "-s", "stead", "box"]);
    let mut rest = reported.as_str();
    for line in [
        "instance: spec generation 1: run 1 should be running",
        "instance: Launch",
        "instance: Running after Initializing",
        "instance: healthy",
        "instance: unhealthy: answered 404, not 200",
        "instance: restart 1 in a row, at ",
        "instance: Shutdown",
        "instance: Launch",
        "instance: healthy",
    ] {
        let (_, after) = rest.split_once(line).unwrap_or_else(|| panic!("{line} is missing in\n{reported}"));
        rest = after;
    }
}

/// Checks that there are no probes in standby, and that they continue after it. The instance enters standby by itself
/// although it is probed every second: no other client is connected.
async fn probes_stop_in_standby(site: &Harness) {
    patch(site, json!({ "auto_standby": { "enabled": true, "idle_timeout": "3s" } })).await;
    let kept = site.until_state("box", "Standby").await;
    assert_eq!(word(&kept), "unknown");
    patch(site, json!({ "auto_standby": { "enabled": false } })).await;
    let back = site.request(Method::POST, "/instances/box/restore", None).await;
    assert_eq!(back.body["state"], "Running", "{back:?}");
    let asked = |seen: &Value| {
        seen["health_status"]["last_checked_at"].as_str()
            > back.body["health_status"]["last_checked_at"].as_str()
    };
    let seen = site.until("box", "asked after standby", asked).await;
    assert_eq!(word(&seen), "healthy", "{seen:#}");
}

#[test]
fn an_unhealthy_program_is_restarted_over_crashes_of_the_daemon_and_gets_well() {
    in_namespace(async || {
        let (mut site, id) = healthy().await;
        // The counts are current, and continue with the next daemon.
        let before = site.until("box", "asked", |seen| count(seen, "consecutive_successes") >= 2).await;
        site.kill().await;
        site.start().await;
        let goes_on = |seen: &Value| {
            count(seen, "consecutive_successes") >= 2
                && seen["health_status"]["last_checked_at"].as_str()
                    > before["health_status"]["last_checked_at"].as_str()
        };
        let seen = site.until("box", "asked on", goes_on).await;
        assert_eq!((word(&seen), &seen["vmm_pid"]), ("healthy", &before["vmm_pid"]), "{seen:#}");

        // One failure is not enough, and is kept across the next crash.
        shell(&site, "mv /www/page /www/gone").await;
        site.until("box", "in doubt", |seen| count(seen, "consecutive_failures") == 1).await;
        site.kill().await;
        site.start().await;
        let failed = |seen: &Value| seen["restart_status"]["last_reason"] == "health_check_failed";
        let seen = site.until("box", "restarted", failed).await;
        assert_eq!(seen["restart_status"]["attempts"], 1, "{seen:#}");
        site.kill().await;
        site.start().await;
        let seen = site.until("box", "another VM that is well", |seen| {
            word(seen) == "healthy" && seen["vmm_pid"] != before["vmm_pid"]
        });
        let seen = seen.await;
        assert_eq!(shell(&site, "wc -l </boots").await, "2");
        // The program may have one failure: it is probed before it serves.
        let error = &seen["health_status"]["last_error"];
        let is_its_own = error.is_null() || error.as_str().is_some_and(|error| error.contains("refused"));
        assert!(is_its_own, "of another launch: {seen:#}");
        assert!(stead(&site, &["describe", "box"]).contains("Health       healthy, checked"));

        the_log_has_actions_and_reasons(&site);
        let following = follow(&site).await;

        // The policy never acts: the status reports the failure, and the program runs on.
        let mut never = check("tcp", json!({ "port": 81 }));
        never["restart_policy"] = json!({ "policy": "never" });
        let patched = patch(&site, never).await;
        assert_eq!((word(&patched), count(&patched, "consecutive_successes")), ("starting", 0));
        let sick = site.until("box", "unhealthy", |seen| word(seen) == "unhealthy").await;
        assert_eq!((&sick["state"], &sick["vmm_pid"]), (&json!("Running"), &seen["vmm_pid"]), "{sick:#}");
        let error = sick["health_status"]["last_error"].as_str().unwrap_or_default();
        assert!(error.contains("refused"), "{error}");
        following.reports("instance: unhealthy: Connection refused").await;
        assert!(stead(&site, &["describe", "box"]).contains("failures in a row: "));
        patch(&site, check("tcp", json!({ "port": 80 }))).await;
        site.until("box", "healthy by another check", |seen| word(seen) == "healthy").await;

        probes_stop_in_standby(&site).await;

        crash_at_every_step(&mut site).await;
        site.delete("box").await;
        settles(&mut site, "a deletion").await;
        assert!(!site.instance_files().iter().any(|file| file.to_string_lossy().contains(&id)));
    });
}

/// A running `stead logs -f` of the daemon's own log.
struct Following {
    _program: Program,
    file: PathBuf,
}

/// Starts to follow. Returns when the last line so far was read, so that no later one is missed.
async fn follow(site: &Harness) -> Following {
    let file = site.scratch("following").join("log");
    let out = std::fs::File::create(&file).expect("made");
    let mut command = Command::new(env!("CARGO_BIN_EXE_stead"));
    command.args(["logs", "-f", "-s", "hypeman", "--tail", "1", "box"]).stdin(Stdio::null()).stdout(out);
    command.env("STEAD_BASE_URL", format!("http://{LISTEN}")).env("STEAD_API_KEY", site.token());
    let following = Following { _program: Program(command.spawn().expect("it runs")), file };
    following.reports("\n").await;
    following
}

impl Following {
    async fn reports(&self, line: &str) {
        let read = || std::fs::read_to_string(&self.file).unwrap_or_default();
        until(line, MOMENT, async || read().contains(line).then_some(())).await;
    }
}

/// Crashes at each step. Leaves a daemon and a check.
async fn crash_at_every_step(site: &mut Harness) {
    let [(kind, begin), (_, end)] = OF_HEALTH;
    for edge in EDGES {
        let failpoint = format!("{kind}/{end}/{edge}");
        site.stop().await;
        site.spawn(Some(&failpoint));
        site.answers().await;
        // A check that has begun can be ended.
        let asked_at = site.get("box").await["health_status"]["last_checked_at"].clone();
        site.until("box", "asked", |seen| seen["health_status"]["last_checked_at"] != asked_at).await;
        let none = json!({ "health_check": { "type": "none" } });
        site.attempt(Method::PATCH, "/instances/box", Some(none)).await;
        site.crashed(&failpoint).await;
        site.start().await;
        site.until("box", "without a check", |seen| word(seen) == "disabled").await;
        settles(site, &failpoint).await;

        let failpoint = format!("{kind}/{begin}/{edge}");
        site.spawn(Some(&failpoint));
        site.answers().await;
        let tcp = check("tcp", json!({ "port": 80 }));
        site.attempt(Method::PATCH, "/instances/box", Some(tcp)).await;
        site.crashed(&failpoint).await;
        site.start().await;
        site.until("box", "healthy", |seen| word(seen) == "healthy").await;
        settles(site, &failpoint).await;
        site.start().await;
    }
}

#[test]
fn a_check_by_a_program_in_the_guest_is_bounded_whatever_the_program_does() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        let mut body = check("exec", json!({ "command": ["test", "-e", "ok"], "working_dir": "/tmp" }));
        body["cmd"] = json!(["sh", "-c", "while true; do sleep 1; done"]);
        site.create("box", &image("busybox"), body).await;
        let sick = site.until("box", "unhealthy", |seen| word(seen) == "unhealthy").await;
        assert_eq!(sick["health_status"]["last_error"], "exited with code 1", "{sick:#}");
        shell(&site, "touch /tmp/ok").await;
        site.until("box", "healthy", |seen| word(seen) == "healthy").await;
        for (command, error) in [
            (
                json!(["sh", "-c", "echo \"no $(printf '\\033[31m')luck\"; exit 3"]),
                "exited with code 3: no \u{fffd}[31mluck",
            ),
            (json!(["yes"]), "it prints without end"),
            (json!(["no-such-program"]), "no-such-program"),
            (json!(["tail", "-f", "/dev/null"]), "no answer within 900ms"),
        ] {
            let mut asked = check("exec", json!({ "command": command }));
            if command == json!(["yes"]) {
                // On a busy machine an emulated guest takes a while to print a megabyte.
                asked["health_check"]["timeout"] = json!("60s");
                asked["health_check"]["interval"] = json!("60s");
                asked["health_check"]["failure_threshold"] = json!(1);
            }
            patch(&site, asked).await;
            let reported = |seen: &Value| {
                word(seen) == "unhealthy"
                    && seen["health_status"]["last_error"]
                        .as_str()
                        .is_some_and(|reported| reported.contains(error))
            };
            site.until("box", error, reported).await;
        }
        assert!(stead(&site, &["update", "box", "--no-health"]).contains("Running"));
        let seen = site.get("box").await;
        assert_eq!((word(&seen), &seen["health_check"]), ("disabled", &Value::Null));
        // The program of a check is not left running in the guest.
        until("no program of a check", BOOT, async || {
            let programs = shell(&site, "ps").await;
            (!programs.contains("tail -f") && !programs.contains("yes")).then_some(())
        })
        .await;
        site.delete("box").await;
        settles(&mut site, "checks by exec").await;
    });
}
