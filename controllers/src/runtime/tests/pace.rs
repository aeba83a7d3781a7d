//! The pace of a runner: concurrency, waits, drift, resyncs, its end, and the queue.

use super::*;

#[tokio::test(start_paused = true)]
async fn concurrency_is_bounded_and_slow_keys_do_not_stop_others() {
    let world = world();
    let mut slow = Vec::new();
    for n in 0..3 {
        slow.push(world.create(&format!("slow-{n}"), Behaviour::Slow(Duration::from_secs(100))).await);
    }
    let mut quick = Vec::new();
    for n in 0..40 {
        quick.push(world.create(&format!("quick-{n}"), Behaviour::Slow(Duration::from_millis(1))).await);
    }
    let (_stop, _run) = world.start(world.runner());
    world.pass_time(Duration::from_secs(5)).await;
    assert!(quick.iter().all(|uid| world.lamps.bench().lamps.contains_key(uid)));
    assert!(slow.iter().all(|uid| !world.lamps.bench().lamps.contains_key(uid)));
    assert_eq!(world.lamps.bench().most_at_once, 4);
}

#[tokio::test(start_paused = true)]
async fn a_wait_with_a_time_is_observed_at_that_time() {
    let world = world();
    let until = Timestamp::UNIX_EPOCH + Duration::from_secs(42);
    let (_stop, _run) = world.start(world.runner());
    let uid = world.create("one", Behaviour::WaitUntil(until)).await;
    world.pass_time(Duration::from_secs(41)).await;
    assert_eq!(world.lamps.passes(&uid), 1);
    world.pass_time(Duration::from_secs(2)).await;
    assert_eq!(world.lamps.bench().lamps.get(&uid), Some(&7));
}

#[tokio::test(start_paused = true)]
async fn a_plan_without_an_end_is_slowed_down() {
    let (world, _run) = running();
    let uid = world.create("one", Behaviour::NeverDone).await;
    world.pass_time(Duration::from_secs(60)).await;
    let rounds = world.lamps.passes(&uid) / (PASS_ROUNDS_MAX + 1);
    assert!((10..=30).contains(&rounds), "{rounds} passes in a minute");
}

#[tokio::test(start_paused = true)]
async fn drift_is_healed_at_once_and_a_missed_one_by_the_resync() {
    let world = world();
    let runner = world.runner();
    let drift = runner.drift();
    let (_stop, _run) = world.start(runner);
    let uid = world.create("one", Behaviour::Work).await;
    world.pass_time(SOON).await;
    world.lamps.bench().lamps.clear();
    drift.object(uid.clone());
    world.pass_time(SOON).await;
    assert_eq!(world.lamps.bench().lamps.get(&uid), Some(&7));

    world.lamps.bench().lamps.insert(uid.clone(), 1);
    world.pass_time(stead_schemas::limits::RESYNC_INTERVAL + SOON).await;
    assert_eq!(world.lamps.bench().lamps.get(&uid), Some(&7), "the resync found it");
}

#[tokio::test(start_paused = true)]
async fn more_drift_than_the_queue_holds_is_still_healed() {
    let world = world();
    let runner = world.runner();
    let drift = runner.drift();
    let (_stop, _run) = world.start(runner);
    let uid = world.create("one", Behaviour::Work).await;
    world.pass_time(SOON).await;
    world.lamps.bench().lamps.clear();
    let stray = SequentialIds::starting_at(99).next();
    for _ in 0..stead_schemas::limits::DRIFT_QUEUE_MAX {
        drift.object(stray.clone());
    }
    drift.object(uid.clone()); // The queue is full: this does not fit.
    world.pass_time(SOON).await;
    assert_eq!(world.lamps.bench().lamps.get(&uid), Some(&7));
}

#[tokio::test(start_paused = true)]
async fn a_runner_that_fell_behind_the_ring_lists_again() {
    let world = world();
    let blocker = world.create("blocker", Behaviour::Work).await;
    let (_stop, _run) = world.start(world.runner());
    world.pass_time(SOON).await;
    // The runner's task does not run until this task yields for virtual time; one transaction makes more
    // events than the ring holds.
    let uid = world.create("late", Behaviour::Work).await;
    let others = stead_schemas::limits::WATCH_RING_EVENTS + 10;
    world
        .store
        .transact(move |tx| {
            for n in 0..others {
                let spec = LampSpec { level: 1 };
                let (name, tags) = (name(&format!("n-{n}")), Tags::new());
                tx.create::<Lamp>(New { uid: None, name, tags, owner: None, spec })?;
            }
            Ok::<_, crate::store::TxError>(())
        })
        .await
        .expect("stored");
    world.pass_time(Duration::from_secs(30)).await;
    assert_eq!(world.lamps.bench().lamps.get(&uid), Some(&7));
    assert_eq!(world.lamps.bench().lamps.len(), others + 2, "every lamp was seen to");
    assert!(world.lamps.passes(&blocker) > 1, "everything was looked at again");
}

#[tokio::test(start_paused = true)]
async fn shutdown_lets_passes_end_within_the_grace_and_abandons_the_rest() {
    let world = world();
    let short = world.create("short", Behaviour::Slow(Duration::from_secs(5))).await;
    let long = world.create("long", Behaviour::Slow(Duration::from_secs(3600))).await;
    let (stop, run) = world.start(world.runner());
    world.pass_time(SOON).await;
    let begin = Instant::now();
    stop.send(()).expect("the runner listens");
    run.await.expect("the runner ends in peace");
    assert!(begin.elapsed() <= stead_schemas::limits::PASS_GRACE + SOON);
    assert!(world.lamps.bench().passes.contains_key(&long));
    assert!(!world.lamps.bench().lamps.contains_key(&long));
    assert!(world.lamps.passes(&short) >= 1);
    assert!(world.lamps.bench().running.is_empty(), "abandoned passes are dropped");
}

#[tokio::test(start_paused = true)]
async fn an_owner_is_woken_by_what_it_owns_and_mappings_wake_others() {
    let world = world();
    let other = world.create("other", Behaviour::Work).await;
    let mapped = other.clone();
    let runner = world.runner().map(move |event| match event.uid == mapped {
        true => Vec::new(),
        false => vec![mapped.clone()],
    });
    let (_stop, _run) = world.start(runner);
    let owner = world.create("owner", Behaviour::Work).await;
    world.pass_time(SOON).await;
    let (before, before_other) = (world.lamps.passes(&owner), world.lamps.passes(&other));
    let of = OwnerRef { kind: "lamp".to_owned(), uid: owner.clone() };
    let new = New::<Lamp> {
        uid: None,
        name: name("owned"),
        tags: Tags::new(),
        owner: Some(of),
        spec: LampSpec { level: 0 },
    };
    world.store.transact(move |tx| tx.create(new)).await.expect("created");
    world.pass_time(SOON).await;
    assert!(world.lamps.passes(&owner) > before);
    assert!(world.lamps.passes(&other) > before_other);
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_converged_objects_take_one_observation_each() {
    let world = world();
    world
        .store
        .transact(|tx| {
            for n in 0..10_000 {
                let (name, tags) = (name(&format!("n-{n}")), Tags::new());
                tx.create::<Lamp>(New { uid: None, name, tags, owner: None, spec: LampSpec { level: 7 } })?;
            }
            Ok::<_, crate::store::TxError>(())
        })
        .await
        .expect("stored");
    let (stop, run) = world.start(world.runner());
    world.pass_time(Duration::from_secs(30)).await;
    assert_eq!(world.lamps.bench().lamps.len(), 10_000);
    stop.send(()).expect("the runner listens");
    run.await.expect("ends");
    world.lamps.bench().passes.clear();
    let commits = world.kv.commits();
    let (_stop, _run) = world.start(world.runner());
    world.pass_time(SOON).await;
    assert_eq!(world.lamps.bench().passes.len(), 10_000);
    assert!(world.lamps.bench().passes.values().all(|times| times.len() == 1 || times.len() == 2));
    assert_eq!(world.kv.commits(), commits, "passes that change nothing write nothing");
}

fn key(number: u64) -> Uid {
    SequentialIds::starting_at(number).next()
}

#[tokio::test(start_paused = true)]
async fn the_queue_keeps_a_key_once_and_the_earlier_time_wins() {
    let mut queue = Queue::default();
    let now = Instant::now();
    let at = |seconds| now + Duration::from_secs(seconds);
    queue.schedule(&key(1), at(5));
    queue.schedule(&key(1), at(9));
    queue.schedule(&key(2), at(3));
    queue.schedule(&key(1), at(2));
    assert_eq!(queue.next_due(), Some(at(2)));
    assert_eq!(queue.pop(at(1)), None);
    assert_eq!(queue.pop(at(9)), Some(key(1)));
    queue.schedule(&key(1), at(8));
    queue.schedule(&key(1), at(7));
    assert_eq!(queue.pop(at(9)), Some(key(2)));
    assert_eq!(queue.pop(at(9)), None, "a running key is not given out again");
    queue.done(&key(1));
    queue.done(&key(2));
    assert_eq!(queue.next_due(), Some(at(7)));
    assert_eq!(queue.pop(at(7)), Some(key(1)));
    queue.done(&key(1));
    assert_eq!(queue.next_due(), None);
}
