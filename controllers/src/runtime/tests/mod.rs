//! Tests of the runtime as a whole, in virtual time.

mod dependents;
mod pace;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use stead_schemas::condition::Reason;
use stead_schemas::limits::PASS_ROUNDS_MAX;
use stead_schemas::meta::{Kind, Object, OwnerRef, Tags};
use stead_schemas::names::{Name, Uid};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::queue::Queue;
use super::*;
use crate::host::{HostError, HostErrorKind};
use crate::store::{Kinds, MemoryKv, New, PlainSealer, Store};

#[derive(Debug, Clone, PartialEq)]
enum Lamp {}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct LampSpec {
    level: u32,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct LampStatus {
    level: u32,
    note: String,
}

impl Kind for Lamp {
    const NAME: &'static str = "lamp";
    const FINALIZER: &'static str = "lamp";
    type Spec = LampSpec;
    type Status = LampStatus;
}

/// The behaviour that a pass meets, by key. `Work` is that of an ordinary lamp.
#[derive(Debug, Clone, Default)]
enum Behaviour {
    #[default]
    Work,
    Fail(HostErrorKind),
    Panic,
    Slow(Duration),
    WaitUntil(Timestamp),
    /// The level is recorded before the plan is `Converged`.
    RecordFirst,
    /// The plan asks for a record whatever is stored.
    RecordAlways,
    NeverDone,
}

#[derive(Debug, Default)]
struct Bench {
    /// The host: the levels of lamps.
    lamps: BTreeMap<Uid, u32>,
    behaviours: BTreeMap<Uid, Behaviour>,
    running: BTreeSet<Uid>,
    most_at_once: usize,
    /// Times at which each pass observed first, per key.
    passes: BTreeMap<Uid, Vec<Instant>>,
    acts: usize,
}

#[derive(Debug, Clone, Default)]
struct Lamps(Arc<Mutex<Bench>>);

impl Lamps {
    fn bench(&self) -> std::sync::MutexGuard<'_, Bench> {
        self.0.lock().expect("the bench is not poisoned")
    }
    fn passes(&self, uid: &Uid) -> usize {
        self.bench().passes.get(uid).map_or(0, Vec::len)
    }
}

/// Marks a key as running and panics if it is running already.
struct Exclusive(Lamps, Uid);

impl Exclusive {
    fn take(lamps: &Lamps, uid: &Uid) -> Self {
        let mut bench = lamps.bench();
        let is_first = bench.running.insert(uid.clone());
        bench.most_at_once = bench.most_at_once.max(bench.running.len());
        drop(bench);
        if !is_first {
            eprintln!("two passes of {uid} at once");
            std::process::abort(); // A panic would be caught by the runner under test.
        }
        Self(lamps.clone(), uid.clone())
    }
}

impl Drop for Exclusive {
    fn drop(&mut self) {
        self.0.bench().running.remove(&self.1);
    }
}

#[derive(Debug)]
struct Seen {
    uid: Uid,
    level: Option<u32>,
    wait: Option<Timestamp>,
    is_endless: bool,
    behaviour: Behaviour,
}

#[derive(Debug, Clone, PartialEq, Eq, strum::IntoStaticStr, strum::VariantNames)]
#[strum(serialize_all = "lowercase")]
enum Step {
    Set(Uid, u32),
    Remove(Uid),
}

impl Reconciler for Lamps {
    type Kind = Lamp;
    type Observed = Seen;
    type Action = Step;

    async fn observe(&self, uid: &Uid, _: Option<&Object<Lamp>>) -> Result<Seen, HostError> {
        let _exclusive = Exclusive::take(self, uid);
        let behaviour = {
            let mut bench = self.bench();
            bench.passes.entry(uid.clone()).or_default().push(Instant::now());
            bench.behaviours.get(uid).cloned().unwrap_or_default()
        };
        let mut wait = None;
        match behaviour.clone() {
            Behaviour::Work | Behaviour::NeverDone | Behaviour::RecordFirst | Behaviour::RecordAlways => {}
            Behaviour::Fail(kind) => return Err(HostError::new(kind, "look at", "lamp")),
            Behaviour::Panic => panic!("the lamp exploded"),
            Behaviour::Slow(time) => tokio::time::sleep(time).await,
            Behaviour::WaitUntil(until) => wait = Some(until),
        }
        let is_endless = matches!(behaviour, Behaviour::NeverDone);
        Ok(Seen {
            uid: uid.clone(),
            level: self.bench().lamps.get(uid).copied(),
            wait,
            is_endless,
            behaviour,
        })
    }

    fn plan(desired: &Desired<'_, Lamp>, seen: &Seen, now: Moment) -> Plan<Self::Action> {
        let target = match desired {
            Desired::Present(object) => Some(object.spec.level),
            Desired::Absent(_) => None,
        };
        if let Some(until) = seen.wait.filter(|until| *until > now.at()) {
            let reason = Reason::WaitingForGuest;
            return Plan::Wait(Wait { reason, message: String::new(), until: Some(until) });
        }
        let stored = desired.object().map(|object| object.status.level);
        let is_to_record = match seen.behaviour {
            Behaviour::RecordFirst => seen.level.is_some() && stored != seen.level,
            Behaviour::RecordAlways => seen.level.is_some(),
            _ => false,
        };
        if is_to_record {
            return Plan::Record(Record { reason: Reason::Converging, what: "recording the level" });
        }
        if target == seen.level && !seen.is_endless {
            Plan::Converged
        } else {
            let uid = seen.uid.clone();
            Plan::Act(vec![target.map_or(Step::Remove(uid.clone()), |level| Step::Set(uid, level))])
        }
    }

    async fn act(&self, step: &Step) -> Result<(), HostError> {
        let mut bench = self.bench();
        bench.acts += 1;
        match step {
            Step::Set(uid, level) => bench.lamps.insert(uid.clone(), *level),
            Step::Remove(uid) => bench.lamps.remove(uid),
        };
        Ok(())
    }

    fn status(object: &Object<Lamp>, seen: Option<&Seen>, end: &PassEnd) -> LampStatus {
        let level = seen.and_then(|seen| seen.level).unwrap_or(object.status.level);
        // The attempt is included on purpose: a status that differs at each failure must not wake its own
        // pass.
        let note = match &end.outcome {
            Outcome::Failed { attempt, .. } => format!("failure {attempt}"),
            other => format!("{other:?}"),
        };
        LampStatus { level, note }
    }

    async fn owned(&self) -> Result<Vec<Uid>, HostError> {
        Ok(self.bench().lamps.keys().cloned().collect())
    }
}

struct World {
    store: Store,
    kv: MemoryKv,
    lamps: Lamps,
    clock: Arc<TokioClock>,
    writer: JoinHandle<()>,
}

fn name(text: &str) -> Name {
    Name::resource(text).expect("a valid name")
}

fn world_on(kv: MemoryKv) -> World {
    let clock = Arc::new(TokioClock::starting_at(Timestamp::UNIX_EPOCH));
    let (store, writer) = Store::open(
        kv.clone(),
        Arc::new(PlainSealer),
        clock.clone(),
        Arc::new(SequentialIds::default()),
        Kinds::new().with::<Lamp>(),
    )
    .expect("the store opens");
    let writer = tokio::spawn(writer.run(std::future::pending()));
    World { store, kv, lamps: Lamps::default(), clock, writer }
}

fn world() -> World {
    world_on(MemoryKv::new())
}

/// The sender that ends a runner, and the runner's task.
type Run = (oneshot::Sender<()>, JoinHandle<()>);

/// Makes a world whose runner runs until the second value is dropped.
fn running() -> (World, Run) {
    let world = world();
    let run = world.start(world.runner());
    (world, run)
}

impl World {
    fn runner(&self) -> Runner<Lamps> {
        let config = RunnerConfig { concurrency: 4, ..RunnerConfig::seeded(1) };
        Runner::new(self.lamps.clone(), self.store.clone(), self.clock.clone(), Arc::new(NoBoundary), config)
    }

    fn start(&self, runner: Runner<Lamps>) -> Run {
        let (stop, stopped) = oneshot::channel::<()>();
        (
            stop,
            tokio::spawn(runner.run(async {
                let _ = stopped.await;
            })),
        )
    }

    async fn create(&self, text: &str, behaviour: Behaviour) -> Uid {
        let uid =
            SequentialIds::starting_at(u64::try_from(self.store.count::<Lamp>()).expect("small") + 1_000_000);
        let uid = uid.next();
        self.lamps.bench().behaviours.insert(uid.clone(), behaviour);
        let new = New::<Lamp> {
            uid: Some(uid.clone()),
            name: name(text),
            tags: Tags::new(),
            owner: None,
            spec: LampSpec { level: 7 },
        };
        self.store.transact(move |tx| tx.create(new)).await.expect("created");
        uid
    }

    async fn delete(&self, uid: &Uid) {
        let uid = uid.clone();
        self.store.transact(move |tx| tx.request_deletion::<Lamp>(&uid)).await.expect("deleted");
    }

    /// Advances virtual time.
    async fn pass_time(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }
}

const SOON: Duration = Duration::from_millis(50);

#[tokio::test(start_paused = true)]
async fn what_a_plan_asks_to_record_is_stored_and_the_same_pass_goes_on_from_it() {
    let (world, _run) = running();
    let uid = world.create("one", Behaviour::RecordFirst).await;
    world.pass_time(SOON).await;
    let status = world.store.get::<Lamp>(&uid).expect("there").status.clone();
    assert_eq!((status.level, status.note.as_str()), (7, "Converged"));
    let bench = world.lamps.bench();
    let times = &bench.passes[&uid];
    // The host is observed before and after the step, and once with the record.
    assert_eq!((times.len(), times[0]), (3, times[2]));
}

/// Checks that a plan whose record changes nothing, which is a fault of its reconciler, costs ever rarer
/// retries and no loop.
#[tokio::test(start_paused = true)]
async fn a_record_that_changes_nothing_is_a_failure() {
    let (world, _run) = running();
    let uid = world.create("one", Behaviour::RecordAlways).await;
    world.pass_time(Duration::from_secs(60)).await;
    assert!(world.lamps.passes(&uid) < 40, "{}", world.lamps.passes(&uid));
}

#[tokio::test(start_paused = true)]
async fn a_spec_is_carried_out_reported_and_withdrawn() {
    let (world, _run) = running();
    let uid = world.create("one", Behaviour::Work).await;
    world.pass_time(SOON).await;
    assert_eq!(world.lamps.bench().lamps.get(&uid), Some(&7));
    let object = world.store.get::<Lamp>(&uid).expect("stored");
    assert_eq!(object.status, LampStatus { level: 7, note: "Converged".to_owned() });
    world.delete(&uid).await;
    world.pass_time(SOON).await;
    assert!(world.lamps.bench().lamps.is_empty());
    assert!(world.store.get::<Lamp>(&uid).is_none(), "the finalizer went and the record with it");
    assert_eq!(world.lamps.bench().acts, 2);
}

#[tokio::test(start_paused = true)]
async fn orphans_are_removed_but_not_those_of_an_unreadable_record() {
    let kv = MemoryKv::new();
    let (kept, gone) = {
        let world = world_on(kv.clone());
        let kept = world.create("kept", Behaviour::Work).await;
        let gone = world.create("healthy", Behaviour::Work).await;
        world.writer.abort();
        (kept, gone)
    };
    assert!(kv.corrupt(&format!("o/lamp/{kept}")));
    let world = world_on(kv.reopen());
    let stray = SequentialIds::starting_at(99).next();
    world.lamps.bench().lamps.extend([(kept.clone(), 7), (gone.clone(), 7), (stray.clone(), 1)]);
    let (_stop, _run) = world.start(world.runner());
    world.pass_time(SOON).await;
    let left: Vec<_> = world.lamps.bench().lamps.keys().cloned().collect();
    assert_eq!(left, BTreeSet::from([kept, gone]).into_iter().collect::<Vec<_>>());
}

#[tokio::test(start_paused = true)]
async fn a_failing_key_is_retried_with_growing_delays_and_does_not_wake_itself() {
    let (world, _run) = running();
    let uid = world.create("one", Behaviour::Fail(HostErrorKind::Transient)).await;
    world.pass_time(Duration::from_secs(10)).await;
    let times = world.lamps.bench().passes[&uid].clone();
    // The delays 0.1 + 0.2 + 0.4 + ... are shortened by up to a quarter: 6 to 8 attempts in ten seconds.
    assert!((6..=9).contains(&times.len()), "{} passes", times.len());
    let gaps: Vec<_> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(gaps.windows(2).all(|pair| pair[1] > pair[0]), "{gaps:?}");
    assert_eq!(world.store.get::<Lamp>(&uid).expect("there").status.note, format!("failure {}", times.len()));

    world.lamps.bench().behaviours.clear();
    world.pass_time(Duration::from_secs(20)).await;
    assert_eq!(world.lamps.bench().lamps.get(&uid), Some(&7), "it recovers by itself");
    world.lamps.bench().behaviours.insert(uid.clone(), Behaviour::Fail(HostErrorKind::Transient));
    let before = world.lamps.passes(&uid);
    world.store.transact(bump(&uid)).await.expect("stored");
    world.pass_time(Duration::from_millis(130)).await;
    assert_eq!(world.lamps.passes(&uid), before + 2, "after progress the first delay is short again");
}

#[tokio::test(start_paused = true)]
async fn what_fails_has_its_own_time_whatever_else_wakes_everything() {
    let world = world();
    let config = RunnerConfig { concurrency: 4, resync: Duration::from_secs(1), ..RunnerConfig::seeded(1) };
    let runner = Runner::new(
        world.lamps.clone(),
        world.store.clone(),
        world.clock.clone(),
        Arc::new(NoBoundary),
        config,
    );
    let drift = runner.drift();
    let (_stop, _run) = world.start(runner);
    let failing = world.create("failing", Behaviour::Fail(HostErrorKind::Permanent)).await;
    let well = world.create("well", Behaviour::Work).await;
    world.pass_time(Duration::from_secs(100)).await;
    assert_eq!(world.lamps.passes(&failing), 1, "a resync says nothing new of it");
    assert!(world.lamps.passes(&well) > 90, "others are looked at");
    for _ in 0..1000 {
        drift.everything();
        world.pass_time(Duration::from_millis(10)).await;
    }
    let tried = world.lamps.passes(&failing);
    assert!((2..=12).contains(&tried), "drift that may be its own: {tried} passes in 10 s");
    world.store.transact(bump(&failing)).await.expect("stored");
    world.pass_time(SOON).await;
    assert_eq!(world.lamps.passes(&failing), tried + 1, "a new spec is tried at once");
}

#[tokio::test(start_paused = true)]
async fn a_spec_that_changed_during_the_observation_is_not_carried_out() {
    const OBSERVATION: Duration = Duration::from_secs(2);
    let (world, _run) = running();
    let changed = world.create("changed", Behaviour::Slow(OBSERVATION)).await;
    let deleted = world.create("deleted", Behaviour::Slow(OBSERVATION)).await;
    world.pass_time(OBSERVATION / 2).await;
    assert_eq!((world.lamps.passes(&changed), world.lamps.passes(&deleted)), (1, 1));
    world.store.transact(bump(&changed)).await.expect("stored");
    world.delete(&deleted).await;
    world.pass_time(OBSERVATION).await;
    assert_eq!(world.lamps.bench().acts, 0, "what they wished first is over");
    world.pass_time(OBSERVATION * 3).await;
    let bench = world.lamps.bench();
    assert_eq!((bench.lamps.get(&changed), bench.acts), (Some(&8), 1));
    drop(bench);
    assert!(world.store.get::<Lamp>(&deleted).is_none());
    let status = world.store.get::<Lamp>(&changed).expect("stored").status.clone();
    assert_eq!(status, LampStatus { level: 8, note: "Converged".to_owned() });
}

fn bump(
    uid: &Uid,
) -> impl FnOnce(&mut crate::store::Tx<'_>) -> Result<(), crate::store::TxError> + Send + 'static {
    let uid = uid.clone();
    move |tx| tx.update_spec::<Lamp>(&uid, None, |spec| spec.level += 1).map(|_| ())
}

#[tokio::test(start_paused = true)]
async fn a_panic_is_contained_retried_and_harms_no_other_key() {
    let world = world();
    let (_stop, run) = world.start(world.runner());
    let bad = world.create("bad", Behaviour::Panic).await;
    let good = world.create("good", Behaviour::Work).await;
    world.pass_time(Duration::from_secs(1)).await;
    assert!(!run.is_finished());
    assert_eq!(world.lamps.bench().lamps.get(&good), Some(&7));
    assert!(world.lamps.passes(&bad) >= 3, "it is tried again");
    world.lamps.bench().behaviours.clear();
    world.pass_time(Duration::from_secs(2)).await;
    assert_eq!(world.lamps.bench().lamps.get(&bad), Some(&7));
}

#[tokio::test(start_paused = true)]
async fn a_key_runs_once_at_a_time_and_requests_meanwhile_collapse_to_one() {
    let world = world();
    let runner = world.runner();
    let drift = runner.drift();
    let (_stop, _run) = world.start(runner);
    let slow = world.create("slow", Behaviour::Work).await;
    world.pass_time(SOON).await;
    world.lamps.bench().behaviours.insert(slow.clone(), Behaviour::Slow(Duration::from_secs(10)));
    let before = world.lamps.passes(&slow);
    // `Exclusive` aborts the test if two observations of one key overlap.
    for _ in 0..100 {
        drift.object(slow.clone());
        world.pass_time(Duration::from_millis(50)).await;
    }
    world.pass_time(Duration::from_secs(60)).await;
    assert_eq!(world.lamps.passes(&slow), before + 2, "one run, and one for all requests during it");
}

#[tokio::test(start_paused = true)]
async fn an_object_that_is_gone_is_not_observed_again_for_earlier_notifications() {
    let world = world();
    let runner = world.runner();
    let drift = runner.drift();
    let (_stop, _run) = world.start(runner);
    let uid = world.create("one", Behaviour::Work).await;
    world.pass_time(SOON).await;
    // Each observation takes a second: the deletion has one before the removal and one after it.
    world.lamps.bench().behaviours.insert(uid.clone(), Behaviour::Slow(Duration::from_secs(1)));
    let before = world.lamps.passes(&uid);
    world.delete(&uid).await;
    while world.store.get::<Lamp>(&uid).is_some() {
        drift.object(uid.clone());
        world.pass_time(SOON).await;
    }
    world.pass_time(Duration::from_secs(30)).await;
    assert_eq!(
        world.lamps.passes(&uid),
        before + 2,
        "requests during the last pass are dropped with the record"
    );
    // An object that is found later is an orphan, and is removed as an orphan.
    world.lamps.bench().lamps.insert(uid.clone(), 3);
    drift.object(uid.clone());
    world.pass_time(Duration::from_secs(30)).await;
    assert!(world.lamps.bench().lamps.is_empty());
}
