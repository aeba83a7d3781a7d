//! No-op passes per second: our runner against the machinery of kube-runtime's `Controller`, each over 10,000 objects
//! in memory that are reconciled repeatedly.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::channel::mpsc;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::ObjectMeta;
use kube::runtime::controller::{Action, Config, applier};
use kube::runtime::reflector::{ObjectRef, store};
use kube::runtime::watcher::Event;
use stead_controllers::host::HostError;
use stead_controllers::runtime::{
    Desired, Moment, NoBoundary, PassEnd, Plan, Reconciler, Runner, RunnerConfig, SequentialIds, TokioClock,
};
use stead_controllers::store::{Kinds, MemoryKv, New, PlainSealer, Store, TxError};
use stead_schemas::disk::{Disk, DiskPurpose, DiskSpec, DiskStatus};
use stead_schemas::meta::Object;
use stead_schemas::names::{Name, Uid};
use stead_schemas::quantity::Bytes;
use tokio::sync::Notify;

use crate::{Figure, median};

const OBJECTS: u64 = 10_000;
const ROUNDS: u64 = 20;
const REPEATS: usize = 5;

/// A counter of passes that notifies when a round is complete.
#[derive(Default)]
struct Count {
    passes: AtomicU64,
    target: AtomicU64,
    reached: Notify,
}

impl Count {
    fn pass(&self) {
        let passes = self.passes.fetch_add(1, Ordering::Relaxed) + 1;
        if passes == self.target.load(Ordering::Relaxed) {
            self.reached.notify_one();
        }
    }

    /// Sets the next round's end.
    fn expect(&self, more: u64) {
        self.target.store(self.passes.load(Ordering::Relaxed) + more, Ordering::Relaxed);
    }
}

struct Nothing(Arc<Count>);

/// A step type without values, because there is no step.
#[derive(Debug, Clone, PartialEq, strum::IntoStaticStr, strum::VariantNames)]
enum Step {}

impl Reconciler for Nothing {
    type Kind = Disk;
    type Observed = ();
    type Action = Step;

    async fn observe(&self, _: &Uid, _: Option<&Object<Disk>>) -> Result<(), HostError> {
        self.0.pass();
        Ok(())
    }
    fn plan(_: &Desired<'_, Disk>, (): &(), _: Moment) -> Plan<Step> {
        Plan::Converged
    }
    async fn act(&self, step: &Step) -> Result<(), HostError> {
        match *step {}
    }
    fn status(object: &Object<Disk>, _: Option<&()>, _: &PassEnd) -> DiskStatus {
        object.status.clone()
    }
    async fn owned(&self) -> Result<Vec<Uid>, HostError> {
        Ok(Vec::new())
    }
}

async fn ours() -> f64 {
    let clock = Arc::new(TokioClock::starting_at(Timestamp::UNIX_EPOCH));
    let kinds = Kinds::new().with::<Disk>();
    let ids = Arc::new(SequentialIds::default());
    let opened = Store::open(MemoryKv::new(), Arc::new(PlainSealer), clock.clone(), ids, kinds);
    let (store, writer) = opened.expect("opened");
    let writer = tokio::spawn(writer.run(std::future::pending::<()>()));
    for _ in 0..OBJECTS / 100 {
        let made = store.transact(|tx| {
            for _ in 0..100 {
                let uid = tx.next_uid();
                let spec = DiskSpec::empty(Bytes(1 << 30), DiskPurpose::RootOverlay);
                let name = Name::from(&uid);
                tx.create::<Disk>(New { uid: Some(uid), name, tags: BTreeMap::new(), owner: None, spec })?;
            }
            Ok::<(), TxError>(())
        });
        made.await.expect("stored");
    }
    let count = Arc::new(Count::default());
    let config = RunnerConfig { resync: Duration::from_secs(3600), ..RunnerConfig::seeded(1) };
    let runner = Runner::new(Nothing(count.clone()), store, clock, Arc::new(NoBoundary), config);
    let drift = runner.drift();
    count.expect(OBJECTS);
    let runner = tokio::spawn(runner.run(std::future::pending::<()>()));
    count.reached.notified().await;
    let start = Instant::now();
    for _ in 0..ROUNDS {
        count.expect(OBJECTS);
        drift.everything();
        count.reached.notified().await;
    }
    let rate = rate(start);
    runner.abort();
    writer.abort();
    rate
}

async fn theirs() -> f64 {
    let (reader, mut writer) = store::<ConfigMap>();
    writer.apply_watcher_event(&Event::Init);
    let mut keys = Vec::new();
    for number in 0..OBJECTS {
        let metadata = ObjectMeta {
            name: Some(format!("o{number}")),
            namespace: Some("n".to_owned()),
            ..ObjectMeta::default()
        };
        let object = ConfigMap { metadata, ..ConfigMap::default() };
        keys.push(ObjectRef::from_obj(&object));
        writer.apply_watcher_event(&Event::InitApply(object));
    }
    writer.apply_watcher_event(&Event::InitDone);
    let count = Arc::new(Count::default());
    let (send, queue) = mpsc::unbounded();
    let for_pass = count.clone();
    let applied = applier(
        move |_: Arc<ConfigMap>, _: Arc<()>| {
            for_pass.pass();
            std::future::ready(Ok::<Action, Infallible>(Action::await_change()))
        },
        |_, _, _| Action::await_change(),
        Arc::new(()),
        reader,
        queue.map(Ok::<ObjectRef<ConfigMap>, Infallible>),
        Config::default(),
    );
    let machinery = tokio::spawn(applied.for_each(|_| std::future::ready(())));
    let round = || {
        count.expect(OBJECTS);
        keys.iter().for_each(|key| drop(send.unbounded_send(key.clone())));
    };
    round();
    count.reached.notified().await;
    let start = Instant::now();
    for _ in 0..ROUNDS {
        round();
        count.reached.notified().await;
    }
    let rate = rate(start);
    machinery.abort();
    rate
}

fn rate(start: Instant) -> f64 {
    let passes = u32::try_from(OBJECTS * ROUNDS).map_or(f64::MAX, f64::from);
    passes / start.elapsed().as_secs_f64()
}

pub(crate) async fn passes() -> Figure {
    let (mut ours_all, mut theirs_all) = (Vec::new(), Vec::new());
    for _ in 0..REPEATS {
        ours_all.push(ours().await);
        theirs_all.push(theirs().await);
    }
    Figure {
        what: "no-op passes over 10,000 objects (peer: kube-runtime applier)".to_owned(),
        ours: median(ours_all),
        peer: Some(median(theirs_all)),
        unit: "passes/s",
        goal: ">= 1",
    }
}
