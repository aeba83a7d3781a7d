//! A kind that only this test knows: what a new kind needs, and what it does not touch.
//!
//! A beacon is lit while its instance runs. It has all parts of a kind: a spec and a status, references by which
//! the store finds the beacons of an instance, a port with a host behind it, and a reconciler. It runs beside all
//! reconcilers of the daemon, on the same store. Store, runtime and checks handle it without a change.
//!
//! The parts of a kind of the program are files of its own. These existing files name it:
//!
//! ```text
//! schemas/src/lib.rs         the module of its spec and status
//! schemas/src/api/mod.rs     the module of its wire types
//! controllers/src/lib.rs     the module of its reconciler
//! controllers/src/daemon.rs  the list of kinds, and the runner
//! src/api/mod.rs             the module of its handlers
//! src/api/table.rs           its routes
//! ```
//! [`a_new_kind_touches_six_files`] counts them for the latest kind that needs nothing of the host: the schedule.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use stead_controllers::checks::{self, Records};
use stead_controllers::host::HostError;
use stead_controllers::node::local;
use stead_controllers::runtime::{
    Action, Desired, Moment, NoBoundary, PassEnd, Plan, Reconciler, Runner, RunnerConfig, conditions,
};
use stead_controllers::sim::{SimRegistryImage, World};
use stead_controllers::store::{MemoryKv, New, Store};
use stead_controllers::vm::admission;
use stead_schemas::api::{InstanceRequest, InstanceStart};
use stead_schemas::condition::{Condition, is_ready};
use stead_schemas::image::ImageConfig;
use stead_schemas::instance::{Instance, State};
use stead_schemas::meta::{Kind, Object, Tags};
use stead_schemas::names::{Name, Uid};
use stead_schemas::numbers::Generation;
use stead_schemas::references::{Ref, Role, WokenBy};
use tokio::time::sleep;

use crate::daemon::Daemon;

/// Time in which all requested work is done, in virtual time.
const DONE: Duration = Duration::from_secs(30);
/// Limit on the existing files that a new kind touches.
const TOUCHED_MAX: usize = 6;
/// The files that name a kind, as the documentation of this file lists them.
const TOUCHED: [&str; TOUCHED_MAX] = [
    "controllers/src/daemon.rs",
    "controllers/src/lib.rs",
    "schemas/src/api/mod.rs",
    "schemas/src/lib.rs",
    "src/api/mod.rs",
    "src/api/table.rs",
];
/// Files that name the schedule for more than its being a kind, each with its reason.
const MORE_THAN_A_KIND: [(&str, &str); 4] = [
    ("controllers/src/checks/mod.rs", "invariants of schedules"),
    ("schemas/src/snapshot.rs", "a snapshot records the schedule that took it"),
    ("src/cli/mod.rs", "verbs of the command line"),
    ("src/cli/snapshots.rs", "verbs of the command line"),
];
/// Words by which code names the schedule.
const NAMES_OF_SCHEDULES: [&str; 4] =
    ["SnapshotSchedule", "ScheduleReconciler", "mod schedule", "schedules::"];

/// The kind of beacons.
#[derive(Debug, Clone, PartialEq)]
enum Beacon {}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct BeaconSpec {
    /// The beacon is lit while this instance runs.
    instance: Uid,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct BeaconStatus {
    is_lit: bool,
    conditions: Vec<Condition>,
    observed_generation: Generation,
}

impl Kind for Beacon {
    const NAME: &'static str = "beacon";
    const FINALIZER: &'static str = "beacon";
    type Spec = BeaconSpec;
    type Status = BeaconStatus;
    const WOKEN_BY: &'static [WokenBy] = &[WokenBy::Target(Role::Source)];

    fn observed_generation(status: &BeaconStatus) -> Option<Generation> {
        Some(status.observed_generation)
    }

    fn references(object: &Object<Self>) -> Vec<Ref> {
        vec![Ref::to::<Instance>(Role::Source, &object.spec.instance)]
    }
}

/// The host of beacons: the uids of those that are lit.
#[derive(Debug, Clone, Default)]
struct Lights(Arc<Mutex<BTreeSet<Uid>>>);

impl Lights {
    fn lock(&self) -> MutexGuard<'_, BTreeSet<Uid>> {
        self.0.lock().expect("no panic holds it")
    }
}

struct BeaconReconciler {
    store: Store,
    lights: Lights,
}

#[derive(Debug, Clone, PartialEq)]
enum Step {
    Light(Uid),
    PutOut(Uid),
}

impl Action for Step {
    const NAMES: &'static [&'static str] = &["Light", "PutOut"];

    fn name(&self) -> &'static str {
        match self {
            Self::Light(_) => Self::NAMES[0],
            Self::PutOut(_) => Self::NAMES[1],
        }
    }
}

#[derive(Debug)]
struct Observed {
    uid: Uid,
    is_lit: bool,
    is_instance_running: bool,
}

impl Reconciler for BeaconReconciler {
    type Kind = Beacon;
    type Observed = Observed;
    type Action = Step;

    async fn observe(&self, uid: &Uid, object: Option<&Object<Beacon>>) -> Result<Observed, HostError> {
        let instance = object.and_then(|object| self.store.get::<Instance>(&object.spec.instance));
        Ok(Observed {
            uid: uid.clone(),
            is_lit: self.lights.lock().contains(uid),
            is_instance_running: instance.is_some_and(|instance| instance.status.state == State::Running),
        })
    }

    fn plan(desired: &Desired<'_, Beacon>, seen: &Observed, _: Moment) -> Plan<Step> {
        let is_wanted = matches!(desired, Desired::Present(_)) && seen.is_instance_running;
        match (is_wanted, seen.is_lit) {
            (true, false) => Plan::Act(vec![Step::Light(seen.uid.clone())]),
            (false, true) => Plan::Act(vec![Step::PutOut(seen.uid.clone())]),
            _ => Plan::Converged,
        }
    }

    async fn act(&self, step: &Step) -> Result<(), HostError> {
        match step {
            Step::Light(uid) => self.lights.lock().insert(uid.clone()),
            Step::PutOut(uid) => self.lights.lock().remove(uid),
        };
        Ok(())
    }

    fn status(object: &Object<Beacon>, seen: Option<&Observed>, end: &PassEnd) -> BeaconStatus {
        let generation = object.meta.generation;
        BeaconStatus {
            is_lit: seen.map_or(object.status.is_lit, |seen| seen.is_lit),
            conditions: conditions::standard(&object.status.conditions, generation, end),
            observed_generation: generation,
        }
    }

    async fn owned(&self) -> Result<Vec<Uid>, HostError> {
        Ok(self.lights.lock().iter().cloned().collect())
    }
}

/// Starts the daemon with the reconciler of beacons beside its own.
async fn start(world: &World, kv: &MemoryKv, lights: &Lights) -> Daemon {
    let kinds = stead_controllers::kinds().with::<Beacon>();
    let mut daemon = Daemon::start_with_kinds(world, kv, kinds).await;
    let (store, clock) = (daemon.store.clone(), Arc::new(world.clone()));
    let reconciler = BeaconReconciler { store: store.clone(), lights: lights.clone() };
    let config = RunnerConfig::seeded(1);
    let runner = Runner::new(reconciler, store, clock, Arc::new(NoBoundary), config);
    daemon.spawn(runner.run(std::future::pending()));
    daemon
}

async fn create_instance(world: &World, store: &Store) -> Uid {
    let digest = format!("sha256:{}", "a".repeat(64)).parse().expect("valid");
    let config = ImageConfig { cmd: vec!["serve".to_owned()], ..ImageConfig::default() };
    world.serve(&"sim/a".parse().expect("valid"), SimRegistryImage { digest, config });
    let node = local(store).expect("declared");
    let body = serde_json::json!({ "name": "i", "image": "sim/a", "size": "256MB" });
    let asked = InstanceRequest::read(body, &node.offer()).expect("valid");
    let created = store.transact(move |tx| admission::create(tx, asked, "st")).await;
    created.expect("created").meta.uid.clone()
}

async fn create_beacon(store: &Store, instance: Uid) -> Uid {
    let name = Name::resource("beacon").expect("valid");
    let new =
        New::<Beacon> { uid: None, name, tags: Tags::new(), owner: None, spec: BeaconSpec { instance } };
    store.transact(move |tx| tx.create(new)).await.expect("created").meta.uid.clone()
}

fn status(store: &Store, beacon: &Uid) -> BeaconStatus {
    store.get::<Beacon>(beacon).expect("stored").status.clone()
}

fn broken(world: &World, store: &Store) -> Vec<String> {
    checks::settled(&Records::of(store), &world.snapshot(), Timestamp::MAX)
}

#[tokio::test(start_paused = true)]
async fn a_kind_of_the_tests_runs_beside_all_others() {
    let (world, kv, lights) = (World::new(1), MemoryKv::new(), Lights::default());
    let mut daemon = start(&world, &kv, &lights).await;
    let instance = create_instance(&world, &daemon.store).await;
    let beacon = create_beacon(&daemon.store, instance.clone()).await;
    sleep(DONE).await;
    let lit = status(&daemon.store, &beacon);
    assert!(lit.is_lit && is_ready(&lit.conditions), "{lit:?}");
    assert_eq!(*lights.lock(), BTreeSet::from([beacon.clone()]));

    let stopped = instance.clone();
    daemon.store.transact(move |tx| admission::stop(tx, &stopped)).await.expect("requested");
    sleep(DONE).await;
    assert!(!status(&daemon.store, &beacon).is_lit, "a change of the instance wakes the beacon");
    assert_eq!(broken(&world, &daemon.store), Vec::<String>::new());

    // A later daemon reads the record, and finds the light again.
    daemon
        .store
        .transact(move |tx| admission::start(tx, &instance, InstanceStart::default()))
        .await
        .expect("requested");
    sleep(DONE).await;
    daemon.die(&world).await;
    let daemon = start(&world, &kv.reopen(), &lights).await;
    let deleted = beacon.clone();
    let request = daemon.store.transact(move |tx| tx.request_deletion::<Beacon>(&deleted));
    request.await.expect("requested");
    sleep(DONE).await;
    assert_eq!(*lights.lock(), BTreeSet::new());
    assert!(
        daemon.store.get::<Beacon>(&beacon).is_none(),
        "the finalizer is removed, and the record with it"
    );
    assert_eq!(broken(&world, &daemon.store), Vec::<String>::new());
}

/// Lists the source files below a folder.
fn files_below(folder: &Path, files: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).expect("the folder is there").flatten() {
        let path = entry.path();
        if path.is_dir() {
            files_below(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let path = path.strip_prefix(env!("CARGO_MANIFEST_DIR")).expect("below the root");
            files.insert(path.to_string_lossy().into_owned());
        }
    }
}

#[test]
fn a_new_kind_touches_six_files() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = BTreeSet::new();
    for folder in ["schemas/src", "controllers/src", "src"] {
        files_below(&root.join(folder), &mut files);
    }
    let read = |path: &str| std::fs::read_to_string(root.join(path)).expect("sources are UTF-8");
    let names_schedules = |path: &&String| {
        let text = read(path);
        NAMES_OF_SCHEDULES.iter().any(|name| text.contains(name))
    };
    // The schedule's own files have its name.
    let existing = files.iter().filter(|path| !path.contains("schedule")).filter(names_schedules);
    let is_kind_only = |path: &&str| MORE_THAN_A_KIND.iter().all(|(other, _)| other != path);
    let touched: Vec<&str> = existing.map(String::as_str).filter(is_kind_only).collect();
    assert_eq!(touched, TOUCHED);
    let documentation = read("tests/sim/toy_kind.rs");
    for path in TOUCHED {
        assert!(documentation.contains(&format!("//! {path} ")), "{path} is not in the list above");
    }
}
