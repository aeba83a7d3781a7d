//! Ways in which a change of one object wakes another, on toy kinds.

use std::slice::from_ref;

use serde::{Deserialize, Serialize};
use stead_schemas::meta::{Kind, Object, OwnerRef, Tags};
use stead_schemas::names::{Name, Uid};
use stead_schemas::references::{Ref, Role, WokenBy};

use crate::runtime::dependents::dependents;
use crate::store::tests::opened;
use crate::store::{Event, Kinds, New, Store, Watch};

/// A thing that keys refer to.
#[derive(Debug, Clone, PartialEq)]
enum Lock {}

impl Kind for Lock {
    const NAME: &'static str = "lock";
    const FINALIZER: &'static str = "lock";
    type Spec = ();
    type Status = u32;
    const WOKEN_BY: &'static [WokenBy] = &[
        WokenBy::Referrer(Role::Schedule),
        WokenBy::Gain(Role::Attaches),
        WokenBy::Release(Role::AwaitsCopy),
        WokenBy::Release(Role::Owner),
    ];
}

/// A thing that refers to locks.
#[derive(Debug, Clone, PartialEq)]
enum Key {}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct KeySpec {
    schedule: Option<Uid>,
    attaches: Option<Uid>,
    awaits: Option<Uid>,
    image: Option<Uid>,
    writes: Option<Uid>,
    reads: Option<Uid>,
}

impl Kind for Key {
    const NAME: &'static str = "key";
    const FINALIZER: &'static str = "key";
    type Spec = KeySpec;
    type Status = u32;
    const WOKEN_BY: &'static [WokenBy] = &[
        WokenBy::Target(Role::Image),
        WokenBy::Owner,
        WokenBy::Departure { left: Role::Writes, waits: Role::Reads },
    ];

    fn references(object: &Object<Self>) -> Vec<Ref> {
        let spec = &object.spec;
        let all = [
            (Role::Schedule, &spec.schedule),
            (Role::Attaches, &spec.attaches),
            (Role::AwaitsCopy, &spec.awaits),
            (Role::Image, &spec.image),
            (Role::Writes, &spec.writes),
            (Role::Reads, &spec.reads),
        ];
        all.into_iter().filter_map(|(role, uid)| Some(Ref::to::<Lock>(role, uid.as_ref()?))).collect()
    }
}

struct Site {
    store: Store,
    watch: Watch,
}

impl Site {
    fn new() -> Self {
        let store = opened(Kinds::new().with::<Lock>().with::<Key>());
        let watch = store.watch(None, store.revision()).expect("current");
        Self { store, watch }
    }

    async fn create<K: Kind>(&mut self, name: &str, owner: Option<OwnerRef>, spec: K::Spec) -> Uid {
        let name = Name::resource(name).expect("valid");
        let new = New::<K> { uid: None, name, tags: Tags::new(), owner, spec };
        let made = self.store.transact(move |tx| tx.create::<K>(new)).await.expect("created");
        made.meta.uid.clone()
    }

    async fn lock(&mut self, name: &str) -> Uid {
        let uid = self.create::<Lock>(name, None, ()).await;
        self.event().await;
        uid
    }

    async fn key(&mut self, name: &str, spec: KeySpec) -> (Uid, Event) {
        let uid = self.create::<Key>(name, None, spec).await;
        (uid, self.event().await)
    }

    async fn change(&mut self, key: &Uid, spec: KeySpec) -> Event {
        let key = key.clone();
        let changed = self.store.transact(move |tx| tx.update_spec::<Key>(&key, None, |old| *old = spec));
        changed.await.expect("changed");
        self.event().await
    }

    async fn event(&mut self) -> Event {
        self.watch.next().await.expect("not too old")
    }

    fn locks(&self, event: &Event) -> Vec<Uid> {
        dependents::<Lock>(&self.store, event)
    }

    fn keys(&self, event: &Event) -> Vec<Uid> {
        dependents::<Key>(&self.store, event)
    }
}

#[tokio::test(start_paused = true)]
async fn a_change_of_a_target_wakes_what_refers_to_it_in_that_role_only() {
    let mut site = Site::new();
    let lock = site.lock("l").await;
    let (key, _) = site.key("k", KeySpec { image: Some(lock.clone()), ..KeySpec::default() }).await;
    site.key("other", KeySpec { reads: Some(lock.clone()), ..KeySpec::default() }).await;
    assert!(site.store.write_status::<Lock>(&lock, 7).await.expect("written"));
    let event = site.event().await;
    assert_eq!((site.keys(&event), site.locks(&event)), (vec![key], vec![]));
}

#[tokio::test(start_paused = true)]
async fn a_reference_that_begins_lasts_or_ends_wakes_its_target_as_the_target_declares() {
    let mut site = Site::new();
    let lock = site.lock("l").await;
    let here = || Some(lock.clone());
    let nothing: Vec<Uid> = Vec::new();
    let (key, event) = site.key("k", KeySpec { schedule: here(), ..KeySpec::default() }).await;
    assert_eq!(site.locks(&event), from_ref(&lock), "a new referrer");
    assert!(site.store.write_status::<Key>(&key, 1).await.expect("written"));
    let event = site.event().await;
    assert_eq!(site.locks(&event), from_ref(&lock), "a change of a referrer");
    let event = site.change(&key, KeySpec { attaches: here(), ..KeySpec::default() }).await;
    assert_eq!(site.locks(&event), [lock.clone(), lock.clone()], "one reference ended, another began");
    let event = site.change(&key, KeySpec { awaits: here(), ..KeySpec::default() }).await;
    assert_eq!(site.locks(&event), nothing, "neither the end of the one nor the beginning of the other");
    let event = site.change(&key, KeySpec::default()).await;
    assert_eq!(site.locks(&event), [lock]);
}

#[tokio::test(start_paused = true)]
async fn a_departure_wakes_those_that_wait_for_it() {
    let mut site = Site::new();
    let (lock, elsewhere) = (site.lock("l").await, site.lock("m").await);
    let (writer, _) = site.key("w", KeySpec { writes: Some(lock.clone()), ..KeySpec::default() }).await;
    let (reader, _) = site.key("r", KeySpec { reads: Some(lock.clone()), ..KeySpec::default() }).await;
    site.key("s", KeySpec { reads: Some(elsewhere), ..KeySpec::default() }).await;
    let event = site.change(&writer, KeySpec::default()).await;
    assert_eq!(site.keys(&event), [reader]);
}

#[tokio::test(start_paused = true)]
async fn an_owner_and_what_it_owns_wake_each_other_where_that_is_declared() {
    let mut site = Site::new();
    let lock = site.lock("l").await;
    let owner = OwnerRef { kind: Lock::NAME.to_owned(), uid: lock.clone() };
    let key = site.create::<Key>("k", Some(owner), KeySpec::default()).await;
    let event = site.event().await;
    assert_eq!(site.locks(&event), from_ref(&lock), "what it owns always wakes an owner");
    assert!(site.store.write_status::<Lock>(&lock, 7).await.expect("written"));
    let event = site.event().await;
    assert_eq!(site.keys(&event), from_ref(&key));
    let (at, name) = (key.clone(), Name::resource("free").expect("valid"));
    let released = site.store.transact(move |tx| tx.release_as::<Key>(&at, name, Tags::new()));
    released.await.expect("released");
    let event = site.event().await;
    assert_eq!(site.locks(&event), [lock], "it lost what it owned");
}
