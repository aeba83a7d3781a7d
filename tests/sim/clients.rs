//! Clients of the API in virtual time: clients that wait for their answers, and clients that hang up.
//!
//! The API is the daemon's own. A client that hangs up drops its request, and the handler with it, as the
//! server does when a connection ends.

use std::pin::pin;
use std::time::Duration;

use serde_json::{Value, json};
use stead_controllers::host::Snapshots;
use stead_controllers::sim::{SimRegistryImage, World};
use stead_controllers::store::MemoryKv;
use stead_schemas::image::{Image, ImageConfig};
use stead_schemas::instance::{Instance, State};
use stead_schemas::limits::{
    FAILED_SNAPSHOTS_PER_SOURCE_MAX, FAILURE_KEPT, SNAPSHOTS_PER_SOURCE_MAX, VERB_WAIT_MAX,
};
use stead_schemas::names::{Name, Uid};
use stead_schemas::quantity::Bytes;
use stead_schemas::snapshot::{Snapshot, SnapshotPhase};
use tokio::task::yield_now;
use tokio::time::{Instant, sleep};

use crate::api::Api;
use crate::daemon::Daemon;

const IMAGE: &str = "sim/a";
/// A daemon with one running instance named `box`.
struct Scene {
    world: World,
    kv: MemoryKv,
    daemon: Daemon,
    api: Api,
}

impl Scene {
    async fn new() -> Self {
        let world = World::new(1);
        let digest = format!("sha256:{}", "a".repeat(64)).parse().expect("valid");
        let config = ImageConfig { cmd: vec!["serve".to_owned()], ..ImageConfig::default() };
        world.serve(&IMAGE.parse().expect("valid"), SimRegistryImage { digest, config });
        let kv = MemoryKv::new();
        let daemon = Daemon::start(&world, &kv, 1).await;
        let api = Api::of(&daemon.store);
        let body = json!({ "name": "box", "image": IMAGE, "size": "256MB" });
        assert_eq!(api.send("POST", "/instances", body).await.0, 201);
        let scene = Self { world, kv, daemon, api };
        scene.until("box to run", || scene.state("box") == Some(State::Running)).await;
        scene
    }

    fn instance(&self, name: &str) -> Option<Uid> {
        let object = self.daemon.store.find::<Instance>(&Name::resource(name).expect("valid"))?;
        Some(object.meta.uid.clone())
    }

    fn state(&self, name: &str) -> Option<State> {
        let object = self.daemon.store.get::<Instance>(&self.instance(name)?)?;
        Some(object.status.state)
    }

    fn snapshots(&self) -> Vec<SnapshotPhase> {
        self.daemon.store.list::<Snapshot>().iter().map(|snapshot| snapshot.status.phase).collect()
    }

    /// Waits in virtual time, for an hour at most.
    async fn until(&self, what: &str, is_so: impl Fn() -> bool) {
        for _ in 0..3600 {
            if is_so() {
                return;
            }
            sleep(Duration::from_secs(1)).await;
        }
        let all = (self.daemon.store.list::<Instance>(), self.daemon.store.list::<Snapshot>());
        panic!("waited for {what}: {all:#?} {:#?}", self.world.snapshot());
    }

    /// Sets the free space of the host's disk.
    fn room(&self, room: Room) {
        self.world.set_space(match room {
            Room::None => Bytes(0),
            Room::Enough => Bytes(1 << 40),
        });
    }

    /// Sends a request and hangs up when its snapshot is stored and not captured yet.
    async fn hang_up(&self, path: &str, body: Value) {
        self.hang_up_when(path, body, || !self.snapshots().is_empty()).await;
        assert_eq!(self.snapshots(), [SnapshotPhase::Pending]);
    }

    /// Sends a request and hangs up when the condition holds.
    async fn hang_up_when(&self, path: &str, body: Value, is_so: impl Fn() -> bool) {
        let mut call = pin!(self.api.send("POST", path, body));
        while !is_so() {
            tokio::select! {
                biased;
                // This arm is first: a condition that became true meanwhile is seen before the handler continues.
                () = yield_now() => {}
                answer = &mut call => panic!("answered before the client hung up: {answer:?}"),
            }
        }
    }

    /// Kills the daemon, and starts another on the stored state.
    async fn kill(&mut self) {
        self.daemon.die(&self.world).await;
        self.kv = self.kv.reopen();
        self.daemon = Daemon::start(&self.world, &self.kv, 2).await;
        self.api = Api::of(&self.daemon.store);
    }

    /// Checks that exactly these numbers of instances and snapshots are recorded and on the host.
    async fn holds_only(&self, instances: usize, snapshots: usize) {
        let counts = || {
            let (host, store) = (self.world.snapshot(), &self.daemon.store);
            let records = (store.list::<Instance>().len(), store.list::<Snapshot>().len());
            let host_counts = (host.machines.len(), host.disks.len(), host.links.len(), host.snapshots.len());
            (records, host_counts)
        };
        // The bridge is a link too.
        let expected = ((instances, snapshots), (instances, instances, instances + 1, snapshots));
        self.until("what failed to be gone", || counts() == expected).await;
    }
}

enum Room {
    None,
    Enough,
}

const SNAPSHOTS: &str = "/instances/box/snapshots";
const FORK: &str = "/instances/box/fork";

fn named_snapshot() -> Value {
    json!({ "kind": "Standby", "name": "before" })
}

fn named_fork() -> Value {
    json!({ "name": "fork", "from_running": true })
}

#[tokio::test(start_paused = true)]
async fn a_named_snapshot_that_fails_without_its_client_frees_its_name_and_leaves_nothing() {
    for is_killed in [false, true] {
        let mut scene = Scene::new().await;
        scene.room(Room::None);
        scene.hang_up(SNAPSHOTS, named_snapshot()).await;
        if is_killed {
            scene.kill().await;
        }
        scene.until("the snapshot to fail", || scene.snapshots() == [SnapshotPhase::Failed]).await;
        scene.room(Room::Enough);
        let (status, body) = scene.api.send("POST", SNAPSHOTS, named_snapshot()).await;
        assert_eq!((status, &body["name"]), (201, &json!("before")), "the name is free at once: {body}");
        scene.holds_only(1, 1).await;
        let (_, again) = scene.api.send("POST", SNAPSHOTS, named_snapshot()).await;
        assert_eq!(
            again["code"], "name_conflict",
            "the removal of the first leaves the second its name: {again}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_fork_that_fails_without_its_client_frees_its_name_and_leaves_nothing() {
    for is_killed in [false, true] {
        let mut scene = Scene::new().await;
        scene.room(Room::None);
        scene.hang_up(FORK, named_fork()).await;
        assert!(scene.instance("fork").is_some());
        if is_killed {
            scene.kill().await;
        }
        scene.until("the name to be free", || scene.instance("fork").is_none()).await;
        scene.holds_only(1, 0).await;
        scene.room(Room::Enough);
        let (status, body) = scene.api.send("POST", FORK, named_fork()).await;
        assert_eq!((status, &body["state"]), (201, &json!("Running")), "{body}");
        scene.holds_only(2, 0).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_hangs_up_early_has_its_snapshot_and_its_fork_all_the_same() {
    for is_killed in [false, true] {
        let mut scene = Scene::new().await;
        scene.hang_up(FORK, named_fork()).await;
        if is_killed {
            scene.kill().await;
        }
        scene.until("the fork to run", || scene.state("fork") == Some(State::Running)).await;
        scene.holds_only(2, 0).await;
        scene.hang_up(SNAPSHOTS, named_snapshot()).await;
        if is_killed {
            scene.kill().await;
        }
        scene.until("the snapshot", || scene.snapshots() == [SnapshotPhase::Ready]).await;
        scene.holds_only(2, 1).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_waits_learns_why_and_the_record_can_be_read_and_deleted() {
    let scene = Scene::new().await;
    scene.room(Room::None);
    for (path, body) in [(SNAPSHOTS, named_snapshot()), (FORK, named_fork())] {
        let (status, body) = scene.api.send("POST", path, body).await;
        let message = body["message"].as_str().unwrap_or_default();
        assert!(status == 507 && message.contains("are needed"), "{path}: {status} {body}");
    }
    assert_eq!(scene.api.send("GET", "/snapshots", Value::Null).await, (200, json!([])));
    let kept = scene.daemon.store.list::<Snapshot>().into_iter().find(|one| one.spec.name.is_some());
    let path = format!("/snapshots/{}", kept.expect("kept for a while").meta.uid);
    let (status, body) = scene.api.send("GET", &path, Value::Null).await;
    assert_eq!((status, &body["status"]), (200, &json!("failed")), "{body}");
    assert!(body["error"].as_str().is_some_and(|why| why.contains("are needed")), "{body}");
    let begun = Instant::now();
    assert_eq!(scene.api.send("DELETE", &path, Value::Null).await.0, 204);
    assert_eq!(scene.api.send("GET", &path, Value::Null).await.0, 404);
    assert!(begun.elapsed() < VERB_WAIT_MAX, "a deletion that was waited out");
    scene.holds_only(1, 0).await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_tries_again_all_the_time_always_learns_why_and_fills_nothing() {
    let scene = Scene::new().await;
    scene.room(Room::None);
    for _ in 0..2 * SNAPSHOTS_PER_SOURCE_MAX {
        assert_eq!(scene.api.send("POST", SNAPSHOTS, named_snapshot()).await.0, 507);
    }
    let most = FAILED_SNAPSHOTS_PER_SOURCE_MAX;
    scene.until("the surplus to be gone", || scene.snapshots().len() <= most).await;
    scene.holds_only(1, 0).await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_hangs_up_while_its_image_is_stored_has_its_credentials_used() {
    let scene = Scene::new().await;
    let image = || {
        let images = scene.daemon.store.list::<Image>();
        let uid = images.iter().find(|image| image.meta.name.as_str().contains("private"))?.meta.uid.clone();
        Some(uid)
    };
    let credentials = json!({ "username": "me", "password": "secret" });
    let body = json!({ "name": "sim/private", "credentials": credentials });
    scene.hang_up_when("/images", body, || image().is_some()).await;
    scene.until("the credentials", || scene.api.credentials().first() == image().as_ref()).await;
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_that_lost_its_files_stays_with_the_reason_and_gives_its_pool_up() {
    let scene = Scene::new().await;
    let body = json!({ "kind": "Standby", "name": "before", "pool_size": 2 });
    let (status, body) = scene.api.send("POST", SNAPSHOTS, body).await;
    assert_eq!(status, 201, "{body}");
    let uid: Uid = body["id"].as_str().expect("an id").parse().expect("valid");
    let seen = || scene.daemon.store.get::<Snapshot>(&uid).expect("there").status.clone();
    scene.until("the pool", || seen().warm == 2).await;
    Snapshots::remove(&scene.world, &uid).await.expect("removed by somebody else");
    scene.until("the loss", || seen().phase == SnapshotPhase::Failed).await;
    let is_alone =
        || scene.daemon.store.list::<Instance>().len() == 1 && scene.world.snapshot().disks.len() == 1;
    scene.until("the pool to be gone", is_alone).await;
    sleep(2 * FAILURE_KEPT).await;
    let (_, listed) = scene.api.send("GET", "/snapshots?name=before", Value::Null).await;
    assert_eq!(listed[0]["status"], "failed", "{listed}");
    assert!(listed[0]["error"].as_str().is_some_and(|why| why.contains("missing")), "{listed}");
    let fork = scene.api.send("POST", &format!("/snapshots/{uid}/fork"), json!({ "name": "fork" })).await;
    assert!(fork.0 == 409 && fork.1["message"].to_string().contains("missing"), "{fork:?}");
    assert_eq!(scene.api.send("DELETE", &format!("/snapshots/{uid}"), Value::Null).await.0, 204);
    scene.holds_only(1, 0).await;
}
