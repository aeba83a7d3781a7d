//! Volumes that are attached to instances, and detached, while their programs run.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::crash::{EDGES, OF_ATTACHMENT, OF_DETACHMENT, crash_at};
use crate::fixtures::{rounds, until};
use crate::harness::{Answer, Harness, MOMENT, image};
use crate::invariants::settles;
use crate::machine_types::verb;
use crate::namespace::in_namespace;
use crate::socket::shell;

/// Moves of a volume from one VM to another and back, unless `STEAD_TEST_ROUNDS` has another number.
const MOVES: u64 = 3;
/// Prints the disks of volumes that the guest's kernel knows.
const DISKS: &str = "ls /sys/block | grep -c ^sd || true";
const MOUNTED: &str = "grep -c ' /data ext4' /proc/mounts || true";

async fn attach(site: &Harness, name: &str, volume: &str, more: Value) -> Answer {
    let mut body = json!({ "mount_path": "/data" });
    if let (Some(body), Value::Object(more)) = (body.as_object_mut(), more) {
        body.extend(more);
    }
    site.request(Method::POST, &format!("/instances/{name}/volumes/{volume}"), Some(body)).await
}

async fn detach(site: &Harness, name: &str, volume: &str) -> Answer {
    site.request(Method::DELETE, &format!("/instances/{name}/volumes/{volume}"), None).await
}

async fn attached(site: &Harness, name: &str, volume: &str, more: Value) {
    let answer = attach(site, name, volume, more).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}\n{}", site.daemon_log());
    let mounted = shell(site, name, "grep -c ' /data ' /proc/mounts || true").await;
    assert_eq!(mounted, "1", "{answer:?}\n{}", site.daemon_log());
}

async fn detached(site: &Harness, name: &str, volume: &str) {
    let answer = detach(site, name, volume).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}\n{}", site.daemon_log());
    assert_eq!(answer.body["volumes"], json!([]), "{answer:?}");
    assert_eq!(shell(site, name, MOUNTED).await, "0");
    // The guest hears of it, and need not agree.
    let is_gone = async || (shell(site, name, DISKS).await == "0").then_some(());
    until("the disk to be gone", MOMENT, is_gone).await;
}

async fn conflicts(answer: &Answer, why: &str) {
    assert_eq!(
        (answer.status, &answer.body["code"]),
        (StatusCode::CONFLICT, &json!("conflict")),
        "{answer:?}"
    );
    assert!(answer.body["message"].as_str().is_some_and(|message| message.contains(why)), "{answer:?}");
}

async fn volume(site: &Harness, name: &str) {
    let answer = site.request(Method::POST, "/volumes", Some(json!({ "name": name, "size_gb": 1 }))).await;
    assert_eq!(answer.status, StatusCode::CREATED, "{answer:?}");
}

async fn running(site: &Harness, name: &str, hypervisor: &str) {
    let cmd = ["sh", "-c", "while true; do sleep 1; done"];
    // A VMM may write files as large as its largest disk. To raise that needs a capability that not every host gives.
    let body = json!({
        "size": "128MB", "overlay_size": "1GB", "vcpus": 1, "hypervisor": hypervisor, "cmd": cmd,
    });
    site.create(name, &image("busybox"), body).await;
    site.until_state(name, "Running").await;
}

/// Checks that a volume in use is kept, with the name of its user, and that one that cannot be mounted is not.
async fn what_cannot_be_done_leaves_all_as_it_was(site: &Harness) {
    shell(
        site,
        "one",
        "echo kept >/data/file; sync; exec 3</data/file; sleep 100987 >/dev/null 2>&1 & echo $! >/pid",
    )
    .await;
    conflicts(&detach(site, "one", "disk").await, "sleep").await;
    assert_eq!(
        shell(site, "one", "cat /data/file; echo more >/data/more; ls /data").await,
        "kept\nfile\nlost+found\nmore"
    );
    conflicts(&attach(site, "two", "disk", json!({})).await, "one").await;
    shell(site, "one", "kill $(cat /pid)").await;
    // A file is in the way.
    let answer = attach(site, "one", "other", json!({ "mount_path": "/opt/file" })).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    let opt = detach(site, "one", "other").await;
    assert_eq!(opt.status, StatusCode::OK, "{opt:?}");
    shell(site, "one", "rmdir /opt/file; echo x >/opt/file").await;
    conflicts(&attach(site, "one", "other", json!({ "mount_path": "/opt/file" })).await, "/opt/file").await;
    let is_forgotten = |seen: &Value| seen["volumes"].as_array().is_some_and(|volumes| volumes.len() == 1);
    site.until("one", "without the other volume", is_forgotten).await;
    assert_eq!(shell(site, "one", "cat /opt/file").await, "x");
}

/// Checks that a change names all volumes that an instance should have.
async fn the_list_of_a_change_is_carried_out(site: &Harness) {
    let at = |volume: &str, path: &str| json!({ "volume_id": volume, "mount_path": path });
    for (list, expected) in [
        (json!([at("disk", "/data"), at("other", "/more")]), "/data\n/more"),
        (json!([at("other", "/more")]), "/more"),
        (json!([]), ""),
    ] {
        let body = json!({ "volumes": list });
        let changed = site.request(Method::PATCH, "/instances/one", Some(body)).await;
        assert_eq!(
            (changed.status, &changed.body["changes"]["volumes"]),
            (StatusCode::OK, &json!("now")),
            "{changed:?}"
        );
        let is_so = async || {
            let mounted = shell(site, "one", "awk '/^.dev.sd/ { print $2 }' /proc/mounts | sort").await;
            (mounted == expected).then_some(())
        };
        until(expected, MOMENT, is_so).await;
    }
    let is_settled = |seen: &Value| seen["volumes"] == json!([]) && condition(seen).is_none();
    site.until("one", "without volumes", is_settled).await;
}

/// Checks a volume over the ends of its VM, and of a fork with its own copy.
async fn outlives_standby_death_and_fork(site: &Harness) {
    attached(site, "one", "disk", json!({})).await;
    verb(site, "one", "standby").await;
    verb(site, "one", "restore").await;
    site.until_state("one", "Running").await;
    assert_eq!(shell(site, "one", "cat /data/file; echo again >/data/again").await, "kept");
    let fork = json!({ "name": "fork", "from_running": true });
    let fork = site.request(Method::POST, "/instances/one/fork", Some(fork)).await;
    assert_eq!(fork.status, StatusCode::CREATED, "{fork:?}");
    let own = fork.body["volumes"][0]["volume_id"].as_str().expect("a copy").to_owned();
    site.until_state("fork", "Running").await;
    assert_eq!(shell(site, "fork", "echo fork >/data/fork; sync; cat /data/again").await, "again");
    detached(site, "fork", &own).await;
    attached(site, "fork", &own, json!({})).await;
    assert_eq!(shell(site, "fork", "cat /data/fork").await, "fork");
    site.delete("fork").await;
    // It is there again when the VMM dies.
    let pid = site.get("one").await["vmm_pid"].clone();
    shell(site, "one", "sync").await;
    site.shell(&format!("kill -9 {pid}"));
    site.until("one", "another VMM", |seen| seen["state"] == "Running" && seen["vmm_pid"] != pid).await;
    assert_eq!(shell(site, "one", "cat /data/again; ls /data/fork 2>&1 | grep -c No").await, "again\n1");
    detached(site, "one", "disk").await;
}

/// Crashes at each step, before and after.
async fn crashes_on_the_way(site: &mut Harness) {
    for (steps, method, is_there) in
        [(&OF_ATTACHMENT[..], Method::POST, true), (&OF_DETACHMENT[..], Method::DELETE, false)]
    {
        for ((kind, action), edge) in steps.iter().flat_map(|step| EDGES.map(|edge| (*step, edge))) {
            let failpoint = format!("{kind}/{action}/{edge}");
            match is_there {
                true => drop(detach(site, "one", "disk").await),
                false => drop(attach(site, "one", "disk", json!({})).await),
            }
            let body = is_there.then(|| json!({ "mount_path": "/data" }));
            crash_at(site, &failpoint, (method.clone(), "/instances/one/volumes/disk"), body).await;
            let expected = usize::from(is_there);
            let is_so = |seen: &Value| {
                let is_settled = condition(seen).is_none();
                is_settled && seen["volumes"].as_array().is_some_and(|volumes| volumes.len() == expected)
            };
            site.until("one", &failpoint, is_so).await;
            let is_mounted =
                async || (shell(site, "one", MOUNTED).await == expected.to_string()).then_some(());
            until(&failpoint, MOMENT, is_mounted).await;
        }
    }
}

fn condition(seen: &Value) -> Option<&Value> {
    seen["conditions"].as_array()?.iter().find(|condition| condition["type"] == "VolumesMounted")
}

#[test]
fn a_volume_comes_and_goes_while_programs_run_and_its_data_goes_with_it() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        for (name, hypervisor) in [("one", "qemu"), ("two", "qemu-microvm")] {
            running(&site, name, hypervisor).await;
        }
        volume(&site, "disk").await;
        volume(&site, "other").await;
        attached(&site, "one", "disk", json!({})).await;
        what_cannot_be_done_leaves_all_as_it_was(&site).await;
        detached(&site, "one", "disk").await;
        for number in 0..rounds(MOVES) {
            for name in ["two", "one"] {
                attached(&site, name, "disk", json!({})).await;
                let line = format!("cat /data/file; echo {name} >/data/{number}; cat /data/{number}");
                assert_eq!(shell(&site, name, &line).await, format!("kept\n{name}"));
                detached(&site, name, "disk").await;
            }
        }
        // Both read it, one of them writes over it.
        attached(&site, "one", "disk", json!({ "readonly": true })).await;
        let over = json!({ "readonly": true, "overlay": true, "overlay_size": "32MB" });
        attached(&site, "two", "disk", over).await;
        assert_eq!(shell(&site, "two", "echo own >/data/file; cat /data/file").await, "own");
        assert_eq!(shell(&site, "one", "cat /data/file").await, "kept");
        for name in ["one", "two"] {
            detached(&site, name, "disk").await;
        }
        the_list_of_a_change_is_carried_out(&site).await;
        outlives_standby_death_and_fork(&site).await;
        crashes_on_the_way(&mut site).await;
        for name in ["one", "two"] {
            site.delete(name).await;
        }
        for name in ["disk", "other"] {
            let gone = site.request(Method::DELETE, &format!("/volumes/{name}"), None).await;
            assert_eq!(gone.status, StatusCode::NO_CONTENT, "{gone:?}");
        }
        settles(&mut site, "live volumes").await;
    });
}
