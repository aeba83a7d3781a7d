//! Volumes in real VMs: which instances may mount them, which objects survive which, and that a snapshot has all
//! disks of one moment.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::fixtures::until;
use crate::harness::{Answer, BOOT, Harness, image};
use crate::invariants::settles;
use crate::namespace::in_namespace;
use crate::socket::shell;

/// Program that writes one number to memory, the root's disk and the volume's disk, and makes each step durable.
const COUNTER: &str = "i=0; while true; do i=$((i+1)); echo $i >/count; echo $i >/data/count; sync; \
                       echo count $i.; sleep 0.2; done";

async fn ask(site: &Harness, method: Method, path: &str, body: Value) -> Answer {
    site.request(method, path, Some(body).filter(|body| !body.is_null())).await
}

async fn made(site: &Harness, path: &str, body: Value) -> Value {
    let answer = ask(site, Method::POST, path, body).await;
    assert_eq!(answer.status, StatusCode::CREATED, "{path}: {answer:?}\n{}", site.daemon_log());
    answer.body
}

async fn done(site: &Harness, method: Method, path: &str, body: Value) -> Value {
    let answer = ask(site, method, path, body).await;
    assert!(answer.status.is_success(), "{path}: {answer:?}\n{}", site.daemon_log());
    answer.body
}

async fn refused(site: &Harness, method: Method, path: &str, body: Value, status: StatusCode, code: &str) {
    let answer = ask(site, method, path, body).await;
    assert_eq!((answer.status, &answer.body["code"]), (status, &json!(code)), "{path}: {answer:?}");
}

async fn volume(site: &Harness, name: &str) -> Value {
    made(site, "/volumes", json!({ "name": name, "size_gb": 1 })).await
}

async fn instance(site: &Harness, name: &str, cmd: &str, mount: Value) -> String {
    mounting(site, name, cmd, json!([mount])).await
}

async fn mounting(site: &Harness, name: &str, cmd: &str, mounts: Value) -> String {
    let more = json!({ "size": "128MB", "cmd": ["sh", "-c", cmd], "volumes": mounts });
    let id = site.create(name, &image("busybox"), more).await;
    site.until_state(name, "Running").await;
    id
}

/// Checks that an instance whose disk file disappears reports that, and gets an empty disk.
async fn a_lost_disk_is_reported(site: &Harness) {
    site.shell("rm $DATA/disks/*.ext4");
    let is_reported = |seen: &Value| {
        let conditions = seen["conditions"].as_array().cloned().unwrap_or_default();
        let is = |kind| conditions.iter().any(|one| one["type"] == kind && one["status"] == "True");
        is("Degraded") && is("Ready")
    };
    until("the loss to be told", BOOT, async || {
        let seen = site.request(Method::GET, "/volumes/data", None).await.body;
        is_reported(&seen).then_some(())
    })
    .await;
}

#[test]
fn a_volume_outlives_instances_is_written_to_by_one_and_read_by_many() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        let data = volume(&site, "data").await;
        let id = data["id"].as_str().expect("an id").to_owned();
        assert_eq!((&data["size_gb"], &data["attachments"]), (&json!(1), &json!([])), "{data:#}");
        refused(
            &site,
            Method::POST,
            "/volumes",
            json!({ "name": "data", "size_gb": 1 }),
            StatusCode::CONFLICT,
            "already_exists",
        )
        .await;
        let writing = || json!({ "volume_id": "data", "mount_path": "/data" });
        let write = "test -s /data/first || echo of the root >/data/first; sync; echo written.; sleep 100000";
        let writer = instance(&site, "writer", write, writing()).await;
        site.until_console(&writer, "written.").await;
        assert_eq!(
            shell(&site, "writer", "cat /data/first; grep -c ' /data ext4' /proc/mounts").await,
            "of the root\n1"
        );
        let seen = site.get("writer").await;
        let mount = json!({ "volume_id": id, "mount_path": "/data", "readonly": false, "overlay": false });
        assert_eq!(seen["volumes"], json!([mount]), "{seen:#}");
        let attached = json!([{ "instance_id": writer, "mount_path": "/data", "readonly": false }]);
        assert_eq!(
            done(&site, Method::GET, &format!("/volumes/{id}"), Value::Null).await["attachments"],
            attached
        );
        assert!(site.cli("volume ls").contains(&format!("{writer}:/data")), "{}", site.cli("volume ls"));

        // The volume belongs to its writer alone, and cannot be deleted.
        let second = json!({ "name": "second", "image": image("busybox"), "volumes": [writing()] });
        let conflict = (StatusCode::CONFLICT, "conflict");
        refused(&site, Method::POST, "/instances", second, conflict.0, conflict.1).await;
        refused(&site, Method::DELETE, "/volumes/data", Value::Null, conflict.0, conflict.1).await;
        let unknown = json!({ "volume_id": "nowhere", "mount_path": "/data" });
        let unknown = json!({ "name": "second", "image": image("busybox"), "volumes": [unknown] });
        refused(&site, Method::POST, "/instances", unknown, StatusCode::NOT_FOUND, "not_found").await;
        // The writer's death loses no durable data, and its end leaves the volume clean.
        let pid = site.get("writer").await["vmm_pid"].clone();
        site.shell(&format!("kill -9 {pid}"));
        site.until("writer", "another VMM", |seen| seen["state"] == "Running" && seen["vmm_pid"] != pid)
            .await;
        assert_eq!(shell(&site, "writer", "cat /data/first; echo more >/data/second").await, "of the root");
        site.delete("writer").await;
        is_clean(&site);

        many_read_and_write_over_it(&site).await;
        a_lost_disk_is_reported(&site).await;
        done(&site, Method::DELETE, "/volumes/data", Value::Null).await;
        assert_eq!(site.instance_files(), [""; 0].map(std::path::PathBuf::from));
        settles(&mut site, "volumes").await;
    });
}

/// Checks that every disk of the site is free of errors. Data that is only in a journal is no error.
fn is_clean(site: &Harness) {
    site.shell("for disk in $DATA/disks/*.ext4; do e2fsck -fn $disk >/dev/null 2>&1 || { e2fsck -fn $disk; exit 1; }; done");
}

async fn many_read_and_write_over_it(site: &Harness) {
    let reading = json!({ "volume_id": "data", "mount_path": "/in/here", "readonly": true });
    let mut over = reading.clone();
    (over["overlay"], over["overlay_size"]) = (json!(true), json!("32MB"));
    instance(site, "reader", "sleep 100000", reading.clone()).await;
    instance(site, "over", "sleep 100000", over).await;
    for name in ["reader", "over"] {
        assert_eq!(
            shell(site, name, "cat /in/here/first /in/here/second").await,
            "of the root\nmore",
            "{name}"
        );
    }
    let refused_write = shell(site, "reader", "echo x >/in/here/x || true").await;
    assert!(refused_write.contains("Read-only file system"), "{refused_write}");
    assert_eq!(
        shell(site, "over", "echo own >/in/here/first; rm /in/here/second; ls /in/here").await,
        "first\nlost+found"
    );
    assert_eq!(shell(site, "reader", "cat /in/here/first").await, "of the root");
    // The data written over it belongs to the instance, and survives a stop. An empty volume gets the owner and mode
    // of the directory that it covers.
    shell(site, "over", "mkdir /more; chown 1000:1001 /more; chmod 750 /more").await;
    done(site, Method::POST, "/instances/over/stop", Value::Null).await;
    let writing = json!({ "mount_path": "/more" });
    let in_use = (StatusCode::CONFLICT, "conflict");
    volume(site, "empty").await;
    let attached = done(site, Method::POST, "/instances/over/volumes/empty", writing.clone()).await;
    assert_eq!(attached["volumes"].as_array().map(Vec::len), Some(2), "{attached:#}");
    let again = (StatusCode::BAD_REQUEST, "invalid_request");
    refused(site, Method::POST, "/instances/over/volumes/empty", writing, again.0, again.1).await;
    done(site, Method::POST, "/instances/over/start", Value::Null).await;
    let seen = shell(site, "over", "cat /in/here/first; stat -c '%u %g %a' /more; ls /more").await;
    assert_eq!(seen, "own\n1000 1001 750\nlost+found");
    done(site, Method::POST, "/instances/over/stop", Value::Null).await;
    for name in ["data", "empty"] {
        done(site, Method::DELETE, &format!("/instances/over/volumes/{name}"), Value::Null).await;
    }
    let writing = json!({ "mount_path": "/data" });
    refused(site, Method::POST, "/instances/over/volumes/data", writing, in_use.0, in_use.1).await;
    for name in ["reader", "over"] {
        site.delete(name).await;
    }
    done(site, Method::DELETE, "/volumes/empty", Value::Null).await;
}

/// Returns the counts on the root and on the volume, read together. A file that is being written has no count.
async fn counts(site: &Harness, name: &str) -> (u64, u64) {
    until("two numbers", BOOT, async || {
        let text = shell(site, name, "echo $(cat /count) $(cat /data/count)").await;
        let (root, data) = text.split_once(' ')?;
        Some((root.parse().ok()?, data.parse().ok()?))
    })
    .await
}

async fn count(site: &Harness, name: &str) -> u64 {
    counts(site, name).await.1
}

async fn a_snapshot_of_a_stopped_instance_has_the_disks_alone(site: &Harness, snapshot: &str) {
    done(site, Method::POST, "/instances/box/stop", Value::Null).await;
    let last = done(site, Method::POST, "/instances/box/snapshots", json!({ "kind": "Stopped" })).await;
    let stopped = last["id"].as_str().expect("an id");
    let body = json!({ "name": "cold", "target_state": "Running" });
    let cold = made(site, &format!("/snapshots/{stopped}/fork"), body).await;
    // The program counts from 1 again: before that, one observation may find numbers of two runs.
    site.until_console(cold["id"].as_str().expect("an id"), "count 2.").await;
    is_of_one_moment(site, "cold").await;
    for name in ["cold", "fork", "box"] {
        done(site, Method::DELETE, &format!("/instances/{name}"), Value::Null).await;
    }
    is_clean(site);
    // A snapshot has its own copy of a volume that was written to.
    done(site, Method::DELETE, "/volumes/data", Value::Null).await;
    // A volume that was only read is still needed.
    refused(site, Method::DELETE, "/volumes/set", Value::Null, StatusCode::CONFLICT, "conflict").await;
    let gone = (StatusCode::CREATED, json!({ "name": "last" }));
    let last = ask(site, Method::POST, &format!("/snapshots/{snapshot}/fork"), gone.1).await;
    assert_eq!(last.status, gone.0, "{last:?}");
    is_of_one_moment(site, "last").await;
    for path in
        ["/instances/last".to_owned(), format!("/snapshots/{snapshot}"), format!("/snapshots/{stopped}")]
    {
        done(site, Method::DELETE, &path, Value::Null).await;
    }
    done(site, Method::DELETE, "/volumes/set", Value::Null).await;
}

#[test]
fn a_snapshot_has_all_disks_of_one_moment_and_a_fork_writes_to_its_own() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        let data = volume(&site, "data").await["id"].as_str().expect("an id").to_owned();
        volume(&site, "set").await;
        let mount = json!({ "volume_id": data, "mount_path": "/data" });
        let mut over = json!({ "volume_id": "set", "mount_path": "/set", "readonly": true });
        (over["overlay"], over["overlay_size"]) = (json!(true), json!("32MB"));
        let id = mounting(&site, "box", COUNTER, json!([mount, over])).await;
        site.until_console(&id, "count 3.").await;
        shell(&site, "box", "echo first >/set/word; sync").await;
        for verb in ["standby", "restore"] {
            done(&site, Method::POST, &format!("/instances/box/{verb}"), Value::Null).await;
        }
        let kept = done(&site, Method::POST, "/instances/box/snapshots", json!({ "kind": "Standby" })).await;
        let taken_at = count(&site, "box").await;
        until("more counts", BOOT, async || (count(&site, "box").await > taken_at + 5).then_some(())).await;

        // A fork continues from the memory with the disks of that moment, and neither sees the other's writes.
        let snapshot = kept["id"].as_str().expect("an id");
        let fork = made(&site, &format!("/snapshots/{snapshot}/fork"), json!({ "name": "fork" })).await;
        let own = fork["volumes"][0]["volume_id"].as_str().expect("an id").to_owned();
        assert_ne!(own, data, "{fork:#}");
        assert_eq!(shell(&site, "fork", "echo fork >/data/who; sync; ls /data | wc -l").await, "3");
        assert_eq!(shell(&site, "box", "ls /data | wc -l").await, "2");
        // The volume that both read is the same; the data that each writes over it is its own.
        assert_eq!(fork["volumes"][1]["volume_id"], site.get("box").await["volumes"][1]["volume_id"]);
        assert_eq!(
            shell(&site, "fork", "cat /set/word; echo fork >/set/word; cat /set/word").await,
            "first\nfork"
        );
        assert_eq!(shell(&site, "box", "cat /set/word; echo second >/set/word; sync").await, "first");
        is_of_one_moment(&site, "fork").await;
        let beside = json!({ "name": "beside", "from_running": true });
        let beside = made(&site, "/instances/box/fork", beside).await;
        assert_ne!(beside["volumes"][0]["volume_id"], json!(data));
        is_of_one_moment(&site, "beside").await;
        site.delete("beside").await;
        let volumes = done(&site, Method::GET, "/volumes", Value::Null).await;
        assert_eq!(volumes.as_array().map(Vec::len), Some(3), "with a fork its copies went: {volumes:#}");
        refused(
            &site,
            Method::DELETE,
            &format!("/volumes/{own}"),
            Value::Null,
            StatusCode::CONFLICT,
            "conflict",
        )
        .await;

        // The restore is in place: memory, root and volume are as they were.
        shell(&site, "box", "echo later >/data/later; sync").await;
        let late = count(&site, "box").await;
        done(&site, Method::POST, "/instances/box/stop", Value::Null).await;
        let back = format!("/instances/box/snapshots/{snapshot}/restore");
        let restored = done(&site, Method::POST, &back, Value::Null).await;
        assert_eq!(
            (&restored["state"], &restored["volumes"][0]["volume_id"]),
            (&json!("Running"), &json!(data))
        );
        assert!(count(&site, "box").await < late, "it goes on from then");
        assert_eq!(shell(&site, "box", "ls /data; cat /set/word").await, "count\nlost+found\nfirst");
        is_of_one_moment(&site, "box").await;

        a_snapshot_of_a_stopped_instance_has_the_disks_alone(&site, snapshot).await;
        settles(&mut site, "snapshots of volumes").await;
    });
}

/// Checks that the counts are at most one step apart, or two for the time between the reads, and increase.
async fn is_of_one_moment(site: &Harness, name: &str) {
    let (root, data) = counts(site, name).await;
    assert!(root.abs_diff(data) <= 2, "{name}: {root} on the root, {data} on the volume");
    until("it to count on", BOOT, async || (count(site, name).await > data).then_some(())).await;
}
