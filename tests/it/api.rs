//! The API from outside: the life of an instance, lookups, scopes, limits, overload, full disks.

use std::time::Duration;

use serde_json::{Value, json};
use stead_schemas::instance::Instance;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::server::{IMAGE, SOCKETS_MAX, Server, has, token};

fn small(name: &str) -> Value {
    json!({"name": name, "image": IMAGE, "size": "256MB", "tags": {"team": "a"}})
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_lives_as_the_contract_has_it() {
    let server = Server::start().await;
    let created = server.create(small("web")).await;
    assert!(matches!(created["state"].as_str(), Some("Created" | "Initializing")), "{created}");
    assert!(
        created["expires_at"].is_null()
            && created.as_object().is_some_and(|body| body.contains_key("expires_at"))
    );
    assert!(created.as_object().is_some_and(|body| body.contains_key("exit_code")));
    let id = created["id"].as_str().expect("an id").to_owned();
    let again = server.send("POST", "/instances", Some(small("web"))).await;
    assert_eq!((again.status, again.body["code"].as_str()), (409, Some("name_conflict")));
    assert_eq!(again.headers["x-should-retry"], "false");
    let waited = server.send("GET", "/instances/web/wait?state=Running&timeout=30s", None).await;
    assert_eq!(waited.body, json!({"state": "Running", "timed_out": false}));
    for word in [id.as_str(), "web", &id[..9]] {
        assert_eq!(
            server.send("GET", &format!("/instances/{word}"), None).await.body["id"],
            id.as_str(),
            "{word}"
        );
    }
    let running = server.send("GET", "/instances?state=Running&tags[team]=a", None).await;
    assert_eq!(running.body.as_array().map(Vec::len), Some(1));
    let none = server.send("GET", "/instances?tags[team]=b", None).await;
    assert_eq!(none.body, json!([]));
    let conflict = server.send("POST", "/instances/web/start", None).await;
    assert_eq!((conflict.status, conflict.body["code"].as_str()), (409, Some("invalid_state")));
    let stopped = server.send("POST", "/instances/web/stop", None).await;
    assert_eq!((stopped.status, stopped.body["state"].as_str()), (200, Some("Stopped")));
    let conflict = server.send("POST", "/instances/web/stop", None).await;
    assert_eq!(
        (conflict.status, &conflict.headers["x-should-retry"]),
        (409, &"false".parse().expect("valid"))
    );
    let terminal = server.send("GET", "/instances/web/wait?state=Running&timeout=20s", None).await;
    assert_eq!(terminal.body, json!({"state": "Stopped", "timed_out": false}));
    let started = server.send("POST", "/instances/web/start", None).await;
    assert_eq!((started.status, started.body["state"].as_str()), (200, Some("Running")));
    assert_eq!(server.send("DELETE", "/instances/web", None).await.status, 204);
    assert_eq!(server.send("GET", &format!("/instances/{id}"), None).await.status, 404);
    server.create(small("web")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_ends_is_stopped_with_its_code_and_waiting_ends() {
    let server = Server::start().await;
    let body =
        json!({"name": "job", "image": IMAGE, "cmd": ["exit", "3", "0"], "network": {"enabled": false}});
    server.create(body).await;
    let waited = server.send("GET", "/instances/job/wait?state=Stopped&timeout=30s", None).await;
    assert_eq!(waited.body["state"], "Stopped");
    let job = server.send("GET", "/instances/job", None).await.body;
    assert_eq!((&job["exit_code"], &job["exit_message"]), (&json!(3), &json!("exited with code 3")));
    assert_eq!((&job["network"]["ip"], &job["network"]["enabled"]), (&json!(null), &json!(false)));
    let timed_out = server.send("GET", "/instances/job/wait?state=Paused&timeout=50ms", None).await;
    assert_eq!(timed_out.body["timed_out"], false, "stopped for good is terminal");
}

#[tokio::test(flavor = "multi_thread")]
async fn health_is_separate_from_the_state_and_a_check_must_fit_its_instance() {
    let server = Server::start().await;
    let http = json!({"type": "http", "http": {"port": 80}});
    let exec = json!({"type": "exec", "exec": {"command": ["true"]}, "interval": "1s"});
    let mut body =
        json!({"name": "cut", "image": IMAGE, "network": {"enabled": false}, "health_check": http});
    let refused = server.send("POST", "/instances", Some(body.clone())).await;
    assert_eq!((refused.status, refused.body["code"].as_str()), (400, Some("invalid_health_check")));
    body["health_check"] = exec.clone();
    let created = server.create(body).await;
    assert_eq!(created["health_status"]["status"], "starting");
    assert_eq!(created["health_check"]["exec"], exec["exec"]);
    let health = async |wanted: &str| {
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        loop {
            let seen = server.send("GET", "/instances/cut", None).await.body;
            if seen["health_status"]["status"] == wanted {
                return seen;
            }
            assert!(std::time::Instant::now() < deadline, "not {wanted}: {seen:#}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    assert_eq!(health("healthy").await["state"], "Running");
    let refused = server.send("PATCH", "/instances/cut", Some(json!({"health_check": http}))).await;
    assert_eq!((refused.status, refused.body["code"].as_str()), (400, Some("invalid_health_check")));
    assert!(refused.body["message"].as_str().is_some_and(|text| text.contains("network.enabled")));
    server.send("POST", "/instances/cut/stop", None).await;
    health("unknown").await;
    let off = json!({"health_check": {"type": "none"}});
    let patched = server.send("PATCH", "/instances/cut", Some(off)).await;
    assert_eq!((patched.status, &patched.body["health_check"]), (200, &json!(null)));
    assert_eq!(patched.body["health_status"]["status"], "disabled");
}

#[tokio::test(flavor = "multi_thread")]
async fn capabilities_show_what_the_hypervisors_of_the_node_declare() {
    let server = Server::start().await;
    let shown = server.send("GET", "/capabilities", None).await;
    assert_eq!(shown.status, 200);
    let runtime = |name: &str, features: &[&str]| json!({"name": name, "available": true, "features": features, "accelerator": "kvm"});
    let qemu =
        runtime("qemu", &["disk-io-limit", "fork", "hotplug-memory", "live-volumes", "snapshots", "standby"]);
    let microvm = runtime("qemu-microvm", &["disk-io-limit", "fork", "live-volumes", "snapshots", "standby"]);
    assert_eq!(shown.body["runtimes"], json!([qemu, microvm]));
    assert_eq!(shown.body["default_runtime"], json!({"name": "qemu", "available": true}));
    let host =
        json!({"os": "linux", "arch": "amd64", "cgroups": false, "vhost_net": false, "missing_walls": []});
    assert_eq!(shown.body["host"], host);
    let network = json!({
        "model": "bridge", "guest_to_guest": false, "gateway": "10.9.0.1", "subnet": "10.9.0.0/24",
    });
    assert_eq!(shown.body["network"], network);
    let images = json!({"platforms": ["linux/amd64"], "default_platform": "linux/amd64"});
    assert_eq!(shown.body["images"], images);
    let refused = json!({"name": "a", "image": IMAGE, "hypervisor": "firecracker"});
    let refused = server.send("POST", "/instances", Some(refused)).await;
    assert_eq!((refused.status, refused.body["code"].as_str()), (400, Some("not_supported")));
    assert_eq!(refused.body["message"], "hypervisor firecracker is not supported by this server's host");
}

#[tokio::test(flavor = "multi_thread")]
async fn images_are_found_in_every_spelling_and_fail_in_words() {
    let server = Server::start().await;
    let created = server.send("POST", "/images", Some(json!({"name": IMAGE}))).await;
    assert_eq!((created.status, created.body["status"].as_str()), (202, Some("pending")));
    server.create(small("web")).await;
    server.send("GET", "/instances/web/wait?state=Running&timeout=30s", None).await;
    for path in [format!("/images/{}", IMAGE.replace('/', "%2F")), format!("/images/{IMAGE}")] {
        let image = server.send("GET", &path, None).await;
        assert_eq!((image.status, image.body["status"].as_str()), (200, Some("ready")), "{path}");
    }
    let target = json!({"target": "registry.test/alias:v2"});
    let tagged = server.send("POST", &format!("/images/{IMAGE}/tag"), Some(target)).await;
    assert_eq!((tagged.status, tagged.body["name"].as_str()), (201, Some("registry.test/alias:v2")));
    server.send("POST", "/images", Some(json!({"name": "registry.test/missing"}))).await;
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    loop {
        let image = server.send("GET", "/images/registry.test%2Fmissing", None).await;
        if image.body["status"] == "failed" {
            assert!(image.body["error"].as_str().is_some_and(|error| !error.is_empty()));
            break;
        }
        assert!(std::time::Instant::now() < deadline, "{}", image.body);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let refused = json!({"name": "bad", "image": "registry.test/missing"});
    let refused = server.send("POST", "/instances", Some(refused)).await;
    assert_eq!((refused.status, refused.body["code"].as_str()), (400, Some("image_not_ready")));
    assert_eq!(server.send("DELETE", "/images/registry.test%2Falias:v2", None).await.status, 204);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_reports_every_change_since_a_version() {
    let server = Server::start().await;
    let from = server.store.revision();
    let created = server.create(small("seen")).await;
    let url = format!("{}/instances?watch=true&resource_version={from}", server.base);
    let mut stream = server.http.get(url).bearer_auth(&server.token).send().await.expect("an answer");
    let mut text = String::new();
    while !text.contains("\"Running\"") {
        let chunk = tokio::time::timeout(Duration::from_secs(60), stream.chunk()).await.expect("in time");
        text.push_str(&String::from_utf8_lossy(&chunk.expect("readable").expect("open")));
    }
    let first: Value = serde_json::from_str(text.lines().next().expect("a line")).expect("JSON");
    assert_eq!((&first["type"], &first["object"]["id"]), (&json!("added"), &created["id"]));
    let refused = server.send("GET", "/instances?watch=true&state=Running", None).await;
    assert_eq!((refused.status, refused.body["code"].as_str()), (400, Some("invalid_request")));
    let url = "/instances?watch=true&resource_version=99999999";
    assert_eq!(server.send("GET", url, None).await.body["type"], "too_old");
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_are_checked_in_front_of_every_route() {
    let server = Server::start().await;
    assert_eq!(server.send_as("GET", "/health", None, "").await.status, 200);
    let spec = server.send_as("GET", "/spec.json", None, "").await;
    assert_eq!(spec.status, 200);
    // Described routes are served: they require a token, or none.
    let paths = spec.body["paths"].as_object().expect("an object");
    assert!(paths.contains_key("/instances/{id}/exec") && paths.contains_key("/instances/{id}/stats"));
    for (path, methods) in paths {
        for method in methods.as_object().expect("an object").keys() {
            let location = path.replace(['{', '}'], "");
            let answer = server.send_as(&method.to_uppercase(), &location, None, "").await;
            assert!(matches!(answer.status, 200 | 401), "{method} {path}: {}", answer.status);
        }
    }
    let none = server.send_as("GET", "/instances", None, "").await;
    assert_eq!((none.status, none.body["code"].as_str()), (401, Some("Unauthorized")));
    for bad in [
        "garbage",
        &token(&server.keys, &["*"], -60),
        &token(&stead::api::auth::Keys::new(&[8; 32]), &["*"], 60),
    ] {
        assert_eq!(server.send_as("GET", "/instances", None, bad).await.status, 401, "{bad}");
    }
    let reader = token(&server.keys, &["instance:read"], 60);
    assert_eq!(server.send_as("GET", "/instances", None, &reader).await.status, 200);
    let refused = server.send_as("POST", "/instances", Some(small("x").to_string()), &reader).await;
    assert_eq!((refused.status, refused.body["code"].as_str()), (403, Some("Forbidden")));
    assert_eq!(refused.body["message"], "missing required scope: instance:write");
    for path in ["/images", "/volumes", "/resources", "/capabilities"] {
        assert_eq!(server.send_as("GET", path, None, &reader).await.status, 403, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_heads_and_slow_clients_are_bounded() {
    let server = Server::start().await;
    let large = json!({"name": "a", "image": "b", "env": {"K": "x".repeat(1 << 20)}});
    let refused = server.send("POST", "/instances", Some(large)).await;
    assert_eq!((refused.status, refused.body["code"].as_str()), (413, Some("request_too_large")));
    let mut slow = tokio::net::TcpStream::connect(server.address).await.expect("connected");
    slow.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n").await.expect("written");
    let mut rest = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(60), slow.read_to_end(&mut rest)).await;
    ended.expect("a head that never ends is cut").expect("closed");
    let mut fat = tokio::net::TcpStream::connect(server.address).await.expect("connected");
    let head = format!("GET /health HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "y".repeat(400 << 10));
    let _ = fat.write_all(head.as_bytes()).await;
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(60), fat.read_to_end(&mut answer)).await;
    let text = String::from_utf8_lossy(&answer);
    assert!(text.is_empty() || text.starts_with("HTTP/1.1 431"), "{text}");
}

/// Opens an exec session and sends nothing. Returns the status of a refusal.
async fn exec(server: &Server) -> Result<impl Sized + use<>, u16> {
    use tokio_tungstenite::tungstenite::client::IntoClientRequest;
    let url = format!("{}/instances/web/exec", server.base.replacen("http", "ws", 1));
    let mut request = url.into_client_request().expect("a request");
    let token = format!("Bearer {}", server.token).parse().expect("a header");
    request.headers_mut().insert("authorization", token);
    match tokio_tungstenite::connect_async(request).await {
        Ok((socket, _)) => Ok(socket),
        Err(tokio_tungstenite::tungstenite::Error::Http(response)) => {
            assert!(response.status() != 503 || response.headers().contains_key("retry-after"));
            Err(response.status().as_u16())
        }
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_are_bounded_and_their_permits_are_returned() {
    let server = Server::start().await;
    server.create(small("web")).await;
    assert_eq!(exec(&server).await.err(), Some(409), "it does not run yet");
    let running = server.send("GET", "/instances/web/wait?state=Running", None).await;
    assert_eq!(running.body["state"], "Running");
    let mut sessions = Vec::new();
    // Half of the sockets are reserved for other subjects.
    for _ in 0..SOCKETS_MAX / 2 {
        sessions.push(exec(&server).await.unwrap_or_else(|status| panic!("{status}")));
    }
    assert_eq!(exec(&server).await.err(), Some(503));
    sessions.pop();
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while exec(&server).await.is_err() {
        assert!(std::time::Instant::now() < deadline, "the place did not come back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_there_is_not_is_named() {
    let server = Server::start().await;
    server.create(small("web")).await;
    let volume = json!({"name": "data", "size_gb": 1});
    assert_eq!(server.send("POST", "/volumes", Some(volume)).await.status, 201);
    assert_eq!(server.send("GET", "/instances/web/wait?state=Running", None).await.body["state"], "Running");
    assert_eq!(server.send("POST", "/instances/web/stop", None).await.status, 200);
    for (method, path, words) in [
        ("GET", "/instances/web/snapshot-schedule", "the instance has no snapshot schedule"),
        ("DELETE", "/instances/web/snapshot-schedule", "the instance has no snapshot schedule"),
        ("DELETE", "/instances/web/volumes/data", "is not mounted in instance web"),
        ("DELETE", "/instances/web/volumes/nothing", "there is no volume \"nothing\""),
        ("GET", "/builds/x", "there is no /builds/x"),
    ] {
        let answer = server.send(method, path, None).await;
        assert_eq!(
            (answer.status, answer.body["code"].as_str()),
            (404, Some("not_found")),
            "{method} {path}"
        );
        let message = answer.body["message"].as_str().unwrap_or_default();
        assert!(message.contains(words), "{method} {path}: {message}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_always_pulls_runs_what_the_registry_has_now() {
    let server = Server::start().await;
    let runs = async |name: &str, more: Value| {
        let mut body = small(name);
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        let id = server.create(body).await["id"].as_str().expect("an id").parse().expect("an id");
        let path = format!("/instances/{name}/wait?state=Running");
        assert_eq!(server.send("GET", &path, None).await.body["state"], "Running");
        let object = server.store.get::<Instance>(&id).expect("stored");
        object.status.image_digest.clone().expect("it runs some content").to_string()
    };
    let old = runs("old", json!({})).await;
    has(&server.world, 'b');
    assert_eq!(runs("same", json!({"pull": "missing"})).await, old, "what is here is not asked for");
    let new = runs("new", json!({"pull": "always"})).await;
    assert_eq!(new, format!("sha256:{}", "b".repeat(64)));
    assert_eq!(runs("next", json!({})).await, new, "the name means that now");
    let refused =
        server.send("POST", "/instances", Some(json!({"name": "x", "image": IMAGE, "pull": "never"})));
    assert_eq!(refused.await.status, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_writes_keeps_reads_and_passes() {
    let server = Server::start().await;
    server.create(small("before")).await;
    server.kv.set_full(true);
    let refused = server.send("POST", "/instances", Some(small("during"))).await;
    assert_eq!((refused.status, refused.body["code"].as_str()), (507, Some("insufficient_storage")));
    assert!(refused.headers.contains_key("retry-after"));
    assert_eq!(server.send("GET", "/instances/before", None).await.status, 200);
    assert_eq!(server.send("GET", "/instances/during", None).await.status, 404);
    server.kv.set_full(false);
    server.create(small("during")).await;
}
