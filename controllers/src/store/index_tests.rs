//! Tests of references: look-ups agree with scans, cost only what they find, and hold in every state of a
//! transaction.

use std::collections::BTreeSet;

use proptest::prelude::*;
use serde::{Deserialize, Serialize};
use stead_schemas::meta::{OwnerRef, Tags};
use stead_schemas::references::{Ref, Role, Target};
use stead_schemas::resource::Usage;

use super::tests::opened_on;
use super::*;

/// A ship that lies in a harbour, or waits for one until it is observed there.
#[derive(Debug, Clone, PartialEq)]
enum Ship {}

impl Kind for Ship {
    const NAME: &'static str = "ship";
    const FINALIZER: &'static str = "ship";
    type Spec = ShipSpec;
    type Status = ShipStatus;

    fn references(object: &Object<Self>) -> Vec<Ref> {
        let role = if object.status.is_there { Role::Network } else { Role::AwaitsCopy };
        vec![lies_in(role, object.spec.harbour)]
    }

    fn usage(object: &Object<Self>) -> Usage {
        let vcpus = u128::from(object.spec.harbour) + u128::from(object.status.is_there);
        Usage { vcpus, ..Usage::default() }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct ShipSpec {
    harbour: u16,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct ShipStatus {
    is_there: bool,
}

fn lies_in(role: Role, harbour: u16) -> Ref {
    Ref { role, target: Target::HostPort(harbour) }
}

fn open(kv: &MemoryKv) -> Store {
    opened_on(kv.clone(), Kinds::new().with::<Ship>())
}

fn uid(number: u64) -> Uid {
    format!("s{number:023}").parse().expect("valid")
}

fn new(number: u64, harbour: u16) -> New<Ship> {
    let name = Name::resource(&format!("n{number}")).expect("valid");
    New { uid: Some(uid(number)), name, tags: Tags::new(), owner: None, spec: ShipSpec { harbour } }
}

/// A change within a transaction.
#[derive(Debug, Clone)]
enum Step {
    Create { number: u64, harbour: u16, owner: Option<u64> },
    Move { number: u64, harbour: u16 },
    See { number: u64 },
    Delete { number: u64 },
    Remove { number: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    let number = || 0..6u64;
    prop_oneof![
        3 => (number(), 0..3u16, proptest::option::of(number()))
            .prop_map(|(number, harbour, owner)| Step::Create { number, harbour, owner }),
        2 => (number(), 0..3u16).prop_map(|(number, harbour)| Step::Move { number, harbour }),
        2 => number().prop_map(|number| Step::See { number }),
        1 => number().prop_map(|number| Step::Delete { number }),
        2 => number().prop_map(|number| Step::Remove { number }),
    ]
}

/// Applies a step. A step that the store's rules refuse changes nothing.
fn apply(tx: &mut Tx<'_>, step: &Step) {
    match step {
        Step::Create { number, harbour, owner } => {
            let owner = owner.filter(|owner| tx.get::<Ship>(&uid(*owner)).is_some());
            let owner = owner.map(|owner| OwnerRef { kind: Ship::NAME.to_owned(), uid: uid(owner) });
            let _ = tx.create(New { owner, ..new(*number, *harbour) });
        }
        Step::Move { number, harbour } => {
            let _ = tx.update_spec::<Ship>(&uid(*number), None, |spec| spec.harbour = *harbour);
        }
        Step::See { number } => {
            tx.write_status::<Ship>(&uid(*number), ShipStatus { is_there: true });
        }
        Step::Delete { number } => {
            let _ = tx.request_deletion::<Ship>(&uid(*number));
        }
        Step::Remove { number } => {
            tx.remove_finalizer::<Ship>(&uid(*number));
        }
    }
}

/// Compares every look-up with the result of a scan.
fn check(tx: &Tx<'_>) {
    let all = tx.list::<Ship>();
    let mut usage = Usage::default();
    all.iter().for_each(|ship| usage += Ship::usage(ship));
    assert_eq!(tx.usage(), usage);
    for role in [Role::Network, Role::AwaitsCopy] {
        let mut targets = BTreeSet::new();
        for harbour in 0..3 {
            let reference = lies_in(role, harbour);
            let fits = |ship: &&Arc<Object<Ship>>| Ship::references(ship).contains(&reference);
            let scanned: BTreeSet<Uid> = all.iter().filter(fits).map(|ship| ship.meta.uid.clone()).collect();
            let found = tx.referring::<Ship>(&reference);
            assert_eq!(found.len(), scanned.len(), "each once");
            assert_eq!(found.iter().map(|ship| ship.meta.uid.clone()).collect::<BTreeSet<_>>(), scanned);
            if !scanned.is_empty() {
                targets.insert(Target::HostPort(harbour));
            }
        }
        assert_eq!(tx.targets::<Ship>(role), targets);
    }
    for number in 0..6 {
        let is_owned = |ship: &&Arc<Object<Ship>>| {
            ship.meta.owner.as_ref().is_some_and(|owner| owner.uid == uid(number))
        };
        assert_eq!(tx.owned_by::<Ship>(&uid(number)).len(), all.iter().filter(is_owned).count());
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().expect("a runtime")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    /// Checks the index after steps that are staged, refused, lost with a failed commit, or read again from
    /// the disk.
    #[test]
    fn the_index_is_what_a_scan_finds(
        groups in proptest::collection::vec(
            (proptest::collection::vec(step(), 1..6), any::<bool>(), 0..5u8), 1..8),
    ) {
        runtime().block_on(async {
            let kv = MemoryKv::new();
            let store = open(&kv);
            for (steps, is_refused, fault) in groups {
                if fault == 0 {
                    kv.fail_next(KvFault::Full);
                }
                let transaction = store.transact(move |tx| {
                    for step in &steps {
                        apply(tx, step);
                        check(tx);
                    }
                    if is_refused { Err("refused") } else { Ok(()) }
                });
                let later = store.transact(|tx| {
                    check(tx);
                    Ok::<(), ()>(())
                });
                let _ = tokio::join!(transaction, later);
                assert_eq!(store.stale_references(), []);
                assert_eq!(store.usage(), store.scanned_usage());
                assert_eq!(open(&kv.reopen()).usage(), store.usage());
                assert_eq!(open(&kv.reopen()).stale_references(), []);
            }
        });
    }
}

#[tokio::test(start_paused = true)]
async fn an_event_names_what_the_object_no_longer_points_at() {
    let kv = MemoryKv::new();
    let store = open(&kv);
    let mut watch = store.watch(None, store.revision()).expect("a new store");
    store.transact(|tx| tx.create(new(1, 1))).await.expect("stored");
    assert_eq!(watch.next().await.expect("kept").dropped, []);
    store.write_status::<Ship>(&uid(1), ShipStatus { is_there: true }).await.expect("stored");
    assert_eq!(watch.next().await.expect("kept").dropped, [lies_in(Role::AwaitsCopy, 1)]);
    store
        .transact(|tx| tx.update_spec::<Ship>(&uid(1), None, |spec| spec.harbour = 2))
        .await
        .expect("stored");
    assert_eq!(watch.next().await.expect("kept").dropped, [lies_in(Role::Network, 1)]);
    store.transact(|tx| tx.request_deletion::<Ship>(&uid(1))).await.expect("stored");
    assert_eq!(watch.next().await.expect("kept").dropped, []);
    store.remove_finalizer::<Ship>(&uid(1)).await.expect("stored");
    assert_eq!(watch.next().await.expect("kept").dropped, [lies_in(Role::Network, 2)]);
}

/// Returns the number of objects that look-ups read when this number of other objects is stored.
async fn visits_among(others: u64) -> usize {
    let store = open(&MemoryKv::new());
    let filled = store.transact(move |tx| (0..others).try_for_each(|at| tx.create(new(at, 1)).map(drop)));
    filled.await.expect("stored");
    store.transact(move |tx| tx.create(new(others, 7))).await.expect("stored");
    let before = store.visits();
    let reference = lies_in(Role::AwaitsCopy, 7);
    assert_eq!(store.uids_referring::<Ship>(&reference), [uid(others)]);
    assert_eq!(store.referring::<Ship>(&reference).len(), 1);
    assert!(store.find_referring::<Ship>(&reference, |_| true).is_some());
    assert!(store.is_referred_to(&reference) && !store.is_referred_to(&lies_in(Role::AwaitsCopy, 8)));
    assert_eq!(store.starting_with::<Ship>(uid(others).as_str(), 2).len(), 1);
    let in_transaction = store.transact(move |tx| {
        tx.create(new(others + 1, 7))?;
        assert_eq!(tx.referring::<Ship>(&reference).len(), 2);
        // The search ends at the first of many objects.
        assert!(tx.find_referring::<Ship>(&lies_in(Role::AwaitsCopy, 1), |_| true).is_some());
        tx.update_spec::<Ship>(&uid(others), None, |spec| spec.harbour = 9)
    });
    in_transaction.await.expect("stored");
    store.visits() - before
}

#[tokio::test(start_paused = true)]
async fn a_lookup_reads_what_it_finds_and_nothing_else() {
    assert_eq!(visits_among(10).await, visits_among(2000).await);
}
