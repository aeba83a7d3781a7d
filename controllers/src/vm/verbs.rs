//! Which verb is taken in which state, on the store that clients write to.

use std::sync::Arc;

use jiff::Timestamp;
use stead_schemas::api::{InstanceStart, StandbyRequest};
use stead_schemas::instance::{Instance, InstanceStatus, Power, State};
use stead_schemas::meta::Tags;
use stead_schemas::names::Uid;
use stead_schemas::policy::RestartStatus;

use super::admission::{self, Refused};
use super::tests::instance;
use crate::runtime::{SequentialIds, TokioClock};
use crate::store::{Kinds, MemoryKv, New, PlainSealer, Store, Tx};

async fn stored(power: Power, ended_run: u64, state: State, is_restarting: bool) -> (Store, Uid) {
    let clock = Arc::new(TokioClock::starting_at(Timestamp::UNIX_EPOCH));
    let kinds = Kinds::new().with::<Instance>();
    let ids = Arc::new(SequentialIds::default());
    let opened = Store::open(MemoryKv::new(), Arc::new(PlainSealer), clock, ids, kinds);
    let (store, writer) = opened.expect("the store opens");
    tokio::spawn(writer.run(std::future::pending()));
    let object = instance(power, 1, ended_run);
    let uid = object.meta.uid.clone();
    let new = New {
        uid: Some(uid.clone()),
        name: object.meta.name,
        tags: Tags::new(),
        owner: None,
        spec: object.spec,
    };
    store.transact(move |tx| tx.create::<Instance>(new)).await.expect("created");
    let next_attempt_at = is_restarting.then_some(Timestamp::MAX);
    let restart = RestartStatus { run: 1, next_attempt_at, ..RestartStatus::default() };
    let status = InstanceStatus { ended_run, state, restart, ..InstanceStatus::default() };
    store.write_status::<Instance>(&uid, status).await.expect("written");
    (store, uid)
}

type Verb = fn(&mut Tx<'_>, &Uid) -> Result<(), Refused>;

const START: Verb = |tx, uid| admission::start(tx, uid, InstanceStart::default()).map(drop);
const STOP: Verb = |tx, uid| admission::stop(tx, uid).map(drop);
const STANDBY: Verb = |tx, uid| admission::standby(tx, uid, StandbyRequest::PLAIN).map(drop);
const RESTORE: Verb = |tx, uid| admission::restore(tx, uid).map(drop);

#[tokio::test]
async fn every_verb_is_taken_where_it_makes_sense_and_refused_with_the_state_elsewhere() {
    use Power::{Running as Up, Standby as Kept, Stopped as Down};
    use State::{Created, Initializing, Paused, Running, Shutdown, Standby, Stopped, Unknown};
    // Wish, run ended, state, waiting for a restart; taken: start, stop, standby, restore.
    let table = [
        ((Up, 0, Running, false), [false, true, true, false]),
        ((Up, 0, Initializing, false), [true, true, false, false]),
        ((Up, 0, Created, false), [true, true, false, false]),
        ((Up, 0, Paused, false), [true, true, false, false]),
        ((Up, 0, Unknown, false), [true, true, false, false]),
        ((Up, 1, Shutdown, false), [true, true, false, false]),
        ((Up, 1, Stopped, false), [true, false, false, false]),
        ((Up, 0, Stopped, true), [true, true, false, false]),
        // On its way back, or failing to come back: asking again is no harm, a stop ends it.
        ((Up, 0, Standby, false), [true, true, false, true]),
        ((Down, 0, Running, false), [true, true, false, false]),
        ((Down, 1, Stopped, false), [true, false, false, false]),
        // On its way to standby, and there.
        ((Kept, 0, Running, false), [false, true, true, true]),
        ((Kept, 0, Paused, false), [false, true, true, true]),
        ((Kept, 0, Created, false), [false, true, true, true]),
        ((Kept, 0, Standby, false), [false, false, false, true]),
        // Its program ended before it was kept; with a restart to come, or without.
        ((Kept, 1, Stopped, false), [true, false, false, false]),
        ((Kept, 0, Stopped, true), [true, true, false, false]),
    ];
    for ((power, ended_run, state, is_restarting), taken) in table {
        for (verb, is_taken) in [START, STOP, STANDBY, RESTORE].into_iter().zip(taken) {
            let (store, uid) = stored(power, ended_run, state, is_restarting).await;
            let answer = store.transact(move |tx| verb(tx, &uid)).await;
            let what = format!("{power:?} {ended_run} {state:?} {is_restarting}: {answer:?}");
            assert_eq!(answer.is_ok(), is_taken, "{what}, taken: start, stop, standby, restore {taken:?}");
            assert!(is_taken || what.contains("InvalidState"), "{what}");
        }
    }
}
