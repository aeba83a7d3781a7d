//! Tests that compare the store with a model of it, over any history and any crash.

use super::*;

/// A step of a random history over few names, so that steps conflict.
#[derive(Debug, Clone)]
enum Step {
    Create { name: u8, is_refused: bool },
    Update { object: usize, value: u32 },
    Status { object: usize, seen: u32 },
    Delete { object: usize },
    Finalize { object: usize },
    Claim { object: usize },
    Fault(KvFault),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let object = || 0usize..8;
    let step = prop_oneof![
        4 => (0u8..4, any::<bool>()).prop_map(|(name, b)| Step::Create { name, is_refused: b }),
        2 => (object(), 1u32..4).prop_map(|(object, value)| Step::Update { object, value }),
        2 => (object(), 0u32..3).prop_map(|(object, seen)| Step::Status { object, seen }),
        2 => object().prop_map(|object| Step::Delete { object }),
        2 => object().prop_map(|object| Step::Finalize { object }),
        2 => object().prop_map(|object| Step::Claim { object }),
        1 => prop_oneof![
            Just(KvFault::Full), Just(KvFault::Io), Just(KvFault::IoAfterStoring)
        ].prop_map(Step::Fault),
    ];
    proptest::collection::vec(step, 1..40)
}

/// The expected content of the store, kept independently: name, generation, value, seen, deleting.
type Model = BTreeMap<Uid, (String, Generation, u32, u32, bool)>;

fn read_model(store: &Store) -> Model {
    let of = |house: &Arc<Object<House>>| {
        let meta = &house.meta;
        let row =
            (meta.name.to_string(), meta.generation, house.spec.value, house.status.seen, meta.is_deleting());
        (meta.uid.clone(), row)
    };
    store.list::<House>().iter().map(of).collect()
}

/// Runs a step on store and model. Returns `Err` if a fault occurred; the model is unchanged then.
async fn run_step(store: &Store, model: &mut Model, kv: &MemoryKv, step: &Step) -> Result<(), StoreError> {
    let at = |index: usize| model.keys().nth(index).cloned();
    match step {
        Step::Fault(fault) => kv.fail_next(*fault),
        Step::Create { name: number, is_refused } => {
            let text = format!("n-{number}");
            let is_taken = model.values().any(|row| row.0 == text && !row.4);
            let (new, is_refused) = (new::<House>(&text), *is_refused);
            let made = store.transact(move |tx| {
                let made = tx.create(new).map_err(Some)?;
                tx.claim_lowest("slot", 1..=3, &made.meta.uid);
                if is_refused { Err(None) } else { Ok(made) }
            });
            match made.await {
                Ok(made) => {
                    assert!(!is_taken && !is_refused);
                    model.insert(made.meta.uid.clone(), (text, Generation(1), 1, 0, false));
                }
                Err(TransactError::Refused(Some(TxError::NameTaken { .. }))) => assert!(is_taken),
                Err(TransactError::Refused(None)) => assert!(is_refused && !is_taken),
                Err(TransactError::Refused(Some(other))) => panic!("{other}"),
                Err(TransactError::Store(error)) => return Err(error),
            }
        }
        Step::Update { object, value } => {
            let (Some(uid), value) = (at(*object), *value) else { return Ok(()) };
            let id = uid.clone();
            let done =
                store.transact(move |tx| tx.update_spec::<House>(&id, None, |s| s.value = value)).await;
            let row = model.get_mut(&uid).expect("there");
            match done {
                Ok(_) if row.2 == value => assert!(!row.4),
                Ok(_) => (row.1, row.2) = (row.1.next(), value),
                Err(TransactError::Refused(TxError::Deleting { .. })) => assert!(row.4),
                Err(TransactError::Refused(other)) => panic!("{other}"),
                Err(TransactError::Store(error)) => return Err(error),
            }
        }
        Step::Status { object, seen } => {
            let Some(uid) = at(*object) else { return Ok(()) };
            store.write_status::<House>(&uid, Status { seen: *seen }).await?;
            model.get_mut(&uid).expect("there").3 = *seen;
        }
        Step::Delete { object } => {
            let Some(uid) = at(*object) else { return Ok(()) };
            let id = uid.clone();
            match store.transact(move |tx| tx.request_deletion::<House>(&id)).await {
                Ok(_) => model.get_mut(&uid).expect("there").4 = true,
                Err(TransactError::Refused(other)) => panic!("{other}"),
                Err(TransactError::Store(error)) => return Err(error),
            }
        }
        Step::Finalize { object } => {
            // A finalizer is removed only from an object that is being deleted, as by a reconciler.
            let Some(uid) = at(*object).filter(|uid| model[uid].4) else { return Ok(()) };
            store.remove_finalizer::<House>(&uid).await?;
            model.remove(&uid);
        }
        Step::Claim { object } => {
            let Some(uid) = at(*object) else { return Ok(()) };
            match store.transact(move |tx| Ok::<_, ()>(tx.claim_lowest("slot", 1..=6, &uid))).await {
                Ok(_) => {}
                Err(TransactError::Refused(())) => unreachable!("it does not refuse"),
                Err(TransactError::Store(error)) => return Err(error),
            }
        }
    }
    Ok(())
}

/// Checks the claims and names on disk without the store's own indexes.
fn check_disk(kv: &MemoryKv) {
    let keys = kv.keys();
    let part = |key: &String, at: usize| key.split('/').nth(at).expect("a part").to_owned();
    let objects: BTreeSet<_> = keys.iter().filter(|k| k.starts_with("o/")).map(|k| part(k, 2)).collect();
    for space in ["n/", "c/"] {
        let in_space: Vec<_> = keys.iter().filter(|key| key.starts_with(space)).collect();
        let unique: BTreeSet<_> = in_space.iter().map(|key| (part(key, 1), part(key, 3))).collect();
        assert_eq!(unique.len(), in_space.len(), "a name or claim has one owner: {keys:?}");
        assert!(in_space.iter().all(|key| objects.contains(&part(key, 2))), "owners exist: {keys:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn any_history_matches_the_model_and_any_crash_gives_an_acknowledged_prefix(history in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        runtime.block_on(async {
            let kv = MemoryKv::new();
            let store = open(&kv);
            let mut model = Model::new();
            // The state that a crash after each durable commit must show. A failed commit that stored
            // everything is `None`: its outcome was never acknowledged.
            let mut prefixes = vec![Some(model.clone())];
            for step in &history {
                let before = kv.commits();
                let outcome = run_step(&store, &mut model, &kv, step).await;
                assert_eq!(read_model(&store), model, "after {step:?}");
                prefixes.resize(kv.commits() + 1, None);
                if outcome.is_ok() && kv.commits() > before {
                    *prefixes.last_mut().expect("not empty") = Some(model.clone());
                }
            }
            for (commits, expected) in prefixes.iter().enumerate() {
                let disk = kv.as_of(commits);
                check_disk(&disk);
                if let Some(expected) = expected {
                    assert_eq!(&read_model(&open(&disk)), expected, "after {commits} commits");
                }
            }
        });
    }
}
