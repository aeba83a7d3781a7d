//! Changes of instances from outside: every field with the time at which it applies, and what is refused.

use std::time::Duration;

use serde_json::{Value, json};
use stead_controllers::sim::AMPLE;
use stead_schemas::node::Resources;
use stead_schemas::quantity::Bytes;

use crate::cli::{MOMENT, ended, stead};
use crate::server::{Answer, IMAGE, Server};

const PATH: &str = "/instances/web";

/// Lists all fields that can be changed, with a new value and with `true` if a running program cannot see the change.
fn fields() -> Vec<(&'static str, Value, bool)> {
    vec![
        ("name", json!("web"), false),
        ("tags", json!({"team": "a"}), false),
        ("restart_policy", json!({"policy": "always"}), false),
        ("ttl", json!("2h"), false),
        ("expires_at", json!("2099-01-01T00:00:00Z"), false),
        ("health_check", json!({"type": "tcp", "tcp": {"port": 80}}), false),
        ("auto_standby", json!({"enabled": true, "idle_timeout": "1h"}), false),
        ("snapshot_policy", json!({"compression": {"enabled": true}}), false),
        ("disk_io_bps", json!("20MB/s"), false),
        ("network", json!({"bandwidth_download": "10Mbps"}), false),
        ("hotplugged_size", json!("128MB"), false),
        ("devices", json!([]), false),
        ("gpu", json!({}), false),
        ("credentials", json!({}), false),
        ("vcpus", json!(2), true),
        ("size", json!("512MB"), true),
        ("hotplug_size", json!("0"), true),
        ("overlay_size", json!("20GB"), true),
        ("env", json!({"NEW": "secret-value"}), true),
        ("entrypoint", json!(["/bin/entry"]), true),
        ("cmd", json!(["other"]), true),
        ("hypervisor", json!("qemu-microvm"), true),
        ("skip_guest_agent", json!(true), true),
        ("skip_kernel_headers", json!(true), true),
        ("image", json!("registry.test/other:v1"), true),
    ]
}

pub(crate) async fn running() -> Server {
    running_on(AMPLE).await
}

/// Starts a server on a host of this size, with an instance that runs.
async fn running_on(capacity: Resources) -> Server {
    let server = Server::start_sized(capacity, |_, _| {}).await;
    let body = json!({
        "name": "web", "image": IMAGE, "size": "256MB", "vcpus": 1, "hypervisor": "qemu", "env": {"OLD": "1"},
        "hotplug_size": "256MB",
    });
    server.create(body).await;
    reaches(&server, "Running").await;
    server
}

pub(crate) async fn reaches(server: &Server, state: &str) {
    let path = format!("{PATH}/wait?state={state}&timeout=60s");
    let waited = server.send("GET", &path, None).await;
    assert_eq!(waited.body["state"], state, "{}", waited.body);
}

/// Waits until the instance is as it should be.
pub(crate) async fn until(server: &Server, is_right: impl Fn(&Value) -> bool) -> Value {
    let arrived = async {
        loop {
            let seen = read(server).await;
            if is_right(&seen) {
                return seen;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(MOMENT, arrived).await.expect("the change arrives")
}

/// Runs the command line; returns its exit code and both outputs.
pub(crate) async fn runs(server: &Server, words: &[&str]) -> (i32, String, String) {
    ended(stead(&server.base, &server.token, words).spawn().expect("started")).await
}

pub(crate) async fn patch(server: &Server, body: Value) -> Answer {
    server.send("PATCH", PATH, Some(body)).await
}

pub(crate) async fn read(server: &Server) -> Value {
    server.send("GET", PATH, None).await.body
}

fn waiting(instance: &Value) -> Option<&Value> {
    let conditions = instance["conditions"].as_array().expect("a list");
    conditions.iter().find(|condition| condition["type"] == "PendingChanges")
}

#[tokio::test(flavor = "multi_thread")]
async fn each_field_applies_at_once_or_waits_for_the_next_start_as_reported() {
    let server = running().await;
    for (field, value, waits) in fields() {
        let body = json!({ field: value });
        // The rehearsal says the same, and changes nothing.
        let before = read(&server).await;
        let rehearsed = server.send("PATCH", &format!("{PATH}?dry_run=true"), Some(body.clone())).await;
        assert_eq!(read(&server).await["generation"], before["generation"], "{field}");
        let changed = patch(&server, body).await;
        assert_eq!((rehearsed.status, changed.status), (200, 200), "{field}: {}", changed.body);
        let applies = if waits { "at_next_start" } else { "now" };
        let expected = json!({ field: applies });
        assert_eq!((&rehearsed.body["changes"], &changed.body["changes"]), (&expected, &expected), "{field}");
        assert_eq!(changed.body["pending_changes"].get(field).is_some(), waits, "{field}: {}", changed.body);
        if !waits && !["name", "tags", "devices", "gpu", "credentials"].contains(&field) {
            assert_ne!(changed.body["generation"], before["generation"], "{field}");
        }
    }
    let seen = read(&server).await;
    assert_eq!(
        (&seen["vcpus"], &seen["size"], &seen["env"]),
        (&json!(1), &json!("256.0 MB"), &json!({"OLD": "1"}))
    );
    assert_eq!(seen["pending_changes"]["env"], json!({"NEW": "***"}), "values of variables are not shown");
    assert_eq!(seen["tags"], json!({"team": "a"}));

    // A stop ends the wait.
    assert_eq!(server.send("POST", &format!("{PATH}/stop"), None).await.status, 200);
    let applied = until(&server, |seen| seen["pending_changes"].is_null() && waiting(seen).is_none()).await;
    assert_eq!((&applied["vcpus"], &applied["size"]), (&json!(2), &json!("512.0 MB")), "{applied}");
    assert_eq!(applied["env"], json!({"OLD": "1", "NEW": "secret-value"}));
    assert_eq!(applied["hypervisor"], "qemu-microvm");
    // Without a program every change applies at once.
    let changed = patch(&server, json!({"vcpus": 3, "env": {"OLD": null}})).await.body;
    assert_eq!(changed["changes"], json!({"vcpus": "now", "env": "now"}), "{changed}");
    assert_eq!((&changed["vcpus"], &changed["env"]), (&json!(3), &json!({"NEW": "secret-value"})));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_is_only_asked_for_and_a_program_that_does_not_run_is_not_started() {
    let server = running().await;
    patch(&server, json!({"vcpus": 2})).await;
    let seen = until(&server, |seen| waiting(seen).is_some()).await;
    assert!(
        waiting(&seen)
            .is_some_and(|one| one["message"].as_str().is_some_and(|text| text.ends_with(": vcpus")))
    );
    let started = seen["started_at"].clone();
    // What waited is carried out by the restart, too.
    let changed = patch(&server, json!({"size": "512MB", "restart": true})).await;
    assert_eq!(changed.body["changes"], json!({"size": "with_restart"}), "{}", changed.body);
    let again = |seen: &Value| seen["state"] == "Running" && seen["started_at"] != started;
    let seen = until(&server, again).await;
    assert_eq!(
        (&seen["vcpus"], &seen["size"], waiting(&seen)),
        (&json!(2), &json!("512.0 MB"), None),
        "{seen}"
    );

    // A memory is of the machine that it was saved of.
    assert_eq!(server.send("POST", &format!("{PATH}/standby"), None).await.status, 200);
    let refused = patch(&server, json!({"vcpus": 3, "restart": true})).await;
    assert_eq!((refused.status, &refused.body["code"]), (409, &json!("invalid_state")), "{}", refused.body);
    assert_eq!(patch(&server, json!({"vcpus": 3})).await.body["changes"], json!({"vcpus": "at_next_start"}));
    assert_eq!(server.send("POST", &format!("{PATH}/restore"), None).await.status, 200);
    reaches(&server, "Running").await;
    assert_eq!(read(&server).await["vcpus"], 2);
    assert_eq!(server.send("POST", &format!("{PATH}/stop"), None).await.status, 200);
    assert_eq!(patch(&server, json!({"cmd": ["more"], "restart": true})).await.status, 200);
    let seen = until(&server, |seen| seen["vcpus"] == 3).await;
    assert_eq!(seen["state"], "Stopped", "{seen}");
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_that_cannot_be_are_refused_before_they_are_stored() {
    let capacity = Resources { cpus: 1, memory: Bytes(1 << 30), disk: Bytes(100 << 30) };
    let server = running_on(capacity).await;
    let long = "x".repeat(200_000);
    let variables: Value =
        (0..3).map(|n| (format!("V{n}"), json!(&long[..100_000]))).collect::<serde_json::Map<_, _>>().into();
    for (body, status, code, problem) in [
        (json!({"vcpus": 0}), 400, "invalid_request", "vcpus must be a whole number from 1"),
        (json!({"vcpus": "two"}), 400, "invalid_request", "vcpus must be a whole number"),
        (json!({"size": "1MB"}), 400, "invalid_size", "size must be from"),
        (json!({"hotplug_size": "33GB"}), 400, "invalid_hotplug_size", "hotplug_size must be from"),
        (
            json!({"hotplugged_size": "257MB"}),
            400,
            "invalid_request",
            "at most hotplug_size, which is 256.0 MB",
        ),
        (json!({"hypervisor": "qemu-microvm"}), 400, "not_supported", "hotplug_size"),
        (json!({"overlay_size": "1GB"}), 400, "invalid_request", "disks do not shrink"),
        (json!({"hypervisor": "vz"}), 400, "not_supported", "vz is not supported"),
        (json!({"env": {"A=B": "x"}}), 400, "invalid_request", "env[A=B]"),
        (json!({"env": {"A": 1}}), 400, "invalid_request", "env[A] must be a string"),
        (json!({"env": variables}), 400, "invalid_request", "env is larger than"),
        (json!({"restart": "yes"}), 400, "invalid_request", "restart must be true or false"),
        (json!({"volumes": [{}]}), 400, "invalid_request", "volumes[0].volume_id"),
        (json!({"volumes": [{"volume_id": "none", "mount_path": "/data"}]}), 404, "not_found", "none"),
        (json!({"tags": {"": "x"}}), 400, "invalid_request", "tags"),
        (json!({}), 400, "invalid_request", "at least one field"),
    ] {
        let refused = patch(&server, body.clone()).await;
        assert_eq!((refused.status, &refused.body["code"]), (status, &json!(code)), "{}", refused.body);
        let message = refused.body["message"].as_str().unwrap_or_default().to_owned();
        assert!(message.contains(problem), "{message}");
    }
    let unclear = server.send("PATCH", &format!("{PATH}?dry_run=perhaps"), Some(json!({"vcpus": 2}))).await;
    assert_eq!(unclear.status, 400, "{}", unclear.body);
    // What waits counts as taken, so that the start that carries it out cannot fail for lack of room.
    let refused = patch(&server, json!({"size": "2GB"})).await;
    assert_eq!(
        (refused.status, &refused.body["code"]),
        (409, &json!("insufficient_resources")),
        "{}",
        refused.body
    );
    let refused = patch(&server, json!({"overlay_size": "99GB"})).await;
    assert_eq!(
        (refused.status, &refused.body["code"]),
        (409, &json!("insufficient_resources")),
        "{}",
        refused.body
    );
    let rehearsed = server.send("PATCH", &format!("{PATH}?dry_run=true"), Some(json!({"size": "2GB"}))).await;
    assert_eq!(rehearsed.status, 409, "{}", rehearsed.body);
    let seen = read(&server).await;
    assert!(seen["pending_changes"].is_null(), "{seen}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_changes_every_field_and_prints_when_it_applies() {
    let server = running().await;
    let words = [
        "update",
        "web",
        "--cpus",
        "2",
        "--memory",
        "512MB",
        "-e",
        "NEW=1",
        "--unset-env",
        "OLD",
        "--tag",
        "a=b",
        "--hypervisor",
        "qemu-microvm",
        "--hotplug-size",
        "0",
        "--hotplugged-size",
        "0",
        "--dry-run",
        "--",
        "sleep",
        "9",
    ];
    let (code, table, notes) = runs(&server, &words).await;
    assert_eq!(code, 0, "{notes}");
    assert!(table.contains("web"), "{table}");
    for note in [
        "tags: applies now",
        "vcpus: waits for the next start",
        "env: waits",
        "cmd: waits",
        "hypervisor: waits",
        "hotplug_size: waits",
        "hotplugged_size: applies now",
    ] {
        assert!(notes.contains(note), "{note} is not in {notes}");
    }
    assert!(read(&server).await["pending_changes"].is_null(), "a rehearsal was stored");
    let (code, _, notes) = runs(&server, &["update", "web", "--cpus", "2", "--restart-now"]).await;
    assert_eq!(code, 0, "{notes}");
    assert!(notes.contains("vcpus: the program is started again"), "{notes}");
    until(&server, |seen| seen["vcpus"] == 2 && seen["state"] == "Running").await;
    let (code, _, notes) = runs(&server, &["update", "web"]).await;
    assert!(code != 0 && notes.contains("at least one field"), "{notes}");
}
