//! VMMs killed at every step of a fork, with their daemon and without it. Afterwards the fork has its own identity,
//! the source is in its desired state, and deletions leave nothing.

use std::path::PathBuf;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::crash::EDGES;
use crate::fixtures::until;
use crate::harness::{BOOT, Harness, image};
use crate::invariants::settles;
use crate::namespace::in_namespace;
use crate::socket::shell;

const COUNTER: &str = "i=0; while true; do i=$((i+1)); echo $i >>/counts; sleep 0.5 || sleep 1; done";

/// Steps of every fork with a memory, from its disk on.
const ON: [(&str, &str); 6] = [
    ("disk", "Copy"),
    ("instance", "Adopt"),
    ("instance", "Restore"),
    ("instance", "DiscardMemory"),
    ("instance", "Resume"),
    ("instance", "TakeIdentity"),
];
/// First step of a fork of an instance, whose snapshot has no other user.
const FIRST: [(&str, &str); 1] = [("snapshot", "Capture")];
const LAST: [(&str, &str); 2] = [("snapshot", "Expire"), ("snapshot", "Remove")];

/// The processes that die at a step.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Dead {
    DaemonAndVmms,
    Vmms,
}

/// Creates a site whose only instance counts.
async fn counting() -> Harness {
    let site = Harness::running().await;
    begin_to_count(&site).await;
    site
}

async fn begin_to_count(site: &Harness) {
    site.create("box", &image("busybox"), json!({ "size": "128MB", "cmd": ["sh", "-c", COUNTER] })).await;
    site.until_state("box", "Running").await;
    until("a count", BOOT, async || {
        (!shell(site, "box", "cat /counts || true").await.is_empty()).then_some(())
    })
    .await;
}

pub(crate) fn all_vmms_die(site: &Harness) {
    site.vmms().iter().for_each(|pid| drop(site.shell(&format!("kill -9 {pid} || true"))));
}

/// Sends a request whose step is reached once, and kills the chosen processes at it.
async fn die_at(site: &mut Harness, step: (&str, &str), dead: Dead, path: &str, body: Value) {
    let failpoint = format!("{}/{}/before", step.0, step.1);
    site.stop().await;
    match dead {
        Dead::DaemonAndVmms => {
            site.spawn(Some(&failpoint));
            site.answers().await;
            site.attempt(Method::POST, path, Some(body)).await;
            site.crashed(&failpoint).await;
            all_vmms_die(site);
            site.start().await;
        }
        Dead::Vmms => {
            site.spawn_held(&failpoint);
            site.answers().await;
            let asked = site.attempt(Method::POST, path, Some(body));
            let died = async {
                site.held(&failpoint).await;
                all_vmms_die(site);
                site.let_go();
            };
            // The request may end in any way, because its content is recorded.
            tokio::join!(asked, died);
        }
    }
}

/// Checks that the fork has its own identity, and that its deletion leaves nothing.
async fn is_an_owner_and_goes(site: &Harness, what: &str) {
    let fork = site.until_state("fork", "Running").await;
    let who = shell(site, "fork", "hostname; cat /etc/machine-id; sed -n '$p' /counts").await;
    let lines: Vec<&str> = who.lines().collect();
    assert_eq!(lines[0], "fork", "{what}: {fork:#}");
    assert!(lines[2].parse::<u64>().is_ok_and(|count| count > 0), "{what}: its disk is the source's: {who}");
    let id = fork["id"].as_str().expect("an id");
    let forced = site.request(Method::DELETE, "/instances/fork?graceful_shutdown=false", None).await;
    assert_eq!(forced.status, StatusCode::NO_CONTENT, "{what}: {forced:?}");
    let left: Vec<PathBuf> =
        site.instance_files().into_iter().filter(|path| path.to_string_lossy().contains(id)).collect();
    assert_eq!(left, Vec::<PathBuf>::new(), "{what}");
}

/// Counts the directories of snapshots.
fn snapshots(site: &Harness) -> usize {
    std::fs::read_dir(site.data().join("snapshots")).into_iter().flatten().count()
}

/// Checks that only the source is left, intact and in its desired state.
async fn source_is(site: &mut Harness, state: &str, snapshots_left: usize, what: &str) {
    let source = site.until_state("box", state).await;
    assert_eq!(source["has_snapshot"], state == "Standby", "{what}: {source:#}");
    until("the snapshots of forks to be gone", BOOT, async || {
        (snapshots(site) == snapshots_left).then_some(())
    })
    .await;
    settles(site, what).await;
    assert_eq!(site.vmms().len(), usize::from(state == "Running"), "{what}");
    site.start().await;
}

async fn dies_at_every_step(
    site: &mut Harness,
    steps: &[(&str, &str)],
    path: &str,
    body: Value,
    source: &str,
) {
    let snapshots = snapshots(site);
    for step in steps {
        for dead in [Dead::DaemonAndVmms, Dead::Vmms] {
            let what = format!("{step:?} {dead:?}");
            die_at(site, *step, dead, path, body.clone()).await;
            is_an_owner_and_goes(site, &what).await;
            site.until_state("box", source).await;
        }
        source_is(site, source, snapshots, &format!("{step:?}")).await;
    }
}

#[test]
fn a_fork_of_what_runs_outlives_the_death_of_all_vmms_at_any_step() {
    in_namespace(async || {
        let mut site = counting().await;
        let steps = [&FIRST[..], &ON, &LAST].concat();
        let body = json!({ "name": "fork", "from_running": true });
        for step in steps {
            dies_at_every_step(&mut site, &[step], "/instances/box/fork", body.clone(), "Running").await;
            // An instance whose VMM dies repeatedly is restarted with increasing delays.
            site.delete("box").await;
            begin_to_count(&site).await;
        }
    });
}

#[test]
fn a_fork_of_a_standby_outlives_the_death_of_all_vmms_at_any_step() {
    in_namespace(async || {
        let mut site = counting().await;
        let answer = site.request(Method::POST, "/instances/box/standby", None).await;
        assert_eq!((answer.status, &answer.body["state"]), (StatusCode::OK, &json!("Standby")), "{answer:?}");
        let steps = [&FIRST[..], &ON, &LAST].concat();
        let body = json!({ "name": "fork", "target_state": "Running" });
        dies_at_every_step(&mut site, &steps, "/instances/box/fork", body, "Standby").await;
        // The files that the forks shared with it are all still there.
        let kept = site.request(Method::POST, "/instances/box/restore", None).await;
        assert_eq!((kept.status, &kept.body["state"]), (StatusCode::OK, &json!("Running")), "{kept:?}");
        settles(&mut site, "the source's own restore").await;
    });
}

#[test]
fn a_fork_of_a_snapshot_outlives_the_death_of_all_vmms_at_any_step() {
    in_namespace(async || {
        let mut site = counting().await;
        let taken = json!({ "kind": "Standby" });
        let taken = site.request(Method::POST, "/instances/box/snapshots", Some(taken)).await;
        assert_eq!(taken.status, StatusCode::CREATED, "{taken:?}");
        let path = format!("/snapshots/{}/fork", taken.body["id"].as_str().expect("an id"));
        let stopped = site.request(Method::POST, "/instances/box/stop", None).await;
        assert_eq!((stopped.status, &stopped.body["state"]), (StatusCode::OK, &json!("Stopped")));
        dies_at_every_step(&mut site, &ON, &path, json!({ "name": "fork" }), "Stopped").await;
    });
}

/// Compression level that is slow enough to be interrupted.
const SLOW: &str = "9";

/// Checks that the RAM of a saved memory exists in at least one form, complete under its name.
fn is_plain_or_compressed(site: &Harness, directory: &str, what: &str) {
    let saved = site.data().join(directory).join("saved");
    let forms = ["ram", "ram.packed"].map(|name| saved.join(name).exists());
    assert!(forms.contains(&true), "{what}: neither is in {}", saved.display());
}

async fn is_compressed(site: &Harness, directory: &str) {
    let saved = site.data().join(directory).join("saved");
    until("it to be compressed", BOOT, async || {
        let only_compressed = saved.join("ram.packed").exists() && !saved.join("ram").exists();
        (only_compressed && !saved.join("ram.packing").exists()).then_some(())
    })
    .await;
}

fn compression(level: &str) -> Value {
    json!({ "enabled": true, "algorithm": "zstd", "level": level.parse::<u32>().expect("a number") })
}

/// Times from the start of the compression to the kill, in milliseconds.
const MOMENTS_MILLIS: [u64; 4] = [0, 20, 60, 150];

/// Starts a daemon and kills it while a compression works in the directory, a moment after it began. Returns `true`
/// if it still worked at that time.
async fn killed_at_work(site: &mut Harness, directory: &str, moment: u64, what: &str) -> bool {
    let compression_state = site.data().join(directory).join("saved/ram.packing");
    let compressed = site.data().join(directory).join("saved/ram.packed");
    until("the compression", BOOT, async || {
        (compression_state.exists() || compressed.exists()).then_some(())
    })
    .await;
    tokio::time::sleep(std::time::Duration::from_millis(moment)).await;
    site.kill().await;
    all_vmms_die(site);
    is_plain_or_compressed(site, directory, what);
    let was_at_work = compression_state.exists();
    site.start().await;
    was_at_work
}

#[test]
fn a_compression_that_is_killed_at_any_moment_leaves_the_memory_plain_or_compressed() {
    in_namespace(async || {
        let mut site = counting().await;
        let id = site.get("box").await["id"].as_str().expect("an id").to_owned();
        let memory = format!("memory/{id}");
        let started = site.get("box").await["started_at"].clone();
        let mut met_at_work = 0;
        for edge in EDGES {
            let what = format!("instance/Compress/{edge}");
            let body = json!({ "compression": compression("1") });
            site.stop().await;
            site.spawn(Some(&what));
            site.answers().await;
            site.attempt(Method::POST, "/instances/box/standby", Some(body)).await;
            site.crashed(&what).await;
            is_plain_or_compressed(&site, &memory, &what);
            site.start().await;
            is_compressed(&site, &memory).await;
            goes_on(&site, &started, &what).await;
        }
        for moment in MOMENTS_MILLIS {
            let what = format!("{moment} ms of the compression of a standby");
            let body = json!({ "compression": compression(SLOW) });
            site.attempt(Method::POST, "/instances/box/standby", Some(body)).await;
            met_at_work += usize::from(killed_at_work(&mut site, &memory, moment, &what).await);
            is_compressed(&site, &memory).await;
            goes_on(&site, &started, &what).await;
        }
        assert!(met_at_work > 0, "no compression of a standby was met at work");
        met_at_work = 0;
        for moment in MOMENTS_MILLIS {
            let what = format!("{moment} ms of the compression of a snapshot");
            let body = json!({ "kind": "Standby", "compression": compression(SLOW) });
            site.until_state("box", "Running").await;
            let taken = site.request(Method::POST, "/instances/box/snapshots", Some(body)).await;
            assert_eq!(taken.status, StatusCode::CREATED, "{what}: {taken:?}");
            let snapshot = taken.body["id"].as_str().expect("an id").to_owned();
            let directory = format!("snapshots/{snapshot}");
            met_at_work += usize::from(killed_at_work(&mut site, &directory, moment, &what).await);
            serves_a_compressed_fork(&site, &snapshot, &what).await;
        }
        assert!(met_at_work > 0, "no compression of a snapshot was met at work");
        for dead in [Dead::DaemonAndVmms, Dead::Vmms] {
            let what = format!("snapshot/Compress {dead:?}");
            site.until_state("box", "Running").await;
            let body = json!({ "kind": "Standby", "compression": compression("1") });
            die_at(&mut site, ("snapshot", "Compress"), dead, "/instances/box/snapshots", body).await;
            let all = site.request(Method::GET, "/snapshots", None).await.body;
            let snapshot = all[0]["id"].as_str().expect("the only one").to_owned();
            is_plain_or_compressed(&site, &format!("snapshots/{snapshot}"), &what);
            serves_a_compressed_fork(&site, &snapshot, &what).await;
        }
        source_is(&mut site, "Running", 0, "compressions").await;
    });
}

/// Checks that the same run continues from the saved memory.
async fn goes_on(site: &Harness, started: &Value, what: &str) {
    let answer = site.request(Method::POST, "/instances/box/restore", None).await;
    let (state, since) = (&answer.body["state"], &answer.body["started_at"]);
    assert_eq!((answer.status, state, since), (StatusCode::OK, &json!("Running"), started), "{what}");
    let count = async || shell(site, "box", "sed -n '$p' /counts").await.parse::<u64>().ok();
    let before = count().await;
    until("the counter to go on", BOOT, async || (count().await > before).then_some(())).await;
}

async fn serves_a_compressed_fork(site: &Harness, snapshot: &str, what: &str) {
    is_compressed(site, &format!("snapshots/{snapshot}")).await;
    let path = format!("/snapshots/{snapshot}/fork");
    let fork = site.request(Method::POST, &path, Some(json!({ "name": "fork" }))).await;
    assert_eq!(fork.status, StatusCode::CREATED, "{what}: {fork:?}");
    is_an_owner_and_goes(site, what).await;
    let gone = site.request(Method::DELETE, &format!("/snapshots/{snapshot}"), None).await;
    assert_eq!(gone.status, StatusCode::NO_CONTENT, "{what}: {gone:?}");
}
