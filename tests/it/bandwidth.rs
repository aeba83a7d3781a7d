//! Limits of the traffic from outside: requests, answers, and what the host then has.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stead_controllers::host::{Detour, Limit, Shaping};
use stead_controllers::node;
use stead_controllers::sim::{AMPLE, node_spec};
use stead_schemas::instance::Instance;
use stead_schemas::network::Nic;
use stead_schemas::node::{NodeSpec, Resources};
use stead_schemas::quantity::Rate;
use stead_schemas::resource::Ratio;

use crate::cli::{ended, stead};
use crate::server::{IMAGE, Server};

/// Time limit for changes that are immediate on an idle machine.
const MOMENT: Duration = Duration::from_secs(60);

fn limited(name: &str, network: Value) -> Value {
    json!({"name": name, "image": IMAGE, "size": "256MB", "vcpus": 1, "network": network})
}

/// Returns the limits that an answer shows.
fn shown(instance: &Value) -> [Option<&str>; 2] {
    ["bandwidth_download", "bandwidth_upload"].map(|key| instance["network"][key].as_str())
}

/// Waits until the TAP of an instance has these limits, and its guest sends through a link with the other.
async fn enforces(server: &Server, name: &str, download: Option<u64>, upload: Option<u64>) {
    let limit = |rate: Option<u64>| rate.map_or(Limit::None, |rate| Limit::At(Rate(rate)));
    let deadline = Instant::now() + MOMENT;
    loop {
        let instances = server.store.list::<Instance>();
        let instance = instances.iter().find(|one| one.meta.name.as_str() == name).expect("it exists");
        let nic = instance.spec.allocated.nic.as_ref().and_then(|nic| server.store.get::<Nic>(nic));
        let spec = nic.expect("it has a card").spec.clone();
        let host = server.world.snapshot();
        let found = |link| host.shaping.get(link).cloned().unwrap_or_default();
        let detour = upload.map_or(Detour::None, |_| Detour::Through(spec.ifb()));
        let is_at_tap = found(&spec.tap) == Shaping { limit: limit(download), detour };
        if is_at_tap && found(&spec.ifb()).limit == limit(upload) {
            return;
        }
        assert!(Instant::now() < deadline, "{name}: {:?}", host.shaping);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_of_a_request_are_in_force_and_shown_and_a_patch_changes_them_while_the_program_runs() {
    let server = Server::start().await;
    let network = json!({"bandwidth_download": "100Mbps", "bandwidth_upload": "2MB/s"});
    let created = server.create(limited("web", network)).await;
    assert_eq!(shown(&created), [Some("11.9 MB/s"), Some("2.0 MB/s")]);
    server.send("GET", "/instances/web/wait?state=Running&timeout=30s", None).await;
    enforces(&server, "web", Some(12_500_000), Some(2 << 20)).await;

    let path = "/instances/web";
    let patch = async |network: Value| server.send("PATCH", path, Some(json!({ "network": network }))).await;
    let changed = patch(json!({"bandwidth_upload": "8Mbps"})).await;
    assert_eq!((changed.status, shown(&changed.body)), (200, [Some("11.9 MB/s"), Some("976.6 KB/s")]));
    enforces(&server, "web", Some(12_500_000), Some(1_000_000)).await;
    let changed = patch(json!({"bandwidth_upload": "0", "bandwidth_download": "1MB/s"})).await;
    assert_eq!((changed.status, shown(&changed.body)), (200, [Some("1.0 MB/s"), None]));
    enforces(&server, "web", Some(1 << 20), None).await;
    let read = server.send("GET", path, None).await.body;
    assert_eq!((shown(&read), read["state"].as_str()), ([Some("1.0 MB/s"), None], Some("Running")));

    // A fork has the limits of its source.
    server.send("POST", "/instances/web/stop", None).await;
    let fork = server.send("POST", "/instances/web/fork", Some(json!({"name": "fork"}))).await;
    assert_eq!((fork.status, shown(&fork.body)), (201, [Some("1.0 MB/s"), None]), "{}", fork.body);

    for (network, code, problem) in [
        (json!({"bandwidth_download": "1bps"}), "invalid_bandwidth_download", "less than a byte per second"),
        (json!({"bandwidth_upload": "1kbps"}), "invalid_bandwidth_upload", "from 7.8 KB/s to 46.6 GB/s"),
        (json!({"mtu": 9000}), "invalid_request", "network.mtu is not a field"),
        (json!([]), "invalid_request", "network must be an object"),
    ] {
        let refused = patch(network).await;
        assert_eq!((refused.status, refused.body["code"].as_str()), (400, Some(code)));
        let message = refused.body["message"].as_str().unwrap_or_default().to_owned();
        assert!(message.contains(problem), "{message}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_without_a_network_has_no_limits_to_change() {
    let server = Server::start().await;
    let zero = json!({"enabled": false, "bandwidth_download": "0"});
    let created = server.create(limited("cut", zero)).await;
    assert_eq!(shown(&created), [None, None]);
    let patch = async |network: Value| {
        let answer = server.send("PATCH", "/instances/cut", Some(json!({ "network": network }))).await;
        (answer.status, answer.body["code"].as_str().unwrap_or_default().to_owned())
    };
    let download = patch(json!({"bandwidth_download": "1MB/s"})).await;
    assert_eq!(download, (400, "invalid_bandwidth_download".to_owned()));
    let upload = patch(json!({"bandwidth_upload": "1MB/s", "bandwidth_download": "0"})).await;
    assert_eq!(upload, (400, "invalid_bandwidth_upload".to_owned()));
    assert_eq!(patch(json!({"bandwidth_upload": "0"})).await, (200, String::new()));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_names_no_limits_has_its_part_of_a_network_of_known_speed() {
    let server = Server::start_sized(Resources { cpus: 64, ..AMPLE }, |_, _| {}).await;
    assert_eq!(shown(&server.create(limited("before", json!({}))).await), [None, None]);
    let spec = spec_with_network();
    server.store.transact(move |tx| node::admission::declare(tx, spec)).await.expect("declared");
    let created = server.create(limited("part", json!({}))).await;
    assert_eq!(shown(&created), [Some("4.0 MB/s"), Some("4.0 MB/s")]);
    let created = server.create(limited("free", json!({"bandwidth_download": "0"}))).await;
    assert_eq!(shown(&created), [None, Some("4.0 MB/s")]);
    enforces(&server, "free", None, Some(4 << 20)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_instance_keeps_its_own_limits_and_has_the_default_of_its_restored_processors() {
    let server = Server::start_sized(Resources { cpus: 64, ..AMPLE }, |_, _| {}).await;
    let spec = spec_with_network();
    server.store.transact(move |tx| node::admission::declare(tx, spec)).await.expect("declared");
    let created = server.create(limited("web", json!({"bandwidth_upload": "1MB/s"}))).await;
    assert_eq!(shown(&created), [Some("4.0 MB/s"), Some("1.0 MB/s")]);
    server.send("GET", "/instances/web/wait?state=Running&timeout=30s", None).await;
    server.send("POST", "/instances/web/stop", None).await;
    let taken = server.send("POST", "/instances/web/snapshots", Some(json!({"kind": "Stopped"}))).await;
    let snapshot = taken.body["id"].as_str().expect("an id").to_owned();
    let changed = json!({"network": {"bandwidth_upload": "2MB/s"}});
    assert_eq!(server.send("PATCH", "/instances/web", Some(changed)).await.status, 200);
    let path = format!("/instances/web/snapshots/{snapshot}/restore");
    let restored = server.send("POST", &path, Some(json!({"target_state": "Running"}))).await;
    assert_eq!(restored.status, 200, "{}", restored.body);
    assert_eq!(shown(&restored.body), [Some("4.0 MB/s"), Some("2.0 MB/s")]);
    enforces(&server, "web", Some(4 << 20), Some(2 << 20)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_sets_and_shows_limits() {
    let server = Server::start().await;
    let runs = async |words: &[&str]| {
        let (code, out, err) =
            ended(stead(&server.base, &server.token, words).spawn().expect("started")).await;
        assert_eq!(code, 0, "{out}{err}");
        out
    };
    runs(&["run", IMAGE, "--name", "web", "-m", "256MB", "-d", "--bandwidth-down", "80Mbps"]).await;
    let described = runs(&["describe", "web"]).await;
    assert!(described.contains("Bandwidth    9.5 MB/s down\n"), "{described}");
    runs(&["update", "web", "--bandwidth-up", "4MB/s"]).await;
    let described = runs(&["describe", "web"]).await;
    assert!(described.contains("Bandwidth    9.5 MB/s down, 4.0 MB/s up\n"), "{described}");
}

/// Returns the spec of a host whose network has 64 MB/s, and is promised four times.
fn spec_with_network() -> NodeSpec {
    let mut spec = node_spec();
    (spec.capacity.network, spec.oversubscription.network) = (Some(64 << 20), Ratio::whole(4));
    spec
}
