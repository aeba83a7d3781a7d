//! A VM whose program is an image's own init: a whole system, on a real VM.

use std::time::Instant;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::debian;
use crate::fixtures::deadline;
use crate::harness::{BOOT, Harness, image};
use crate::invariants::settles;
use crate::namespace::in_namespace;
use crate::socket::{Received, Socket, run, shell, tried};

async fn verb(site: &Harness, name: &str, verb: &str) -> Value {
    let answer = site.request(Method::POST, &format!("/instances/{name}/{verb}"), None).await;
    assert_eq!(answer.status, StatusCode::OK, "{verb}: {answer:?}");
    answer.body
}

/// Returns the system when it is up, which it must be as soon as it is Running.
async fn up(site: &Harness) -> Value {
    let seen = site.until_state("sys", "Running").await;
    let (word, _) = run(site, "sys", json!({ "command": ["systemctl", "is-system-running"] }), b"").await;
    let word = String::from_utf8_lossy(&word).trim().to_owned();
    assert!(["running", "degraded"].contains(&word.as_str()), "it is Running, and {word}");
    seen
}

async fn ended(site: &Harness) -> (Value, String) {
    let is_so = |seen: &Value| seen["state"] == "Stopped" && !seen["exit_message"].is_null();
    let seen = site.until("sys", "ended", is_so).await;
    (seen["exit_code"].clone(), seen["exit_message"].as_str().unwrap_or_default().to_owned())
}

/// Runs a command that ends the system. The command's own end does not matter.
async fn inside(site: &Harness, command: &[&str]) {
    let mut socket = Socket::exec(site, "sys", &json!({ "command": command })).await;
    while socket.next().await != Received::End {}
}

/// Checks that the agent is a unit that is not stopped by mistake. When it is killed, with the programs it ran, it is
/// started again and serves the same system as before.
async fn an_agent_that_ends_is_replaced(site: &Harness) {
    let before = up(site).await;
    let shown = shell(site, "sys", "systemctl show -P ActiveState -P MainPID stead-agent").await;
    let pid = shell(site, "sys", "cat /run/stead/stead-agent.pid").await;
    assert!(shown.contains("active") && shown.lines().any(|line| line == pid), "{pid}: {shown}");
    let (_, refused) =
        run(site, "sys", json!({ "command": ["systemctl", "stop", "stead-agent"] }), b"").await;
    assert_ne!(refused, json!({ "exitCode": 0 }));
    let mut left = Socket::exec(site, "sys", &json!({ "command": ["sh", "-c", "echo on; sleep 987"] })).await;
    left.until("on").await;
    inside(site, &["sh", "-c", &format!("kill -KILL {pid}")]).await;
    while left.next().await != Received::End {}
    let again = format!(
        "test $(systemctl show -P MainPID stead-agent) != {pid} && systemctl show -P NRestarts stead-agent"
    );
    let deadline = deadline(BOOT);
    let restarts = loop {
        if let Some(restarts) = tried(site, "sys", &again).await {
            break restarts;
        }
        assert!(Instant::now() < deadline, "no agent: {:#}", site.get("sys").await);
    };
    assert_eq!(restarts.trim(), "1");
    let after = up(site).await;
    for same in ["vmm_pid", "started_at", "restart_status"] {
        assert_eq!(after[same], before[same], "{same}");
    }
    let left = "grep -asl -zx '98[7]' /proc/[0-9]*/cmdline || test $? -lt 3";
    assert_eq!(shell(site, "sys", left).await, "", "what the first agent ran");
}

#[test]
fn a_system_with_its_own_init_is_up_when_it_is_running_and_its_ends_are_reported() {
    // This runs before the namespace, which has no way out.
    debian::layout();
    in_namespace(async || {
        let mut site = Harness::running().await;
        site.push(&debian::layout(), debian::SYSTEM);
        let policy = json!({ "policy": "on_failure", "backoff": "500ms" });
        let body = json!({ "overlay_size": "256MB", "size": "256MB", "restart_policy": policy });
        let id = site.create("sys", &image(debian::SYSTEM), body).await;
        site.until_image(&image(debian::SYSTEM)).await;
        let seen = up(&site).await;
        assert_eq!(shell(&site, "sys", "cat /proc/1/comm; cat /var/marks").await, "systemd\nstart");
        let machine_id = shell(&site, "sys", "cat /etc/machine-id; grep -c . /etc/machine-id").await;
        assert!(machine_id.len() == 34 && !machine_id.contains(debian::MACHINE_ID), "{machine_id}");
        // The program is in no unit of the system, may be killed by the OOM killer, and blocks no signals.
        let run_by_host = "cat /proc/self/cgroup /proc/self/oom_score_adj; grep SigBlk /proc/self/status";
        let reported = shell(&site, "sys", run_by_host).await;
        assert!(reported.contains("/stead-agent\n0\nSigBlk:\t0000000000000000"), "{reported}");
        let request = json!({ "direction": "to", "guest_path": "/var/copied" });
        let mut socket = Socket::cp(&site, "sys", &request).await;
        socket.bytes(b"copied").await;
        socket.json(&json!({ "type": "end" })).await;
        assert!(matches!(socket.next().await, Received::Json(reported) if reported["success"] == true));
        an_agent_that_ends_is_replaced(&site).await;
        // A later daemon finds the agent as it is.
        site.kill().await;
        site.start().await;
        let again = up(&site).await;
        assert_eq!(seen["vmm_pid"], again["vmm_pid"]);
        shell(&site, "sys", "mkdir -p /var/log/journal && journalctl --flush").await;
        // Services are stopped in order, and their data is there at the next start.
        verb(&site, "sys", "stop").await;
        assert_eq!(ended(&site).await, (json!(0), "the system powered off".to_owned()));
        verb(&site, "sys", "start").await;
        up(&site).await;
        assert_eq!(shell(&site, "sys", "cat /var/marks /var/copied").await, "start\nstop\nstart\ncopied");
        // A boot has its own machine id, and the journal continues under it.
        let later = shell(&site, "sys", "cat /etc/machine-id; grep -c . /etc/machine-id").await;
        assert!(later.len() == 34 && later != machine_id, "{machine_id}, then {later}");
        let journals = shell(&site, "sys", "ls /var/log/journal").await;
        assert_eq!(later.lines().next(), Some(journals.as_str()), "one journal");
        let boots = shell(&site, "sys", "journalctl --list-boots --no-pager | wc -l").await;
        assert!(boots.trim().parse::<u32>().is_ok_and(|boots| boots >= 2), "{boots} boots are in it");
        // From inside, a reboot is not a success, so a policy may restart the instance; a power-off is a success.
        inside(&site, &["systemctl", "reboot"]).await;
        let report = |seen: &Value| seen["restart_status"]["attempts"] == 1;
        let seen = site.until("sys", "told of the reboot", report).await;
        let ended_so = (&seen["exit_code"], &seen["exit_message"]);
        assert_eq!(ended_so, (&Value::Null, &json!("the system rebooted")), "{seen:#}");
        site.until("sys", "on its way up again", |seen| seen["state"] == "Initializing").await;
        up(&site).await;
        inside(&site, &["systemctl", "poweroff"]).await;
        assert_eq!(ended(&site).await, (json!(0), "the system powered off".to_owned()));
        assert_eq!(site.get("sys").await["restart_status"]["attempts"], 1, "it stays down");
        let console = site.console(&id);
        assert!(!console.contains("[stead]") && !console.contains("login:"), "{console}");
        let report = site.journal_of(&id);
        assert!(report.contains("guest: the system is up"), "{report}");
        site.delete("sys").await;
        settles(&mut site, "a system").await;
    });
}

#[test]
fn another_init_is_served_and_an_init_that_cannot_be_executed_is_reported() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        let body = json!({ "cmd": ["/bin/init"] });
        site.create("sys", &image("busybox"), body).await;
        site.until_state("sys", "Running").await;
        // The init gets the name it was started by, because one file may be many programs.
        let name = shell(&site, "sys", "cat /proc/1/cmdline").await;
        assert!(name.starts_with("init"), "{name}");
        shell(
            &site,
            "sys",
            "mkdir /sbin; echo '#!/no/interpreter' >/sbin/init; chmod 755 /sbin/init; echo kept >/kept",
        )
        .await;
        verb(&site, "sys", "stop").await;
        assert_eq!(ended(&site).await, (json!(0), "the system shut down".to_owned()));
        // A program called init at another path is an ordinary program.
        let start = async |command: Value| {
            let answer =
                site.request(Method::POST, "/instances/sys/start", Some(json!({ "cmd": command }))).await;
            assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
            ended(&site).await
        };
        let (code, message) = start(json!(["/sbin/init"])).await;
        assert!(code == 127 && message.contains("/sbin/init"), "{code} {message}");
        let script = "printf '#!/bin/sh\\ncat /kept; exit 3\\n' >/init; chmod 755 /init; exec /init";
        assert_eq!(start(json!(["sh", "-c", script])).await, (json!(3), "exited with code 3".to_owned()));
        assert_eq!(start(json!(["/init"])).await, (json!(3), "exited with code 3".to_owned()));
        site.delete("sys").await;
        settles(&mut site, "another init").await;
    });
}
