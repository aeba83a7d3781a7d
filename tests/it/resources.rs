//! The resources of the host over the API and the command line: what is reported, and that no more is promised than
//! there is, however many ask at once.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use stead_schemas::node::Resources;
use stead_schemas::quantity::Bytes;
use tokio::task::JoinSet;

use crate::cli::{MOMENT, ended, stead};
use crate::server::{IMAGE, Server};

/// Memory of a VM of a test with its VMM, in bytes.
const VM_BYTES: u64 = (256 + 128) << 20;
/// Number of clients that ask at the same time.
const CLIENTS: usize = 200;

fn small(name: &str) -> Value {
    json!({"name": name, "image": IMAGE, "size": "256MB", "vcpus": 1, "overlay_size": "256MB"})
}

/// Returns the sum of a field over a list of objects.
fn sum(list: &Value, field: &str) -> u64 {
    list.as_array().expect("a list").iter().map(|one| one[field].as_u64().expect("a number")).sum()
}

/// Returns the resources once the image is pulled and its space was measured.
async fn with_images(server: &Server) -> Value {
    let measured = async {
        loop {
            let seen = server.send("GET", "/resources", None).await;
            assert_eq!(seen.status, 200, "{}", seen.body);
            if seen.body["disk_breakdown"]["images_bytes"].as_u64().is_some_and(|bytes| bytes > 0) {
                return seen.body;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(MOMENT, measured).await.expect("the space of the image is measured")
}

#[tokio::test(flavor = "multi_thread")]
async fn every_field_is_there_and_the_sums_are_those_of_the_list() {
    let capacity = Resources { cpus: 4, memory: Bytes(8 << 30), disk: Bytes(100 << 30) };
    let server = Server::start_sized(capacity, |_, _| {}).await;
    for name in ["one", "two", "off"] {
        server.create(small(name)).await;
    }
    assert_eq!(server.send("POST", "/instances/off/stop", None).await.status, 200);
    let volume = server.send("POST", "/volumes", Some(json!({"name": "data", "size_gb": 2}))).await;
    assert_eq!(volume.status, 201, "{}", volume.body);
    let seen = with_images(&server).await;
    let Value::Object(mut fields) = seen else { panic!("{seen}") };
    let allocations = fields.remove("allocations").expect("a list");
    let names: Vec<_> =
        allocations.as_array().expect("a list").iter().map(|one| one["instance_name"].clone()).collect();
    assert_eq!(names.len(), 2, "what is stopped holds no processors and memory: {names:?}");
    let breakdown = fields.remove("disk_breakdown").expect("an object");
    assert_eq!(breakdown["overlays_bytes"], 3 * (256 << 20), "the disk of what is stopped stays");
    assert_eq!(breakdown["volumes_bytes"], 2_u64 << 30);
    assert_eq!(fields.remove("gpu"), Some(Value::Null));
    let disk = ["images_bytes", "oci_cache_bytes", "overlays_bytes", "volumes_bytes"];
    let disk: u64 = disk.iter().map(|part| breakdown[part].as_u64().expect("a number")).sum();
    let expected: BTreeMap<&str, (u64, u64, u64, f64, u64)> = BTreeMap::from([
        ("cpu", (4, 16, sum(&allocations, "cpu"), 4.0, 0)),
        ("memory", (8 << 30, 8 << 30, sum(&allocations, "memory_bytes"), 1.0, 0)),
        ("disk", (100 << 30, 99 << 30, disk, 1.0, 1 << 30)),
        ("network", (0, 0, 0, 2.0, 0)),
        ("disk_io", (0, 0, 0, 2.0, 0)),
    ]);
    for (name, status) in &fields {
        let (capacity, limit, allocated, ratio, reserve) = expected[name.as_str()];
        let mut wanted = json!({
            "type": name, "capacity": capacity, "effective_limit": limit, "allocated": allocated,
            "available": limit.saturating_sub(allocated), "oversub_ratio": ratio, "reserve": reserve,
        });
        if capacity > 0 {
            wanted["source"] = json!("detected");
        }
        assert_eq!(*status, wanted, "{name}");
    }
    assert_eq!(fields.len(), expected.len());
    assert_eq!(sum(&allocations, "memory_bytes"), 2 * VM_BYTES);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_clients_at_once_those_are_admitted_that_fit_and_no_other() {
    // Room for 50 VMs and a bit.
    let memory = Bytes(50 * VM_BYTES + VM_BYTES / 2);
    let capacity = Resources { cpus: 1000, memory, disk: Bytes(1 << 50) };
    let server = Server::start_sized(capacity, |config, limits| {
        config.requests_max = 4 * CLIENTS;
        (limits.connections_max, limits.connections_per_client_max) = (2 * CLIENTS, 2 * CLIENTS);
    })
    .await;
    let mut clients = JoinSet::new();
    for number in 0..CLIENTS {
        let request = server.http.post(format!("{}/instances", server.base)).bearer_auth(&server.token);
        let request = request.json(&small(&format!("i{number}")));
        clients.spawn(async move {
            let answer = request.send().await.expect("an answer");
            let (status, retry) = (answer.status().as_u16(), answer.headers().get("x-should-retry").cloned());
            (status, retry, answer.json::<Value>().await.expect("a body"))
        });
    }
    let answers = clients.join_all().await;
    let created = answers.iter().filter(|(status, ..)| *status == 201).count();
    assert_eq!(created, 50, "{:?}", answers.iter().find(|(status, ..)| !matches!(status, 201 | 409)));
    for (_, retry, body) in answers.iter().filter(|(status, ..)| *status != 201) {
        assert_eq!(body["code"], "insufficient_resources", "{body}");
        assert_eq!(retry.as_ref().map(|value| value.as_bytes()), Some(&b"false"[..]));
        let expected =
            "memory is not enough on this host: 384.0 MB are asked for, and 192.0 MB of 18.9 GB are left";
        assert_eq!(body["message"], expected, "the last place was taken before any refusal");
        assert_eq!(body["details"][0]["code"], "insufficient_resources");
    }
    let seen = server.send("GET", "/resources", None).await.body;
    assert_eq!(seen["memory"]["allocated"], 50 * VM_BYTES);
    assert_eq!(seen["memory"]["available"], VM_BYTES / 2);
    assert_eq!(server.store.usage(), server.store.scanned_usage());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_shows_sizes_that_people_read() {
    let capacity = Resources { cpus: 4, memory: Bytes(8 << 30), disk: Bytes(100 << 30) };
    let server = Server::start_sized(capacity, |_, _| {}).await;
    server.create(small("web")).await;
    let run = async |words: &[&str]| {
        let (code, out, err) =
            ended(stead(&server.base, &server.token, words).spawn().expect("started")).await;
        assert_eq!((code, err.as_str()), (0, ""), "{out}");
        out
    };
    let out = run(&["resources"]).await;
    let words = |start: &str| {
        let line = out.lines().find(|line| line.trim_start().starts_with(start));
        line.unwrap_or_else(|| panic!("{out}")).split_whitespace().map(ToOwned::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(words("cpu"), ["cpu", "4", "-", "4", "16", "1", "15"]);
    assert_eq!(words("memory"), ["memory", "8.0", "GB", "-", "1", "8.0", "GB", "384.0", "MB", "7.6", "GB"]);
    assert_eq!(words("network"), ["network", "-", "-", "2", "none", "0", "B/s", "-"]);
    let out = run(&["resources", "--instances"]).await;
    let line = out.lines().find(|line| line.contains("web")).unwrap_or_else(|| panic!("{out}"));
    let held: Vec<_> = line.split_whitespace().collect();
    assert_eq!(held, ["web", "1", "384.0", "MB", "256.0", "MB", "-", "-", "-"]);
    let json: Value = serde_json::from_str(&run(&["resources", "-o", "json"]).await).expect("JSON");
    assert_eq!(json["allocations"][0]["instance_name"], "web");
}

async fn reclaimed(server: &Server, body: Value) -> Value {
    let answer = server.send("POST", "/resources/memory/reclaim", Some(body)).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.body
}

/// Waits until the guest of an instance runs and uses so many megabytes of its hotplug memory.
async fn uses(server: &Server, name: &str, megabytes: u64) -> Value {
    let arrived = async {
        loop {
            let seen = server.send("GET", &format!("/instances/{name}"), None).await.body;
            if seen["hotplugged_bytes"] == megabytes << 20 && seen["state"] == "Running" {
                return seen;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(MOMENT, arrived).await.expect("its memory changes")
}

/// Returns the instances with this status, and the memory that their guests should use.
fn shares(seen: &Value, status: &str) -> Vec<(Value, Value)> {
    let actions = seen["actions"].as_array().expect("a list").iter();
    let of = |one: &Value| (one["instance_name"].clone(), one["planned_target_guest_memory_bytes"].clone());
    actions.filter(|one| one["status"] == status).map(of).collect()
}

/// Starts a server with instances that use all of their hotplug memory, and one that has none.
async fn with_hotplug_memory() -> Server {
    let server = Server::start().await;
    for (name, hotplug) in [("large", "1GB"), ("small", "512MB")] {
        let mut body = small(name);
        body["hotplug_size"] = json!(hotplug);
        body["hypervisor"] = json!("qemu");
        server.create(body).await;
    }
    server.create(small("none")).await;
    uses(&server, "large", 1024).await;
    uses(&server, "small", 512).await;
    server
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_is_taken_back_from_those_that_use_most_until_the_hold_is_over() {
    let server = with_hotplug_memory().await;
    let mut body = json!({"reclaim_bytes": 300 << 20, "hold_for": "1h", "dry_run": true, "reason": "a test"});
    let planned = reclaimed(&server, body.clone()).await;
    // Whole blocks, above the memory that each guest keeps.
    let large = (json!("large"), json!((256 + 1024 - 384) << 20));
    assert_eq!(shares(&planned, "planned"), std::slice::from_ref(&large), "{planned}");
    assert_eq!(
        (&planned["planned_reclaim_bytes"], &planned["applied_reclaim_bytes"]),
        (&json!(384 << 20), &json!(0))
    );
    uses(&server, "large", 1024).await;

    body["dry_run"] = json!(false);
    let done = reclaimed(&server, body).await;
    assert_eq!(
        (shares(&done, "applied"), &done["applied_reclaim_bytes"]),
        (vec![large], &json!(384 << 20)),
        "{done}"
    );
    let seen = uses(&server, "large", 640).await;
    assert_eq!(
        (&seen["hotplugged_size"], &seen["memory_held_until"]),
        (&json!("640.0 MB"), &done["hold_until"])
    );
    // What is held is not given by a change.
    let changed = server.send("PATCH", "/instances/large", Some(json!({"hotplugged_size": "1GB"}))).await;
    assert_eq!(
        (changed.status, &changed.body["hotplugged_size"]),
        (200, &json!("640.0 MB")),
        "{}",
        changed.body
    );
    reclaimed(&server, json!({"reclaim_bytes": 1, "hold_for": "1s"})).await;
    let seen = uses(&server, "large", 1024).await;
    assert_eq!(seen["memory_held_until"], Value::Null, "{seen}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_taken_back_from_a_vm_that_was_restored() {
    let server = with_hotplug_memory().await;
    // The memory of a restored VM belongs to its saved file, too.
    for verb in ["standby", "restore"] {
        let answer = server.send("POST", &format!("/instances/small/{verb}"), None).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
    }
    server.send("GET", "/instances/small/wait?state=Running&timeout=60s", None).await;
    let planned = reclaimed(&server, json!({"reclaim_bytes": 8u64 << 30, "dry_run": true})).await;
    assert_eq!(shares(&planned, "planned"), [(json!("large"), json!(256 << 20))], "{planned}");
    assert_eq!(shares(&planned, "unsupported"), [(json!("small"), json!((256 + 512) << 20))], "{planned}");

    let (code, out, err) = ended(
        stead(&server.base, &server.token, &["resources", "reclaim-memory", "200MB", "--dry-run"])
            .spawn()
            .expect("started"),
    )
    .await;
    let line =
        out.lines().find(|line| line.contains("large")).unwrap_or_else(|| panic!("{code} {out} {err}"));
    let words: Vec<_> = line.split_whitespace().collect();
    assert_eq!(words, ["large", "planned", "1.3", "GB", "1.3", "GB", "1.0", "GB", "256.0", "MB"]);
}
