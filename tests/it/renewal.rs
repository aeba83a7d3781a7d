//! Changes of an instance's name, image and network from outside, and the empty forms of what cannot be had yet.

use std::time::Duration;

use serde_json::{Value, json};
use stead_controllers::sim::SimRegistryImage;
use stead_schemas::disk::Disk;
use stead_schemas::image::{Image, ImageConfig};
use stead_schemas::instance::Instance;
use stead_schemas::names::Uid;
use stead_schemas::network::Nic;

use crate::changes::{patch, reaches, read, running, runs, until};
use crate::server::{IMAGE, Server};

const OTHER: &str = "registry.test/other:v1";

/// Makes the registry serve another image.
fn serve_other(server: &Server) {
    let digest = format!("sha256:{}", "b".repeat(64)).parse().expect("valid");
    let config = ImageConfig { cmd: vec!["serve".to_owned()], ..ImageConfig::default() };
    server.world.serve(&OTHER.parse().expect("valid"), SimRegistryImage { digest, config });
}

/// Returns the numbers of images, disks and ports in the store.
fn counts(server: &Server) -> (usize, usize, usize) {
    let store = &server.store;
    (store.list::<Image>().len(), store.list::<Disk>().len(), store.list::<Nic>().len())
}

fn root_disk(server: &Server, id: &Value) -> Uid {
    let uid: Uid = id.as_str().expect("an id").parse().expect("valid");
    server.store.get::<Instance>(&uid).expect("it is there").spec.allocated.disk.clone()
}

async fn counted(server: &Server, expected: (usize, usize, usize)) {
    for _ in 0..500 {
        if counts(server) == expected {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(counts(server), expected, "images, disks and ports");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_goes_by_its_new_name_everywhere_at_once() {
    let server = running().await;
    server.create(json!({"name": "db", "image": IMAGE})).await;
    let id = read(&server).await["id"].clone();
    let fork = json!({"name": "fork", "from_running": true});
    let fork = server.send("POST", "/instances/web/fork", Some(fork));
    let wait = server.send("GET", "/instances/web/wait?state=Stopped&timeout=60s", None);
    let rename = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let taken = patch(&server, json!({"name": "db"})).await;
        assert_eq!((taken.status, &taken.body["code"]), (409, &json!("name_conflict")), "{}", taken.body);
        let renamed = patch(&server, json!({"name": "shop"})).await;
        assert_eq!((renamed.status, &renamed.body["name"]), (200, &json!("shop")), "{}", renamed.body);
        assert_eq!(renamed.body["changes"], json!({"name": "now"}));
        let same = server.send("PATCH", "/instances/shop", Some(json!({"name": "shop"}))).await;
        assert_eq!(same.body["resource_version"], renamed.body["resource_version"], "{}", same.body);
        assert_eq!(server.send("GET", "/instances/web", None).await.status, 404);
        assert_eq!(server.send("GET", "/instances/shop", None).await.body["id"], id);
    };
    let stop = async {
        let (forked, ()) = tokio::join!(fork, rename);
        assert_eq!((forked.status, &forked.body["state"]), (201, &json!("Running")), "{}", forked.body);
        assert_eq!(server.send("POST", "/instances/shop/stop", None).await.status, 200);
    };
    let (waited, ()) = tokio::join!(wait, stop);
    assert_eq!(waited.body["state"], "Stopped", "a wait by the old name goes on: {}", waited.body);
    let kept = server.send("POST", "/instances/shop/snapshots", Some(json!({"kind": "Stopped"}))).await;
    assert_eq!(kept.body["source_instance_name"], "shop", "{}", kept.body);
    let path = format!("/snapshots/{}", kept.body["id"].as_str().expect("an id"));
    // The old name is free.
    server.create(json!({"name": "web", "image": IMAGE})).await;
    let (code, table, notes) = runs(&server, &["update", "shop", "--name", "store"]).await;
    assert!(code == 0 && table.contains("store") && notes.contains("name: applies now"), "{table}{notes}");
    assert_eq!(server.send("GET", &path, None).await.body["source_instance_name"], "store");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_image_is_pulled_while_the_program_runs_and_has_a_new_root_disk() {
    let server = running().await;
    let before = read(&server).await;
    let disk = root_disk(&server, &before["id"]);
    let body = json!({"image": OTHER, "restart": true});
    let rehearsed = server.send("PATCH", "/instances/web?dry_run=true", Some(body.clone())).await;
    assert_eq!(rehearsed.body["changes"], json!({"image": "with_restart"}), "{}", rehearsed.body);
    assert_eq!(counts(&server), (1, 1, 1));
    let changed = patch(&server, body).await.body;
    assert_eq!(changed["pending_changes"]["image"], OTHER, "{changed}");
    assert_eq!(changed["image"], IMAGE);
    // The registry does not have it yet: the program runs on.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let waits = read(&server).await;
    assert_eq!(
        (&waits["state"], &waits["started_at"]),
        (&json!("Running"), &before["started_at"]),
        "{waits}"
    );
    serve_other(&server);
    assert_eq!(server.send("POST", "/images", Some(json!({"name": OTHER}))).await.status, 202);
    let is_new = |seen: &Value| seen["image"] == OTHER && seen["state"] == "Running";
    let after = until(&server, is_new).await;
    assert!(after["pending_changes"].is_null() && after["started_at"] != before["started_at"], "{after}");
    assert_ne!(root_disk(&server, &before["id"]), disk);
    counted(&server, (2, 1, 1)).await;
    // Back and forth before the next start: nothing waits, and nothing changes.
    assert_eq!(patch(&server, json!({"image": IMAGE})).await.body["pending_changes"]["image"], IMAGE);
    assert!(patch(&server, json!({"image": OTHER})).await.body["pending_changes"].is_null());
    let words = ["update", "web", "--image", IMAGE, "--pull", "always", "--no-network", "--dry-run"];
    let (code, _, notes) = runs(&server, &words).await;
    assert_eq!(code, 0, "{notes}");
    for note in ["image: waits", "pull: waits", "network.enabled: waits"] {
        assert!(notes.contains(note), "{note} is not in {notes}");
    }
    assert_eq!(server.send("POST", "/instances/web/stop", None).await.status, 200);
    let stopped = patch(&server, json!({"image": IMAGE})).await.body;
    assert_eq!(
        (&stopped["image"], &stopped["changes"]["image"]),
        (&json!(IMAGE), &json!("now")),
        "{stopped}"
    );
    assert_eq!(server.send("POST", "/instances/web/start", None).await.status, 200);
    reaches(&server, "Running").await;
    counted(&server, (2, 1, 1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_is_joined_and_left_with_the_next_start() {
    let server = running().await;
    let address = read(&server).await["network"]["ip"].clone();
    let off = || json!({"network": {"enabled": false}});
    let changed = patch(&server, off()).await.body;
    assert_eq!(changed["changes"], json!({"network.enabled": "at_next_start"}), "{changed}");
    assert_eq!(changed["pending_changes"]["network"], json!({"enabled": false}));
    assert_eq!(changed["network"]["ip"], address, "the program that runs keeps it");
    assert!(patch(&server, json!({"network": {"enabled": true}})).await.body["pending_changes"].is_null());
    patch(&server, json!({"network": {"enabled": false}, "restart": true})).await;
    let is_off = |seen: &Value| seen["network"]["enabled"] == false && seen["state"] == "Running";
    until(&server, is_off).await;
    counted(&server, (1, 1, 0)).await;

    let on = || json!({"network": {"enabled": true, "bandwidth_download": "10Mbps"}});
    server.send("PATCH", "/instances/web?dry_run=true", Some(on())).await;
    assert_eq!(counts(&server), (1, 1, 0), "a rehearsal stores nothing");
    let waits = patch(&server, on()).await.body;
    assert_eq!(waits["changes"], json!({"network": "now", "network.enabled": "at_next_start"}), "{waits}");
    counted(&server, (1, 1, 1)).await;
    patch(&server, off()).await;
    counted(&server, (1, 1, 0)).await;
    patch(&server, on()).await;
    assert_eq!(server.send("POST", "/instances/web/stop", None).await.status, 200);
    assert_eq!(server.send("POST", "/instances/web/start", None).await.status, 200);
    let seen = until(&server, |seen| seen["state"] == "Running").await;
    assert!(seen["network"]["ip"].is_string() && seen["network"]["bandwidth_download"].is_string(), "{seen}");
    counted(&server, (1, 1, 1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_creation_refuses_is_refused_with_the_same_code_and_path() {
    let server = running().await;
    for (field, value, path) in [
        ("name", json!("-x"), "name"),
        ("image", json!("UP:::"), "image"),
        ("platform", json!("linux/arm64"), "platform"),
        ("pull", json!("never"), "pull"),
        ("devices", json!(["a"]), "devices"),
        ("gpu", json!({"profile": "a"}), "gpu.profile"),
        ("network", json!({"enabled": false, "bandwidth_upload": "1Mbps"}), "network.bandwidth_upload"),
    ] {
        let mut body = json!({"name": "new", "image": IMAGE});
        body[field] = value.clone();
        let created = server.send("POST", "/instances", Some(body)).await;
        let changed = patch(&server, json!({ field: value })).await;
        assert!(changed.status >= 400, "{field}: {}", changed.body);
        assert_eq!((created.status, created.body), (changed.status, changed.body.clone()), "{field}");
        assert!(
            changed.body["message"].as_str().is_some_and(|text| text.starts_with(path)),
            "{}",
            changed.body
        );
    }
    // These are decided when an instance is created.
    let credential =
        json!({"K": {"source": {"env": "K"}, "inject": [{"as": {"header": "x", "format": "${value}"}}]}});
    for (field, value, path) in [
        ("credentials", credential, "credentials"),
        ("network", json!({"egress": {"enabled": true}}), "network.egress.enabled"),
    ] {
        let changed = patch(&server, json!({ field: value })).await;
        assert_eq!(
            (changed.status, &changed.body["code"]),
            (400, &json!("not_supported")),
            "{}",
            changed.body
        );
        assert!(
            changed.body["message"].as_str().is_some_and(|text| text.starts_with(path)),
            "{}",
            changed.body
        );
    }
    let empty = json!({
        "devices": [], "gpu": {"profile": ""}, "credentials": {}, "network": {"egress": {"enabled": false}},
    });
    let before = read(&server).await;
    let changed = patch(&server, empty).await;
    assert_eq!(
        (changed.status, &changed.body["generation"]),
        (200, &before["generation"]),
        "{}",
        changed.body
    );
}
