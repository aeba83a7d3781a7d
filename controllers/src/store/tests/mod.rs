//! Tests of the store as a whole: rules, durability, watches, and a model under random histories.

mod model;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;
use proptest::prelude::*;
use serde::{Deserialize, Serialize};
use stead_schemas::limits;
use stead_schemas::meta::{OwnerRef, Tags};
use stead_schemas::numbers::Generation;
use tokio::task::JoinHandle;

use super::*;
use crate::runtime::{SequentialIds, TokioClock};

macro_rules! kind {
    ($name:ident, $text:literal) => {
        #[derive(Debug, Clone, PartialEq)]
        enum $name {}
        impl Kind for $name {
            const NAME: &'static str = $text;
            const FINALIZER: &'static str = $text;
            type Spec = Spec;
            type Status = Status;
        }
    };
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Spec {
    value: u32,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Status {
    seen: u32,
}

kind!(House, "house");
kind!(Room, "room");

type Refusal = TxError;

fn name(text: &str) -> Name {
    Name::resource(text).expect("a valid name")
}

fn new<K: Kind<Spec = Spec>>(text: &str) -> New<K> {
    New { uid: None, name: name(text), tags: Tags::new(), owner: None, spec: Spec { value: 1 } }
}

fn open_at(kv: MemoryKv, first_id: u64) -> Result<(Store, JoinHandle<()>), StoreError> {
    let clock = Arc::new(TokioClock::starting_at(Timestamp::UNIX_EPOCH));
    let ids = Arc::new(SequentialIds::starting_at(first_id));
    let kinds = Kinds::new().with::<House>().with::<Room>();
    let (store, writer) = Store::open(kv, Arc::new(PlainSealer), clock, ids, kinds)?;
    Ok((store, tokio::spawn(writer.run(std::future::pending()))))
}

fn open(kv: &MemoryKv) -> Store {
    open_at(kv.clone(), 0).expect("the store opens").0
}

async fn create(store: &Store, text: &str) -> Result<Arc<Object<House>>, TransactError<Refusal>> {
    let new = new::<House>(text);
    store.transact(move |tx| tx.create(new)).await
}

async fn delete(store: &Store, uid: &Uid) {
    let uid = uid.clone();
    store.transact(move |tx| tx.request_deletion::<House>(&uid)).await.expect("deletion is stored");
}

#[tokio::test]
async fn names_are_unique_among_live_objects_and_free_once_deletion_is_requested() {
    let store = open(&MemoryKv::new());
    let first = create(&store, "a").await.expect("free");
    let taken = TxError::NameTaken { kind: "house", name: name("a"), by: first.meta.uid.clone() };
    assert_eq!(create(&store, "a").await, Err(TransactError::Refused(taken)));
    let room = new::<Room>("a");
    store.transact(move |tx| tx.create(room)).await.expect("names are per kind");

    delete(&store, &first.meta.uid).await;
    assert_eq!(store.find::<House>(&name("a")), None);
    let second = create(&store, "a").await.expect("free again");
    assert_eq!(store.find::<House>(&name("a")).as_deref(), Some(&*second));
    assert!(store.get::<House>(&first.meta.uid).expect("kept").meta.is_deleting());
    delete(&store, &first.meta.uid).await;
    assert_eq!(store.find::<House>(&name("a")).as_deref(), Some(&*second), "asking again frees no name");
    assert!(store.remove_finalizer::<House>(&first.meta.uid).await.expect("stored"));
    assert_eq!(store.find::<House>(&name("a")).as_deref(), Some(&*second));
    assert_eq!(store.count::<House>(), 1);
}

#[tokio::test]
async fn generation_moves_with_the_spec_only_and_versions_with_every_write() {
    let store = open(&MemoryKv::new());
    let uid = create(&store, "a").await.expect("created").meta.uid.clone();
    let meta = |store: &Store| store.get::<House>(&uid).expect("there").meta.clone();
    let first = meta(&store);
    assert_eq!((first.generation, first.finalizers.len()), (Generation(1), 1));

    assert_eq!(store.write_status::<House>(&uid, Status { seen: 3 }).await, Ok(true));
    assert_eq!(store.write_status::<House>(&uid, Status { seen: 3 }).await, Ok(false));
    let second = meta(&store);
    assert_eq!(second.generation, Generation(1));
    assert!(second.resource_version > first.resource_version);

    let at = uid.clone();
    let same = store.transact(move |tx| tx.update_spec::<House>(&at, None, |spec| spec.value = 1)).await;
    assert_eq!(same.expect("fine").meta, second, "an equal spec is no write");
    let (at, expected) = (uid.clone(), second.resource_version);
    let changed =
        store.transact(move |tx| tx.update_spec::<House>(&at, Some(expected), |spec| spec.value = 2)).await;
    let changed = changed.expect("the version matches");
    assert_eq!((changed.meta.generation, changed.status.seen), (Generation(2), 3));

    let at = uid.clone();
    let stale =
        store.transact(move |tx| tx.update_spec::<House>(&at, Some(expected), |spec| spec.value = 9)).await;
    assert!(matches!(stale, Err(TransactError::Refused(TxError::Stale { .. }))), "{stale:?}");
    let (at, tags) = (uid.clone(), Tags::from([("k".to_owned(), "v".to_owned())]));
    let tagged = store.transact(move |tx| tx.update_tags::<House>(&at, None, tags)).await;
    assert_eq!(tagged.expect("stored").meta.generation, Generation(2));

    delete(&store, &uid).await;
    let at = uid.clone();
    let late = store.transact(move |tx| tx.update_spec::<House>(&at, None, |spec| spec.value = 9)).await;
    assert!(matches!(late, Err(TransactError::Refused(TxError::Deleting { .. }))), "{late:?}");
    assert_eq!(store.write_status::<House>(&uid, Status { seen: 4 }).await, Ok(true), "status still moves");
}

#[tokio::test]
async fn a_removed_owner_takes_claims_and_the_owned_with_it() {
    let kv = MemoryKv::new();
    let store = open(&kv);
    let owner = store
        .transact(|tx| {
            let uid = tx.next_uid();
            let of = OwnerRef { kind: "house".to_owned(), uid: uid.clone() };
            tx.create::<Room>(New { owner: Some(of), ..new("kitchen") })?;
            tx.claim("address", "10.0.0.2", &uid).expect("free");
            assert_eq!(tx.claim_lowest("cid", 3..=5, &uid), Some(3));
            tx.create::<House>(New { uid: Some(uid.clone()), ..new("home") })?;
            Ok::<_, TxError>(uid)
        })
        .await
        .expect("an owner may be created after what it owns");
    let room = store.owned_by::<Room>(&owner)[0].meta.uid.clone();

    let at = owner.clone();
    let taken = store.transact(move |tx| {
        let other = tx.next_uid();
        assert_eq!(tx.claims("cid"), 1);
        tx.claim("address", "10.0.0.2", &at).expect("by the same owner again");
        tx.claim("address", "10.0.0.2", &other)
    });
    assert_eq!(taken.await, Err(TransactError::Refused(Claimed { by: owner.clone() })));

    delete(&store, &owner).await;
    assert!(!store.get::<Room>(&room).expect("there").meta.is_deleting(), "only when the owner is gone");
    assert_eq!(store.remove_finalizer::<House>(&owner).await, Ok(true));
    assert!(store.get::<Room>(&room).expect("there").meta.is_deleting());
    assert_eq!(store.remove_finalizer::<Room>(&room).await, Ok(true));
    let left = store.transact(|tx| Ok::<_, TxError>((tx.claims("address"), tx.claims("cid")))).await;
    assert_eq!(left, Ok((0, 0)));
    assert_eq!(kv.keys(), ["m/revision"], "nothing is left on disk");
}

#[tokio::test]
async fn what_has_no_owner_in_the_store_is_refused_whole() {
    let kv = MemoryKv::new();
    let store = open(&kv);
    let refused = store
        .transact(|tx| {
            let of = OwnerRef { kind: "house".to_owned(), uid: tx.next_uid() };
            tx.create::<Room>(New { owner: Some(of), ..new("kitchen") })
        })
        .await;
    assert!(matches!(refused, Err(TransactError::Store(StoreError::OwnerGone { .. }))), "{refused:?}");
    assert_eq!((store.count::<Room>(), kv.commits()), (0, 0));
}

#[tokio::test]
async fn a_refused_or_panicking_transaction_leaves_nothing_and_the_writer_lives() {
    let kv = MemoryKv::new();
    let store = open(&kv);
    let refused = store.transact(|tx| {
        let house = tx.create::<House>(new("a")).expect("free");
        assert_eq!(tx.claim_lowest("cid", 3..=9, &house.meta.uid), Some(3));
        assert!(tx.find::<House>(&name("a")).is_some(), "a transaction sees what it staged");
        Err::<(), _>("no")
    });
    assert_eq!(refused.await, Err(TransactError::Refused("no")));
    let panicked = store.transact(|tx| {
        tx.create::<House>(new("a")).expect("free");
        assert!(tx.list::<House>().is_empty(), "a rule of the caller's own");
        Ok::<_, ()>(())
    });
    assert_eq!(panicked.await, Err(TransactError::Store(StoreError::Panicked)));
    assert_eq!(kv.commits(), 0);
    let house = create(&store, "a").await.expect("the name is free");
    let at = house.meta.uid.clone();
    let lowest = store.transact(move |tx| Ok::<_, ()>(tx.claim_lowest("cid", 3..=9, &at))).await;
    assert_eq!(lowest, Ok(Some(3)));
}

#[tokio::test]
async fn transactions_that_wait_together_share_one_commit() {
    let kv = MemoryKv::new();
    let store = open(&kv);
    let names: Vec<_> = (0..20).map(|n| format!("n-{n}")).collect();
    let all = futures::future::join_all(names.iter().map(|name| create(&store, name))).await;
    assert!(all.iter().all(Result::is_ok));
    assert_eq!(kv.commits(), 1);
    let versions: BTreeSet<_> =
        all.iter().map(|one| one.as_ref().expect("stored").meta.resource_version).collect();
    assert_eq!(versions.len(), 20, "each object has a version of its own");
}

#[tokio::test]
async fn a_failed_commit_answers_all_shows_nothing_and_reads_go_on() {
    let kv = MemoryKv::new();
    let store = open(&kv);
    create(&store, "before").await.expect("stored");
    let revision = store.revision();
    kv.set_full(true);
    let (one, two) = futures::join!(create(&store, "one"), create(&store, "one"));
    for result in [one, two] {
        assert_eq!(result, Err(TransactError::Store(StoreError::Full)), "whatever the closure said");
    }
    assert_eq!(store.count::<House>(), 1);
    assert_eq!(store.revision(), revision);
    kv.set_full(false);
    create(&store, "one").await.expect("space is back");
    let again = open(&kv.reopen());
    assert_eq!(again.list::<House>(), store.list::<House>());
}

#[tokio::test]
async fn what_a_failed_commit_left_behind_is_overwritten_by_the_next() {
    let kv = MemoryKv::new();
    let store = open(&kv);
    kv.fail_next(KvFault::IoAfterStoring);
    let lost = create(&store, "ghost").await;
    assert!(matches!(lost, Err(TransactError::Store(StoreError::Database(_)))), "{lost:?}");
    create(&store, "real").await.expect("stored");
    let again = open(&kv.reopen());
    let names: Vec<_> = again.list::<House>().iter().map(|house| house.meta.name.to_string()).collect();
    assert_eq!(names, ["real"]);
}

#[tokio::test]
async fn keys_of_failed_commits_are_bounded_and_existing_objects_go_on() {
    let kv = MemoryKv::new();
    let store = open(&kv);
    let house = create(&store, "house").await.expect("stored");
    let mut failed = 0;
    let refused = loop {
        kv.fail_next(KvFault::Io);
        let error = create(&store, &format!("n-{failed}")).await.expect_err("the disk fails");
        if error.to_string().contains("too many writes failed") {
            break error;
        }
        failed += 1;
        assert!(failed <= limits::STORE_SUSPECTS_MAX, "nothing bounds the keys of failed commits");
    };
    assert!(matches!(refused, TransactError::Store(StoreError::Database(_))), "{refused:?}");
    kv.mend();
    store
        .write_status::<House>(&house.meta.uid, Status { seen: 1 })
        .await
        .expect("an existing object is written");
    create(&store, "again").await.expect("new objects are taken again");
    assert_eq!(open(&kv.reopen()).count::<House>(), 2);
}

#[tokio::test]
async fn an_unreadable_record_keeps_its_name_and_claims_until_it_is_removed_by_force() {
    let kv = MemoryKv::new();
    let (uid, room) = {
        let store = open(&kv);
        let house = create(&store, "home").await.expect("stored");
        create(&store, "well").await.expect("stored");
        let at = house.meta.uid.clone();
        let room = store.transact(move |tx| {
            tx.claim("address", "x", &at).expect("free");
            let of = OwnerRef { kind: "house".to_owned(), uid: at };
            tx.create::<Room>(New { owner: Some(of), ..new("kitchen") })
        });
        (house.meta.uid.clone(), room.await.expect("stored").meta.uid.clone())
    };
    assert!(kv.corrupt(&format!("o/house/{uid}")));
    let (store, _) = open_at(kv.reopen(), 100).expect("one damaged record does not stop the store");
    assert_eq!(store.get::<House>(&uid), None);
    let unreadable = store.unreadable();
    assert_eq!((unreadable.len(), &unreadable[0].uid, &*unreadable[0].kind), (1, &uid, "house"));
    assert!(unreadable[0].cause.contains("checksum"), "{}", unreadable[0].cause);
    assert!(store.is_unreadable(&uid) && !store.is_unreadable(&room));
    let taken = TxError::NameTaken { kind: "house", name: name("home"), by: uid.clone() };
    assert_eq!(create(&store, "home").await, Err(TransactError::Refused(taken)));
    let at = uid.clone();
    let claimed = store.transact(move |tx| {
        let deletion = tx.request_deletion::<House>(&at).map(|_| ());
        assert_eq!(deletion, Err(TxError::Unreadable { kind: "house", uid: at.clone() }));
        let other = tx.find::<House>(&name("well")).expect("readable").meta.uid.clone();
        tx.claim("address", "x", &other)
    });
    assert_eq!(claimed.await, Err(TransactError::Refused(Claimed { by: uid.clone() })));

    let mut watch = store.watch(Some("house"), store.revision()).expect("current");
    let at = uid.clone();
    let removed = store.transact(move |tx| Ok::<_, ()>(tx.remove_unreadable("house", &at))).await;
    assert_eq!(removed, Ok(true));
    let event = watch.next().await.expect("in the ring");
    assert_eq!((event.change, &event.uid), (Change::Deleted, &uid));
    assert!(event.last::<House>().is_none());
    assert!(store.unreadable().is_empty());
    assert!(store.get::<Room>(&room).expect("there").meta.is_deleting(), "what it owned goes too");
    create(&store, "home").await.expect("the name is free");
    assert_eq!(store.transact(|tx| Ok::<_, ()>(tx.claims("address"))).await, Ok(0));
}

#[tokio::test]
async fn open_repairs_lost_names_and_refuses_what_is_not_its_own() {
    let kv = MemoryKv::new();
    let house = create(&open(&kv), "home").await.expect("stored");
    let uid = &house.meta.uid;
    assert!(kv.lose(&format!("n/house/{uid}/home")));
    assert!(kv.lose("m/revision"));
    let kv = kv.reopen();
    let (store, _) = open_at(kv.clone(), 100).expect("opens");
    assert_eq!(store.find::<House>(&name("home")).as_deref(), Some(&*house));
    assert!(create(&store, "home").await.is_err());
    let next = create(&store, "next").await.expect("stored");
    assert!(next.meta.resource_version > house.meta.resource_version);
    assert!(kv.keys().contains(&format!("n/house/{uid}/home")), "the next commit repaired the name");

    let strange = MemoryKv::new();
    strange.commit(Batch { writes: vec![("what".to_owned(), Some(vec![1]))] }).await.expect("stored");
    let refused = open_at(strange, 0).err();
    assert_eq!(refused, Some(StoreError::ForeignKey { key: "what".to_owned() }));
    let damaged = MemoryKv::new();
    create(&open(&damaged), "home").await.expect("stored");
    assert!(damaged.corrupt(&format!("o/house/{uid}")));
    let refused = open_at(damaged.reopen(), 0).err();
    assert!(matches!(refused, Some(StoreError::Unopenable { records: 1, .. })), "{refused:?}");
}

#[tokio::test]
async fn a_watch_sees_each_change_of_its_kind_in_order() {
    let store = open(&MemoryKv::new());
    let mut watch = store.watch(Some("house"), 0).expect("from the beginning");
    let house = create(&store, "a").await.expect("stored");
    let room = new::<Room>("r");
    store.transact(move |tx| tx.create(room)).await.expect("stored");
    let uid = house.meta.uid.clone();
    store.write_status::<House>(&uid, Status { seen: 1 }).await.expect("stored");
    let at = uid.clone();
    store.transact(move |tx| tx.update_spec::<House>(&at, None, |s| s.value = 8)).await.expect("stored");
    delete(&store, &uid).await;
    store.remove_finalizer::<House>(&uid).await.expect("stored");
    let mut seen = Vec::new();
    for _ in 0..5 {
        let event = watch.next().await.expect("in the ring");
        assert_eq!(event.uid, uid);
        if event.change == Change::Deleted {
            assert_eq!(event.last::<House>().expect("carried").spec.value, 8);
        }
        seen.push((event.revision, event.change));
    }
    assert!(seen.windows(2).all(|pair| pair[0].0 < pair[1].0), "{seen:?}");
    let changes: Vec<_> = seen.iter().map(|(_, change)| *change).collect();
    let expected =
        [Change::Created, Change::StatusUpdated, Change::Updated, Change::Updated, Change::Deleted];
    assert_eq!(changes, expected);

    let mut resumed = store.watch(Some("house"), seen[2].0).expect("still in the ring");
    assert_eq!(resumed.next().await.expect("in the ring").revision, seen[3].0);
    assert!(store.watch(None, store.revision() + 1).is_err(), "a revision of another store's life");
}

#[tokio::test]
async fn a_watch_too_far_behind_must_list_again() {
    let store = open(&MemoryKv::new());
    let uid = create(&store, "a").await.expect("stored").meta.uid.clone();
    let mut slow = store.watch(None, 0).expect("from the beginning");
    let ring = u32::try_from(limits::WATCH_RING_EVENTS).expect("a small number");
    let values: Vec<u32> = (0..=ring).map(|n| n + 2).collect();
    for chunk in values.chunks(STORE_QUEUE_MAX) {
        let writes = chunk.iter().map(|&value| {
            let at = uid.clone();
            store.transact(move |tx| tx.update_spec::<House>(&at, None, |s| s.value = value))
        });
        for result in futures::future::join_all(writes).await {
            result.expect("stored");
        }
    }
    let TooOld { oldest } = slow.next().await.expect_err("its events are gone");
    assert!(store.watch(None, oldest - 1).is_err());
    let mut fresh = store.watch(None, oldest).expect("the oldest that is whole");
    assert_eq!(fresh.next().await.expect("there").revision, oldest + 1);
}

/// Opens an empty store whose writer runs.
pub(crate) fn opened(kinds: Kinds) -> Store {
    opened_on(MemoryKv::new(), kinds)
}

/// Opens a store on this disk, whose writer runs.
pub(super) fn opened_on(kv: MemoryKv, kinds: Kinds) -> Store {
    let clock = Arc::new(TokioClock::starting_at(Timestamp::UNIX_EPOCH));
    let ids = Arc::new(SequentialIds::default());
    let opened = Store::open(kv, Arc::new(PlainSealer), clock, ids, kinds);
    let (store, writer) = opened.expect("the store opens");
    tokio::spawn(writer.run(std::future::pending()));
    store
}

#[tokio::test]
async fn the_queue_is_bounded_and_a_closed_store_is_reported() {
    let clock = Arc::new(TokioClock::starting_at(Timestamp::UNIX_EPOCH));
    let ids = Arc::new(SequentialIds::default());
    let kinds = Kinds::new().with::<House>();
    let (store, writer) =
        Store::open(MemoryKv::new(), Arc::new(PlainSealer), clock, ids, kinds).expect("opens");
    let mut waiting: Vec<_> = (0..STORE_QUEUE_MAX)
        .map(|n| Box::pin(store.transact(move |tx| tx.create(new::<House>(&format!("n-{n}"))))))
        .collect();
    for one in &mut waiting {
        assert!(futures::poll!(one).is_pending());
    }
    assert_eq!(create(&store, "more").await, Err(TransactError::Store(StoreError::Overloaded)));
    writer.run(std::future::ready(())).await;
    for one in waiting {
        one.await.expect("what was queued at shutdown is stored");
    }
    assert_eq!(create(&store, "late").await, Err(TransactError::Store(StoreError::Closed)));
}
