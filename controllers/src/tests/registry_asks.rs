//! Tests of how often a registry is asked, in virtual time: because of an image's own failures, and because
//! of changes of other objects.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use jiff::Timestamp;
use stead_schemas::image::{Image, ImagePhase};
use stead_schemas::instance::{Instance, Power};
use stead_schemas::meta::{Object, Tags};
use stead_schemas::names::{Digest, ImageRef, Name, Platform, Uid};
use stead_schemas::snapshot::Snapshot;
use tokio::time::sleep;

use crate::host::{HostError, HostErrorKind, ImageJobs, Images, Job, Layer, Resolved, StoredImage};
use crate::image::{ImageReconciler, admission};
use crate::runtime::{Drift, NoBoundary, Runner, RunnerConfig, SequentialIds, TokioClock};
use crate::sim;
use crate::store::{Kinds, MemoryKv, New, PlainSealer, Store};
use crate::vm::tests::instance;

#[derive(Debug, Default)]
struct Counted {
    asked: BTreeMap<String, usize>,
    /// Owners whose result can be taken.
    answered: BTreeSet<Uid>,
    forgotten: BTreeSet<Uid>,
    /// The content that each tag resolves to; the content on disk is in `here`.
    tags: BTreeMap<String, Digest>,
    here: BTreeSet<Digest>,
}

/// A registry that has `here` and decides its other results by name. Results arrive in the background.
#[derive(Debug, Clone, Default)]
struct Registry(Arc<Mutex<Counted>>);

impl Registry {
    fn lock(&self) -> MutexGuard<'_, Counted> {
        self.0.lock().expect("no panic holds it")
    }

    fn asked(&self, name: &str) -> usize {
        self.lock().asked.get(name).copied().unwrap_or(0)
    }
}

fn digest(fill: char) -> Digest {
    format!("sha256:{}", fill.to_string().repeat(64)).parse().expect("valid")
}

impl Images for Registry {
    async fn list(&self) -> Result<Vec<Digest>, HostError> {
        self.known().await
    }
    async fn known(&self) -> Result<Vec<Digest>, HostError> {
        Ok(self.lock().here.iter().cloned().collect())
    }
    async fn inspect(&self, digest: &Digest) -> Result<Option<StoredImage>, HostError> {
        let stored =
            StoredImage { digest: digest.clone(), size: Default::default(), config: Default::default() };
        Ok(self.lock().here.contains(digest).then_some(stored))
    }
    async fn manifest(&self, digest: &Digest) -> Result<Option<Resolved>, HostError> {
        Ok(Some(Resolved { digest: digest.clone(), layers: Vec::<Layer>::new() }))
    }
    async fn remove(
        &self,
        digest: &Digest,
        is_referenced: Box<dyn FnOnce() -> bool + Send>,
    ) -> Result<(), HostError> {
        if !is_referenced() {
            self.lock().here.remove(digest);
        }
        Ok(())
    }
}

impl ImageJobs for Registry {
    async fn resolve(
        &self,
        owner: &Uid,
        reference: &ImageRef,
        _: Platform,
        _: u64,
    ) -> Result<Option<Resolved>, HostError> {
        let name = reference.repository.rsplit('/').next().unwrap_or_default().to_owned();
        let mut counted = self.lock();
        if counted.answered.insert(owner.clone()) {
            *counted.asked.entry(name).or_default() += 1;
            return Ok(None);
        }
        counted.answered.remove(owner);
        let failed = |kind| Err(HostError::new(kind, "resolve", reference.to_string()));
        match name.as_str() {
            "missing" => failed(HostErrorKind::Missing),
            "denied" => failed(HostErrorKind::Denied),
            "down" => failed(HostErrorKind::Transient),
            _ => Ok(counted.tags.get(&name).cloned().map(|digest| Resolved { digest, layers: Vec::new() })),
        }
    }
    async fn job(&self, _: &Uid, _: &Digest) -> Option<Job> {
        None
    }
    async fn fetch(&self, _: &Uid, _: &ImageRef, _: &Digest) -> Result<(), HostError> {
        Ok(())
    }
    async fn convert(&self, _: &Uid, digest: &Digest) -> Result<(), HostError> {
        self.lock().here.insert(digest.clone());
        Ok(())
    }
    async fn forget(&self, owner: &Uid) -> Result<(), HostError> {
        let mut counted = self.lock();
        counted.answered.remove(owner);
        counted.forgotten.insert(owner.clone());
        Ok(())
    }
    async fn is_busy(&self, owner: &Uid) -> bool {
        self.lock().answered.contains(owner)
    }
    async fn owners(&self) -> Result<Vec<Uid>, HostError> {
        Ok(self.lock().answered.iter().cloned().collect())
    }
}

/// A host whose images come from the counted registry.
#[derive(Clone)]
struct Asked {
    images: Registry,
    rest: sim::World,
}

crate::host! { Asked, host:
    Images, ImageJobs: Registry = host.images;
    ..sim::World = host.rest;
}

struct World {
    store: Store,
    registry: Registry,
    drift: Drift,
}

impl World {
    fn start() -> Self {
        let clock = Arc::new(TokioClock::starting_at(Timestamp::UNIX_EPOCH));
        let kinds = Kinds::new().with::<Image>().with::<Instance>().with::<Snapshot>();
        let ids = Arc::new(SequentialIds::default());
        let (store, writer) =
            Store::open(MemoryKv::new(), Arc::new(PlainSealer), clock.clone(), ids, kinds).expect("opened");
        tokio::spawn(writer.run(std::future::pending()));
        let registry = Registry::default();
        let reconciler = ImageReconciler {
            host: Asked { images: registry.clone(), rest: sim::World::new(1) },
            store: store.clone(),
        };
        let config = RunnerConfig::seeded(1);
        let runner = Runner::new(reconciler, store.clone(), clock, Arc::new(NoBoundary), config);
        let drift = runner.drift();
        let for_freed_images = store.clone();
        let runner = runner.map(move |event| crate::image::freed(&for_freed_images, event));
        tokio::spawn(runner.run(std::future::pending()));
        Self { store, registry, drift }
    }

    async fn post(&self, name: &str) -> Uid {
        let reference: ImageRef = name.parse().expect("a reference");
        let posted = move |tx: &mut crate::store::Tx<'_>| {
            admission::create(tx, &reference, Platform::LinuxAmd64, None)
        };
        self.store.transact(posted).await.expect("stored").meta.uid.clone()
    }

    /// Creates and removes an instance of the image with this content.
    async fn come_and_go(&self, image: &Uid, content: Option<Digest>) {
        let Object { mut spec, mut status, .. } = instance(Power::Running, 1, 0);
        spec.allocated.image = image.clone();
        status.image_digest = content;
        let name = Name::resource("guest").expect("a name");
        let new = New::<Instance> { uid: None, name, tags: Tags::new(), owner: None, spec };
        let uid = self.store.transact(move |tx| tx.create(new)).await.expect("stored").meta.uid.clone();
        self.store.write_status::<Instance>(&uid, status).await.expect("stored");
        let deleted = uid.clone();
        let deletion = self.store.transact(move |tx| tx.request_deletion::<Instance>(&deleted)).await;
        deletion.expect("stored");
        self.store.remove_finalizer::<Instance>(&uid).await.expect("stored");
        assert!(self.store.get::<Instance>(&uid).is_none());
    }

    /// Advances virtual time and announces the registry's results as the adapter does.
    async fn pass_time(&self, time: Duration) {
        let step = Duration::from_millis(100);
        let mut left = time;
        while !left.is_zero() {
            let answered: Vec<Uid> = self.registry.lock().answered.iter().cloned().collect();
            answered.into_iter().for_each(|owner| self.drift.object(owner));
            sleep(step).await;
            left = left.saturating_sub(step);
        }
    }

    fn phase(&self, name: &str) -> ImagePhase {
        let reference: ImageRef = name.parse().expect("a reference");
        let image = self.store.find::<Image>(&Name::from(&reference)).expect("stored");
        image.status.phase
    }
}

#[tokio::test(start_paused = true)]
async fn failed_images_do_not_wake_each_other_and_answers_rest() {
    let world = World::start();
    for name in ["missing", "denied", "down"] {
        world.post(name).await;
    }
    world.pass_time(Duration::from_secs(600)).await;
    assert_eq!((world.registry.asked("missing"), world.registry.asked("denied")), (1, 1));
    let down = world.registry.asked("down");
    assert!((10..40).contains(&down), "its delay grows to half a minute: asked {down} times in 10 min");
    assert_eq!(world.phase("missing"), ImagePhase::Failed);
    world.post("missing").await;
    world.pass_time(Duration::from_secs(5)).await;
    assert_eq!(world.registry.asked("missing"), 2, "posted again, it is asked for at once");
    world.pass_time(Duration::from_secs(3700)).await;
    assert_eq!(world.registry.asked("missing"), 3, "and once an hour");
}

#[tokio::test(start_paused = true)]
async fn a_tag_that_was_moved_is_what_a_new_post_brings() {
    let world = World::start();
    world.registry.lock().tags.insert("app".to_owned(), digest('a'));
    let uid = world.post("app").await;
    world.pass_time(Duration::from_secs(5)).await;
    let meant = || world.store.get::<Image>(&uid).expect("stored").status.digest.clone();
    assert_eq!((meant(), world.phase("app")), (Some(digest('a')), ImagePhase::Ready));
    world.registry.lock().tags.insert("app".to_owned(), digest('b'));
    world.pass_time(Duration::from_secs(600)).await;
    assert_eq!((meant(), world.registry.asked("app")), (Some(digest('a')), 1), "nobody asked");
    world.post("app").await;
    world.pass_time(Duration::from_secs(5)).await;
    assert_eq!((meant(), world.phase("app")), (Some(digest('b')), ImagePhase::Ready));
    assert_eq!(world.registry.lock().here, BTreeSet::from([digest('b')]), "what it meant is collected");
}

#[tokio::test(start_paused = true)]
async fn instances_that_go_wake_no_image_that_fails_and_their_content_is_collected() {
    let world = World::start();
    let uid = world.post("denied").await;
    world.pass_time(Duration::from_secs(5)).await;
    for content in [None, Some(digest('a'))] {
        for _ in 0..20 {
            world.come_and_go(&uid, content.clone()).await;
        }
    }
    world.registry.lock().here.insert(digest('a'));
    world.come_and_go(&uid, Some(digest('a'))).await;
    world.pass_time(Duration::from_secs(5)).await;
    assert_eq!(world.registry.asked("denied"), 1);
    assert_eq!(world.registry.lock().here, BTreeSet::new(), "nothing referred to it any more");
}

#[tokio::test(start_paused = true)]
async fn what_goes_on_for_a_deleted_image_is_ended() {
    let world = World::start();
    let uid = world.post("unknown").await;
    // The result for it never arrives.
    sleep(Duration::from_secs(1)).await;
    let deleted = uid.clone();
    world.store.transact(move |tx| admission::delete(tx, &deleted)).await.expect("stored");
    sleep(Duration::from_secs(1)).await;
    assert!(world.registry.lock().forgotten.contains(&uid));
    assert!(world.store.get::<Image>(&uid).is_none());
}

#[tokio::test(start_paused = true)]
async fn what_goes_on_for_a_name_that_is_pointed_elsewhere_is_ended() {
    let world = World::start();
    let uid = world.post("unknown").await;
    sleep(Duration::from_secs(1)).await;
    world.registry.lock().here.insert(digest('a'));
    let target: ImageRef = "unknown".parse().expect("a reference");
    let point =
        move |tx: &mut crate::store::Tx<'_>| admission::point(tx, &target, Platform::LinuxAmd64, digest('a'));
    world.store.transact(point).await.expect("stored");
    sleep(Duration::from_secs(1)).await;
    assert!(world.registry.lock().forgotten.contains(&uid));
    assert_eq!(world.phase("unknown"), ImagePhase::Ready);
}
