//! Changes of an instance's image, name and network, on a real VM.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::changes::{is_started_again, patched};
use crate::crash::{EDGES, OF_CHANGES, crash_at_verb};
use crate::fixtures::run;
use crate::harness::{Harness, image};
use crate::invariants::settles;
use crate::machine_types::verb;
use crate::namespace::in_namespace;
use crate::programs::configured;
use crate::socket::shell;

/// Adds images to the site that differ in the program that they name.
fn add_images(site: &Harness) {
    for name in ["first", "second"] {
        let program = format!("--config.cmd=echo I am {name}; while true; do sleep 1; done");
        let config = ["--config.entrypoint=/bin/sh", "--config.entrypoint=-c", &program];
        configured(site, name, "busybox", &config);
    }
}

/// Crashes at the step that replaces the root disk, before and after it.
async fn crashes_while_the_image_changes(site: &mut Harness) {
    let (kind, action) = OF_CHANGES;
    for (edge, name) in EDGES.into_iter().zip(["first", "second"]) {
        shell(site, "box", "echo lost >/on-root").await;
        let failpoint = format!("{kind}/{action}/{edge}");
        patched(site, json!({ "image": image(name) })).await;
        crash_at_verb(site, &failpoint, "/instances/box/stop").await;
        let is_right = |seen: &Value| {
            seen["state"] == "Stopped" && seen["pending_changes"].is_null() && seen["image"] == image(name)
        };
        site.until("box", "the image", is_right).await;
        verb(site, "box", "start").await;
        site.until_state("box", "Running").await;
        assert_eq!(shell(site, "box", "cat /on-root 2>/dev/null; cat /data/kept").await, "kept");
        settles(site, &failpoint).await;
        site.start().await;
    }
}

#[test]
fn a_new_image_begins_with_an_empty_root_and_keeps_the_volumes() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        add_images(&site);
        let volume = json!({ "name": "data", "size_gb": 1 });
        let made = site.request(Method::POST, "/volumes", Some(volume)).await;
        assert_eq!(made.status, StatusCode::CREATED, "{made:?}");
        let mounts = json!([{ "volume_id": "data", "mount_path": "/data" }]);
        let id = site.create("box", &image("first"), json!({ "size": "128MB", "volumes": mounts })).await;
        site.until_state("box", "Running").await;
        site.until_console(&id, "I am first").await;
        shell(&site, "box", "echo root >/on-root; echo kept >/data/kept; sync").await;

        // A memory belongs to the image that it was saved over.
        let waits = patched(&site, json!({ "image": image("second") })).await;
        assert_eq!(waits["changes"], json!({ "image": "at_next_start" }), "{waits:#}");
        verb(&site, "box", "standby").await;
        verb(&site, "box", "restore").await;
        site.until_state("box", "Running").await;
        assert_eq!(shell(&site, "box", "cat /on-root /data/kept").await, "root\nkept");

        let pid = site.get("box").await["vmm_pid"].clone();
        let changed = patched(&site, json!({ "image": image("second"), "restart": true })).await;
        assert_eq!(changed["changes"], json!({ "image": "with_restart" }), "{changed:#}");
        is_started_again(&site, &pid).await;
        site.until_console(&id, "I am second").await;
        assert_eq!(shell(&site, "box", "cat /on-root 2>/dev/null; cat /data/kept").await, "kept");
        assert_eq!(site.get("box").await["image"], image("second"));
        crashes_while_the_image_changes(&mut site).await;
        site.delete("box").await;
        settles(&mut site, "another image").await;
    });
}

#[test]
fn a_name_and_a_network_are_those_of_the_guest_from_its_next_start_on() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        let body = json!({ "size": "128MB", "cmd": ["sleep", "1000000"] });
        site.create("box", &image("busybox"), body).await;
        site.until_state("box", "Running").await;
        let address = site.get("box").await["network"]["ip"].as_str().expect("an address").to_owned();
        let has_card = "ls /sys/class/net | grep -c eth0 || true";
        assert_eq!(shell(&site, "box", has_card).await, "1");

        patched(&site, json!({ "network": { "enabled": false } })).await;
        assert_eq!(shell(&site, "box", has_card).await, "1");
        let pid = site.get("box").await["vmm_pid"].clone();
        patched(&site, json!({ "restart": true })).await;
        is_started_again(&site, &pid).await;
        assert_eq!(shell(&site, "box", has_card).await, "0");
        assert_eq!((site.taps(), &site.get("box").await["network"]["ip"]), (0, &Value::Null));

        let pid = site.get("box").await["vmm_pid"].clone();
        let joins = json!({ "name": "shop", "network": { "enabled": true }, "restart": true });
        patched(&site, joins).await;
        let is_new = |seen: &Value| seen["state"] == "Running" && seen["vmm_pid"] != pid;
        let seen = site.until("shop", "another VM", is_new).await;
        assert_eq!(seen["network"]["ip"], address, "the lowest free address");
        assert_eq!(shell(&site, "shop", "hostname").await, "shop");
        run("/bin/busybox", &["ping", "-c", "1", "-w", "10", &address]);
        assert_eq!(site.request(Method::GET, "/instances/box", None).await.status, StatusCode::NOT_FOUND);
        site.delete("shop").await;
        settles(&mut site, "a name and a network").await;
    });
}
