//! Malformed requests: each has its status, its code and the path it must name, and none stores anything.

use serde_json::{Value, json};

use crate::server::Server;

/// Returns a valid request with one field replaced.
fn with(key: &str, value: Value) -> String {
    let mut body = json!({"name": "web", "image": "alpine"});
    body[key] = value;
    body.to_string()
}

fn many(count: usize) -> Value {
    let pairs = (0..count).map(|number| (format!("k{number}"), json!("v")));
    Value::Object(pairs.collect())
}

type Case = (&'static str, &'static str, String, u16, &'static str, &'static str);

const NEW: &str = "/instances";
const FORK: &str = "/snapshots/tz4a98xxat96iws9zmbrgj3a/fork";

/// Returns a request to take memory back.
fn reclaim(body: Value, problem: &'static str) -> Case {
    ("POST", "/resources/memory/reclaim", body.to_string(), 400, "invalid_request", problem)
}

/// Returns requests to take memory back.
fn reclaims() -> Vec<Case> {
    vec![
        reclaim(json!({}), "reclaim_bytes is required"),
        reclaim(json!({"reclaim_bytes": -1}), "reclaim_bytes must be a whole"),
        reclaim(json!({"reclaim_bytes": 1, "hold_for": "0s"}), "hold_for "),
        reclaim(json!({"reclaim_bytes": 1, "hold_for": "169h"}), "hold_for "),
        reclaim(json!({"reclaim_bytes": 1, "reason": "x".repeat(257)}), "reason "),
        reclaim(json!({"reclaim_bytes": 1, "forever": true}), "forever "),
    ]
}

/// Returns requests on instances: shape of the body, names, sizes.
fn creations() -> Vec<Case> {
    let post = |body: String, code, path| ("POST", NEW, body, 400, code, path);
    let long = "a".repeat(64);
    vec![
        post("{".to_owned(), "invalid_request", "body is not JSON"),
        post("[]".to_owned(), "invalid_request", "body must be an object"),
        post("\"x\"".to_owned(), "invalid_request", "body must be an object"),
        post(String::new(), "invalid_request", "body must be an object"),
        post("{}".to_owned(), "invalid_request", "image is required"),
        post(json!({"image": "alpine"}).to_string(), "invalid_request", "name is required"),
        post(json!({"name": "web"}).to_string(), "invalid_request", "image is required"),
        post(with("name", json!("Web")), "invalid_request", "name "),
        post(with("name", json!("-web")), "invalid_request", "name "),
        post(with("name", json!("web-")), "invalid_request", "name "),
        post(with("name", json!("")), "invalid_request", "name "),
        post(with("name", json!(long)), "invalid_request", "name must be at most 63"),
        post(with("name", json!(7)), "invalid_request", "name must be a string"),
        post(with("image", json!("UPPER")), "invalid_name", "image "),
        post(with("image", json!("a b")), "invalid_name", "image "),
        post(with("image", json!("a@sha256:12")), "invalid_name", "image "),
        post(with("image", json!({})), "invalid_request", "image must be a string"),
        post(with("size", json!("big")), "invalid_size", "size "),
        post(with("size", json!("1XB")), "invalid_size", "size "),
        post(with("size", json!("1MB")), "invalid_size", "size must be from"),
        post(with("size", json!("33GB")), "invalid_size", "size must be from"),
        post(with("size", json!(512)), "invalid_size", "size must be a string"),
        post(with("overlay_size", json!("1KB")), "invalid_overlay_size", "overlay_size "),
        post(with("overlay_size", json!("101GB")), "invalid_overlay_size", "overlay_size "),
        post(with("vcpus", json!(0)), "invalid_request", "vcpus "),
        post(with("vcpus", json!(17)), "invalid_request", "vcpus "),
        post(with("vcpus", json!(1.5)), "invalid_request", "vcpus "),
        post(with("vcpus", json!("2")), "invalid_request", "vcpus "),
        post(with("vcpus", json!(-1)), "invalid_request", "vcpus "),
        post(with("env", json!([])), "invalid_request", "env must be an object"),
        post(with("env", json!({"A": 1})), "invalid_request", "env[A] "),
        post(with("env", json!({"A=B": "x"})), "invalid_request", "env[A=B] "),
        post(with("env", json!({"": "x"})), "invalid_request", "env[] "),
        post(with("env", json!({"A": "\u{0}"})), "invalid_request", "env[A] "),
        post(with("env", many(1025)), "invalid_request", "env has 1025"),
        post(with("cmd", json!("ls")), "invalid_request", "cmd must be a list"),
        post(with("cmd", json!(["a", 1])), "invalid_request", "cmd[1] "),
        post(with("cmd", json!(["\u{0}"])), "invalid_request", "cmd[0] "),
        post(with("entrypoint", json!([null])), "invalid_request", "entrypoint[0] "),
        post(with("tags", many(51)), "invalid_request", "tags has 51"),
        post(with("tags", json!({"k": "ü"})), "invalid_request", "tags[k] "),
        post(with("surprise", json!(true)), "invalid_request", "surprise "),
    ]
}

/// Returns requests with fields that are not supported yet, malformed and well-formed.
fn hypervisors() -> Vec<Case> {
    let target = |word: &str| json!({"name": "a", "target_hypervisor": word}).to_string();
    let case = |path, body, code, field| ("POST", path, body, 400, code, field);
    vec![
        case(NEW, with("hypervisor", json!("xen")), "invalid_request", "hypervisor "),
        case(NEW, with("hypervisor", json!("firecracker")), "not_supported", "hypervisor "),
        case(FORK, target("xen"), "invalid_request", "target_hypervisor "),
        case(FORK, target("vz"), "not_supported", "target_hypervisor "),
    ]
}

fn policy_fields() -> Vec<Case> {
    let post = |body: String, code, path| ("POST", NEW, body, 400, code, path);
    vec![
        post(with("ttl", json!("soon")), "invalid_ttl", "ttl "),
        post(with("ttl", json!("20y")), "invalid_ttl", "ttl "),
        post(with("ttl", json!("200000h")), "invalid_ttl", "ttl "),
        post(with("expires_at", json!("2001-01-01T00:00:00Z")), "invalid_expires_at", "expires_at "),
        post(with("expires_at", json!("tomorrow")), "invalid_expires_at", "expires_at "),
        post(
            with("restart_policy", json!({"policy": "sometimes"})),
            "invalid_restart_policy",
            "restart_policy.policy ",
        ),
        post(
            with("restart_policy", json!({"policy": "always", "backoff": "0s"})),
            "invalid_restart_policy",
            "restart_policy.backoff ",
        ),
        post(
            with("restart_policy", json!({"policy": "always", "max_attempts": -1})),
            "invalid_request",
            "restart_policy.max_attempts ",
        ),
        post(with("restart_policy", json!({"polcy": "always"})), "invalid_request", "restart_policy.polcy "),
        post(with("health_check", json!({"type": "ping"})), "invalid_health_check", "health_check.type "),
        post(
            with("health_check", json!({"type": "http", "http": {"port": "80"}})),
            "invalid_health_check",
            "health_check.http.port ",
        ),
        post(
            with("auto_standby", json!({"enabled": true})),
            "invalid_auto_standby",
            "auto_standby.idle_timeout ",
        ),
    ]
}

fn unsupported_fields() -> Vec<Case> {
    let post = |body: String, code, path| ("POST", NEW, body, 400, code, path);
    vec![
        post(with("network", json!(true)), "invalid_request", "network must be an object"),
        post(with("network", json!({"enabled": "yes"})), "invalid_request", "network.enabled "),
        post(with("network", json!({"speed": 1})), "invalid_request", "network.speed "),
        post(
            with("network", json!({"bandwidth_download": "fast"})),
            "invalid_bandwidth_download",
            "network.bandwidth_download ",
        ),
        post(
            with("network", json!({"bandwidth_upload": "63kbps"})),
            "invalid_bandwidth_upload",
            "network.bandwidth_upload ",
        ),
        post(
            with("network", json!({"bandwidth_download": "401Gbps"})),
            "invalid_bandwidth_download",
            "network.bandwidth_download ",
        ),
        post(
            with("network", json!({"enabled": false, "bandwidth_upload": "1Mbps"})),
            "invalid_bandwidth_upload",
            "network.bandwidth_upload needs network.enabled",
        ),
        post(with("platform", json!("windows/amd64")), "invalid_platform", "platform "),
        ("POST", NEW, with("platform", json!("linux/arm64")), 404, "platform_not_available", "platform "),
        post(with("hotplug_size", json!("x")), "invalid_hotplug_size", "hotplug_size "),
        post(with("hotplug_size", json!("33GB")), "invalid_hotplug_size", "hotplug_size "),
        post(with("hotplugged_size", json!("1GB")), "invalid_request", "hotplugged_size "),
        post(with("disk_io_bps", json!("x")), "invalid_disk_io_bps", "disk_io_bps "),
        post(with("disk_io_bps", json!("1KB/s")), "invalid_disk_io_bps", "disk_io_bps "),
        post(with("devices", json!(["gpu0"])), "not_supported", "devices "),
        post(with("gpu", json!({"profile": "L40S-1Q"})), "not_supported", "gpu.profile "),
        post(with("volumes", json!([{"volume_id": "v"}])), "invalid_request", "volumes[0].mount_path "),
        post(
            with("volumes", json!([{"volume_id": "v", "mount_path": "/d", "overlay": true}])),
            "invalid_request",
            "volumes[0].overlay ",
        ),
        post(
            with("volumes", json!([{"volume_id": "v", "mount_path": "/etc/d"}])),
            "invalid_request",
            "volumes[0].mount_path ",
        ),
        (
            "POST",
            NEW,
            with("volumes", json!([{"volume_id": "v", "mount_path": "/d"}])),
            404,
            "not_found",
            "no volume \"v\"",
        ),
    ]
}

/// Returns creations with malformed mediated egress.
fn egress_fields() -> Vec<Case> {
    let post = |body: String, code, path| ("POST", NEW, body, 400, code, path);
    vec![
        post(
            with("network", json!({"enabled": false, "egress": {"enabled": true}})),
            "invalid_request",
            "network.egress requires network.enabled=true",
        ),
        post(
            with("network", json!({"egress": {"enabled": true, "allow_hosts": ["*.com"]}})),
            "invalid_request",
            "network.egress.allow_hosts[0] ",
        ),
        post(
            with("network", json!({"egress": {"allow_hosts": []}})),
            "invalid_request",
            "network.egress.allow_hosts requires",
        ),
        post(
            with("network", json!({"egress": {"enforcement": {"mode": "none"}}})),
            "invalid_request",
            "network.egress.enforcement.mode ",
        ),
        post(with("credentials", json!({"K": {"inject": []}})), "invalid_request", "credentials[K].source "),
    ]
}

/// Returns requests for volumes from archives.
fn archives() -> Vec<Case> {
    let archive = |path, code, words| ("POST", path, String::new(), 400, code, words);
    vec![
        archive("/volumes/from-archive", "invalid_request", "name is required"),
        archive("/volumes/from-archive?name=v", "invalid_request", "size_gb is required"),
        archive("/volumes/from-archive?name=v&size_gb=x", "invalid_request", "size_gb "),
        archive("/volumes/from-archive?name=v&size_gb=0", "invalid_request", "size_gb "),
        archive("/volumes/from-archive?name=V&size_gb=1", "invalid_request", "name "),
        archive("/volumes/from-archive?name=v&size_gb=1&id=x", "invalid_request", "id "),
        archive("/volumes/from-archive?name=v&size_gb=1&more=1", "invalid_request", "\"more\" is not"),
        archive("/volumes/from-archive?name=v&size_gb=1&tags[%24]=1", "invalid_request", "tags"),
        archive("/volumes/from-archive?name=v&size_gb=1", "archive_too_large", "is larger"),
    ]
}

/// Returns all requests other than creations.
fn others() -> Vec<Case> {
    let get = |path, status, code, words| ("GET", path, String::new(), status, code, words);
    let image = |body: Value, code, words| ("POST", "/images", body.to_string(), 400, code, words);
    vec![
        get("/instances?state=running", 400, "invalid_state", "state"),
        get("/instances?tags=x", 400, "invalid_request", "tags"),
        get("/instances?tags[a][b]=x", 400, "invalid_request", "tags"),
        get("/devices?tags[a][]=x", 400, "invalid_request", "tags"),
        get("/instances?state=Running&state=Stopped", 400, "invalid_request", "\"state\" is there twice"),
        get("/builds/x", 404, "not_found", "/builds/x"),
        get("/instances?watch=true&resource_version=x", 400, "invalid_request", "resource_version"),
        get("/instances/nothing-here", 404, "not_found", "there is no "),
        get("/instances/..%2F..%2Fetc", 404, "not_found", "there is no "),
        get("/instances/nothing-here/wait", 400, "invalid_state", "state"),
        get("/instances/nothing-here/wait?state=Unknown", 400, "invalid_state", "state"),
        get("/instances/nothing-here/wait?state=Running&timeout=0s", 400, "invalid_timeout", "timeout"),
        get("/instances/nothing-here/wait?state=Running&timeout=x", 400, "invalid_timeout", "timeout"),
        get("/instances/nothing-here/logs?tail=-1", 400, "invalid_request", "tail"),
        get("/images/UPPER", 400, "invalid_name", "name "),
        get("/images/nothing-here", 404, "not_found", "there is no "),
        get("/nowhere", 404, "Not Found", "/nowhere"),
        ("PUT", "/instances", String::new(), 405, "Method Not Allowed", "method"),
        (
            "DELETE",
            "/instances/x?graceful_shutdown=maybe",
            String::new(),
            400,
            "invalid_request",
            "graceful_shutdown",
        ),
        ("POST", "/instances/x/start", "{\"cmd\": 1}".to_owned(), 400, "invalid_request", "cmd "),
        ("POST", "/instances/x/start", String::new(), 404, "not_found", "there is no "),
        ("POST", "/builds", "{}".to_owned(), 501, "not_supported", "builds"),
        (
            "PUT",
            "/instances/x/snapshot-schedule",
            json!({"interval": "1s", "retention": {"max_count": 1}}).to_string(),
            400,
            "invalid_request",
            "interval ",
        ),
        ("POST", "/volumes", "{\"name\": \"v\"}".to_owned(), 400, "invalid_request", "size_gb is required"),
        ("POST", "/volumes", "{\"name\": \"V\", \"size_gb\": 1}".to_owned(), 400, "invalid_request", "name "),
        get("/volumes/nothing-here", 404, "not_found", "there is no "),
        ("POST", "/instances/x/volumes/v", "{}".to_owned(), 400, "invalid_request", "mount_path is required"),
        get("/instances/x/snapshot-schedule", 404, "not_found", "there is no "),
        image(json!({}), "invalid_request", "name is required"),
        image(json!({"name": "UPPER"}), "invalid_name", "name "),
        image(json!({"name": "a", "platform": "beos/x"}), "invalid_platform", "platform "),
        image(
            json!({"name": "a", "credentials": {"username": "u"}}),
            "invalid_request",
            "credentials.password ",
        ),
        image(json!({"name": "a", "more": 1}), "invalid_request", "more "),
        ("POST", "/images/import", String::new(), 400, "invalid_name", "name"),
        (
            "POST",
            "/volumes",
            json!({"name": "a".repeat(24), "size_gb": 1}).to_string(),
            400,
            "invalid_request",
            "name ",
        ),
        ("POST", "/instances?dry_run=true", "{}".to_owned(), 400, "invalid_request", "dry_run"),
        ("GET", "/images?watch=true", String::new(), 400, "invalid_request", "watch"),
        ("POST", "/images/a/tag", "{\"target\": \"b@sha256:1\"}".to_owned(), 400, "invalid_name", "target "),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn every_malformed_request_is_refused_by_name_and_stores_nothing() {
    let server = Server::start().await;
    let cases: Vec<Case> = creations()
        .into_iter()
        .chain(hypervisors())
        .chain(unsupported_fields())
        .chain(egress_fields())
        .chain(reclaims())
        .chain(policy_fields())
        .chain(archives())
        .chain(others())
        .collect();
    assert!(cases.len() >= 60, "{} cases", cases.len());
    // The network reports that it is ready first; after that nothing may be written.
    let ready = std::time::Instant::now() + std::time::Duration::from_secs(60);
    let mut revision = server.store.revision();
    while std::time::Instant::now() < ready {
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        let now = server.store.revision();
        if now == revision {
            break;
        }
        revision = now;
    }
    for (method, path, body, status, code, words) in cases {
        let name = format!("{method} {path} {}", body.chars().take(120).collect::<String>());
        let sent = (!body.is_empty() || method == "POST").then_some(body);
        let answer = server.send_as(method, path, sent, &server.token).await;
        assert_eq!(answer.status, status, "{name}: {}", answer.body);
        assert_eq!(answer.body["code"], code, "{name}: {}", answer.body);
        let message = answer.body["message"].as_str().unwrap_or_default();
        assert!(message.contains(words), "{name}: {message:?} does not say {words:?}");
        assert_eq!(server.store.revision(), revision, "{name} stored something");
    }
}
