//! A schedule over hours of virtual time: one run per minute, crashes, downtime, and the kept snapshots.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use stead_controllers::checks::{self, Records};
use stead_controllers::node::local;
use stead_controllers::schedule::admission as schedules;
use stead_controllers::sim::{SimRegistryImage, World};
use stead_controllers::snapshot::admission as snapshots;
use stead_controllers::store::{MemoryKv, Store};
use stead_controllers::vm::admission;
use stead_schemas::api::{InstanceRequest, ScheduleRequest};
use stead_schemas::image::ImageConfig;
use stead_schemas::meta::Tags;
use stead_schemas::names::{Name, Uid};
use stead_schemas::quantity::GoDuration;
use stead_schemas::schedule::{Retention, SnapshotSchedule};
use stead_schemas::snapshot::{Snapshot, SnapshotKind, SnapshotPhase, SnapshotPurpose};
use tokio::time::sleep;

use crate::daemon::Daemon;

const MINUTE: Duration = Duration::from_secs(60);

/// Returns the runs whose snapshots exist, oldest first.
fn runs(store: &Store) -> Vec<Timestamp> {
    let snapshots = store.list::<Snapshot>();
    let mut runs: Vec<_> = snapshots
        .iter()
        .filter(|snapshot| snapshot.status.phase == SnapshotPhase::Ready && !snapshot.meta.is_deleting())
        .filter_map(|snapshot| Some(snapshot.spec.schedule.as_ref()?.due))
        .collect();
    runs.sort_unstable();
    runs
}

async fn instance(world: &World, store: &Store) -> Uid {
    let digest = format!("sha256:{}", "a".repeat(64)).parse().expect("valid");
    let config = ImageConfig { cmd: vec!["serve".to_owned()], ..ImageConfig::default() };
    world.serve(&"sim/a".parse().expect("valid"), SimRegistryImage { digest, config });
    let node = local(store).expect("declared");
    let body = serde_json::json!({ "name": "i", "image": "sim/a", "size": "256MB" });
    let request = InstanceRequest::read(body, &node.offer()).expect("valid");
    let created = store.transact(move |tx| admission::create(tx, request, "st")).await;
    created.expect("created").meta.uid.clone()
}

async fn put(store: &Store, instance: &Uid, max_count: u32) {
    let request = ScheduleRequest {
        interval: GoDuration(MINUTE),
        retention: Retention { max_count: Some(max_count), max_age: None },
        name_prefix: Some("n".to_owned()),
        metadata: Tags::new(),
    };
    let uid = instance.clone();
    store.transact(move |tx| schedules::put(tx, &uid, request)).await.expect("put");
}

async fn take_own_snapshot(store: &Store, instance: &Uid) {
    let (moved, name) = (instance.clone(), Name::resource("mine").ok());
    let purpose = SnapshotPurpose::Kept;
    let request = snapshots::CreateRequest {
        kind: SnapshotKind::Standby,
        name,
        tags: Tags::new(),
        purpose,
        compression: None,
        pool: 0,
        schedule: None,
    };
    store.transact(move |tx| snapshots::create(tx, &moved, request)).await.expect("asked for");
}

async fn plays() {
    let (world, mut kv) = (World::new(3), MemoryKv::new());
    let mut daemon = Daemon::start(&world, &kv, 3).await;
    let uid = instance(&world, &daemon.store).await;
    put(&daemon.store, &uid, 3).await;
    // This is a client's own snapshot: no schedule ever deletes it.
    sleep(MINUTE / 2).await;
    take_own_snapshot(&daemon.store, &uid).await;

    // A crash happens in every minute, each time at another second.
    let mut all = BTreeSet::new();
    for second in 0..20 {
        sleep(Duration::from_secs(second * 3)).await;
        daemon.die(&world).await;
        kv = kv.reopen();
        daemon = Daemon::start(&world, &kv, second).await;
        for _ in 0..6 {
            sleep(Duration::from_secs(10)).await;
            all.extend(runs(&daemon.store));
        }
    }
    let all: Vec<Timestamp> = all.into_iter().collect();
    let are_a_minute_apart =
        |pair: &[Timestamp]| pair[1].duration_since(pair[0]) == SignedDuration::from_mins(1);
    assert!(all.windows(2).all(are_a_minute_apart), "none is missed, none is taken twice: {all:?}");
    assert!(all.len() >= 20, "{all:?}");
    assert_eq!(runs(&daemon.store), all[all.len() - 3..], "the newest three are kept");

    // After an hour without a daemon one run is caught up, and the times continue as before.
    daemon.die(&world).await;
    // This is the middle of a minute between two runs.
    sleep(60 * MINUTE + MINUTE / 2).await;
    let restarted_daemon = Daemon::start(&world, &kv.reopen(), 99).await;
    sleep(Duration::from_secs(5)).await;
    let store = &restarted_daemon.store;
    let caught_up = runs(store);
    let fresh: Vec<_> = caught_up.iter().filter(|run| !all.contains(run)).collect();
    let [one] = fresh[..] else { panic!("one is caught up with: {fresh:?}") };
    let gap = one.duration_since(all[0]);
    assert_eq!(gap.as_secs() % 60, 0, "{gap:?}");

    // Fewer are kept from now on; a stop makes the next one a snapshot of the disk alone.
    put(store, &uid, 1).await;
    sleep(Duration::from_secs(2)).await;
    assert_eq!(runs(store).len(), 1);
    let moved = uid.clone();
    store.transact(move |tx| admission::stop(tx, &moved)).await.expect("asked for");
    sleep(2 * MINUTE).await;
    let kinds = |store: &Store| {
        let snapshots = store.list::<Snapshot>();
        let named = snapshots.iter().map(|one| (one.spec.schedule.is_some(), one.spec.kind));
        named.collect::<BTreeSet<_>>()
    };
    let mine = (false, SnapshotKind::Standby);
    assert_eq!(kinds(store), BTreeSet::from([mine, (true, SnapshotKind::Stopped)]));
    assert_eq!(checks::settled(&Records::of(store), &world.snapshot(), Timestamp::MAX), Vec::<String>::new());

    // The schedule is deleted with its instance; the snapshots stay.
    let moved = uid.clone();
    store.transact(move |tx| admission::delete(tx, &moved, false)).await.expect("asked for");
    sleep(3 * MINUTE).await;
    assert!(store.list::<SnapshotSchedule>().is_empty());
    assert_eq!((runs(store).len(), kinds(store).len()), (1, 2));
}

#[test]
fn each_run_is_carried_out_once_over_crashes_and_one_is_caught_up_with_after_downtime() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.expect("a runtime").block_on(plays());
}
