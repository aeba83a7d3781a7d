//! Tests of the verbs that each state accepts, on the store that clients write to.

use jiff::Timestamp;
use stead_schemas::api::{InstanceStart, StandbyRequest};
use stead_schemas::disk::{Disk, DiskPurpose, DiskSpec};
use stead_schemas::instance::{Instance, InstanceStatus, Power, State};
use stead_schemas::meta::Tags;
use stead_schemas::names::{Name, Uid};
use stead_schemas::node::Node;
use stead_schemas::numbers::RunNo;
use stead_schemas::policy::RestartStatus;
use stead_schemas::snapshot::{
    Snapshot, SnapshotKind, SnapshotPhase, SnapshotPurpose, SnapshotSpec, SnapshotStatus,
};

use crate::refused::{Refused, RefusedKind};
use crate::sim::observe_node;
use crate::snapshot::admission as snapshots;
use crate::store::tests::opened;
use crate::store::{Kinds, New, Store, Tx, TxError};
use crate::vm::admission::{self, ForkRequest, Target};
use crate::vm::example as instance;

async fn stored(power: Power, ended_run: RunNo, state: State, is_restarting: bool) -> (Store, Uid) {
    let kinds = Kinds::new().with::<Instance>().with::<Disk>().with::<Snapshot>().with::<Node>();
    let store = opened(kinds);
    observe_node(&store).await;
    let object = instance(power, 1, ended_run.0);
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
    let restart = RestartStatus { run: RunNo(1), next_attempt_at, ..RestartStatus::default() };
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
    // Each row: desired power, run that ended, state, and whether a restart is due; then whether start, stop,
    // standby and restore are accepted.
    let table = [
        ((Up, 0, Running, false), [false, true, true, false]),
        ((Up, 0, Initializing, false), [true, true, false, false]),
        ((Up, 0, Created, false), [true, true, false, false]),
        ((Up, 0, Paused, false), [true, true, false, false]),
        ((Up, 0, Unknown, false), [true, true, false, false]),
        ((Up, 1, Shutdown, false), [true, true, false, false]),
        ((Up, 1, Stopped, false), [true, false, false, false]),
        ((Up, 0, Stopped, true), [true, true, false, false]),
        // The instance is on its way back, or fails to come back: another request does no harm, and a stop
        // ends it.
        ((Up, 0, Standby, false), [true, true, false, true]),
        ((Down, 0, Running, false), [true, true, false, false]),
        ((Down, 1, Stopped, false), [true, false, false, false]),
        // The instance is on its way to standby, or in standby.
        ((Kept, 0, Running, false), [false, true, true, true]),
        ((Kept, 0, Paused, false), [false, true, true, true]),
        ((Kept, 0, Created, false), [false, true, true, true]),
        ((Kept, 0, Standby, false), [false, false, false, true]),
        // The program ended before its memory was kept, with a restart to come or without.
        ((Kept, 1, Stopped, false), [true, false, false, false]),
        ((Kept, 0, Stopped, true), [true, true, false, false]),
    ];
    for ((power, ended_run, state, is_restarting), taken) in table {
        for (verb, is_taken) in [START, STOP, STANDBY, RESTORE].into_iter().zip(taken) {
            let (store, uid) = stored(power, RunNo(ended_run), state, is_restarting).await;
            let answer = store.transact(move |tx| verb(tx, &uid)).await;
            let what = format!("{power:?} {ended_run} {state:?} {is_restarting}: {answer:?}");
            assert_eq!(answer.is_ok(), is_taken, "{what}, taken: start, stop, standby, restore {taken:?}");
            assert!(is_taken || what.contains("InvalidState"), "{what}");
        }
    }
}

/// A request on an instance, as the wire names it.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Asked {
    Start,
    Stop,
    Standby,
    Restore,
    Fork,
    ForkFromRunning,
    SnapshotStandby,
    SnapshotStopped,
    RestoreInPlace,
}

const ALL: [Asked; 9] = [
    Asked::Start,
    Asked::Stop,
    Asked::Standby,
    Asked::Restore,
    Asked::Fork,
    Asked::ForkFromRunning,
    Asked::SnapshotStandby,
    Asked::SnapshotStopped,
    Asked::RestoreInPlace,
];

fn of(kind: SnapshotKind) -> snapshots::CreateRequest {
    let (purpose, tags) = (SnapshotPurpose::Kept, Tags::new());
    snapshots::CreateRequest { kind, name: None, tags, purpose, compression: None, pool: 0, schedule: None }
}

/// Returns the state that a refusal names, and the states in which it reports the verb as legal.
fn ask(tx: &mut Tx<'_>, uid: &Uid, snapshot: &Uid, asked: Asked) -> Result<(), (State, &'static str)> {
    let fork = |from_running| {
        let request =
            ForkRequest { name: Name::resource("fork").expect("valid"), from_running, target: None };
        move |tx: &mut Tx<'_>| admission::fork(tx, uid, request, "st").map(drop)
    };
    let refused = match asked {
        Asked::Start => START(tx, uid),
        Asked::Stop => STOP(tx, uid),
        Asked::Standby => STANDBY(tx, uid),
        Asked::Restore => RESTORE(tx, uid),
        Asked::Fork => fork(false)(tx),
        Asked::ForkFromRunning => fork(true)(tx),
        Asked::RestoreInPlace => {
            admission::restore_snapshot(tx, uid, snapshot, Target::default(), "st").map(drop)
        }
        Asked::SnapshotStandby | Asked::SnapshotStopped => {
            let kind =
                if asked == Asked::SnapshotStandby { SnapshotKind::Standby } else { SnapshotKind::Stopped };
            return match snapshots::create(tx, uid, of(kind)) {
                Ok(_) => Ok(()),
                Err(Refused { kind: RefusedKind::InvalidState { state, legal }, .. }) => Err((state, legal)),
                Err(other) => panic!("{asked:?}: {other:?}"),
            };
        }
    };
    match refused {
        Ok(()) => Ok(()),
        Err(Refused { kind: RefusedKind::InvalidState { state, legal }, .. }) => Err((state, legal)),
        Err(other) => panic!("{asked:?}: {other:?}"),
    }
}

/// Creates a disk of the instance and a ready snapshot of it.
async fn snapshot_of(store: &Store, source: &Uid) -> Uid {
    let moved = source.clone();
    let create = move |tx: &mut Tx<'_>| {
        let disk = tx.next_uid();
        let instance = tx.update_spec::<Instance>(&moved, None, |spec| spec.allocated.disk = disk.clone())?;
        let spec = SnapshotSpec {
            source: moved,
            source_name: instance.meta.name.clone(),
            kind: SnapshotKind::Standby,
            name: None,
            purpose: SnapshotPurpose::Kept,
            schedule: None,
            instance: Box::new(instance.spec.clone()),
            image_digest: None,
            compression: None,
            pool: 0,
            volume_disks: Vec::new(),
        };
        let disk_spec = DiskSpec::empty(instance.spec.overlay, DiskPurpose::RootOverlay);
        let name = Name::from(&disk);
        tx.create::<Disk>(New { uid: Some(disk), name, tags: Tags::new(), owner: None, spec: disk_spec })?;
        let (uid, tags) = (tx.next_uid(), Tags::new());
        tx.create::<Snapshot>(New { name: Name::from(&uid), uid: Some(uid), tags, owner: None, spec })
    };
    let uid = store.transact(create).await.expect("created").meta.uid.clone();
    let status = SnapshotStatus { phase: SnapshotPhase::Ready, ..SnapshotStatus::default() };
    store.write_status::<Snapshot>(&uid, status).await.expect("written");
    uid
}

/// Checks each of the eight states with the spec that leads there. In states that are dead ends in another
/// system (created, paused, shut down, unknown), a start is the same request again and a stop ends the
/// instance.
#[tokio::test]
async fn in_each_of_the_eight_states_what_is_not_legal_is_refused_with_the_state_and_what_is() {
    use Asked::{
        Fork, ForkFromRunning, Restore, RestoreInPlace, SnapshotStandby, SnapshotStopped, Standby, Start,
        Stop,
    };
    let table: [(State, Power, u64, &[Asked]); 8] = [
        (State::Created, Power::Running, 0, &[Start, Stop]),
        (State::Initializing, Power::Running, 0, &[Start, Stop]),
        (State::Running, Power::Running, 0, &[Stop, Standby, ForkFromRunning, SnapshotStandby]),
        // An instance that should run is paused while it is captured for another snapshot.
        (State::Paused, Power::Running, 0, &[Start, Stop, ForkFromRunning, SnapshotStandby]),
        (State::Shutdown, Power::Running, 0, &[Start, Stop]),
        (State::Stopped, Power::Stopped, 1, &[Start, Fork, ForkFromRunning, SnapshotStopped, RestoreInPlace]),
        (
            State::Standby,
            Power::Standby,
            0,
            &[Restore, Fork, ForkFromRunning, SnapshotStandby, RestoreInPlace],
        ),
        (State::Unknown, Power::Running, 0, &[Start, Stop]),
    ];
    for (state, power, ended_run, legal) in table {
        for asked in ALL {
            let (store, uid) = stored(power, RunNo(ended_run), state, false).await;
            let snapshot = snapshot_of(&store, &uid).await;
            let answer = store.transact(move |tx| Ok::<_, TxError>(ask(tx, &uid, &snapshot, asked))).await;
            let answer = answer.expect("a store that answers");
            assert_eq!(answer.is_ok(), legal.contains(&asked), "{asked:?} {state:?}: {answer:?}");
            let Err((reported, legal_in)) = answer else { continue };
            assert_eq!(reported, state, "{asked:?}");
            // The refusal of a fork names the parameter with which it is legal.
            let asked_well = if asked == Fork { ForkFromRunning } else { asked };
            for (state, _, _, legal) in table {
                let is_reported = legal_in.contains(&format!("{state:?}"));
                assert!(
                    !is_reported || legal.contains(&asked_well),
                    "{asked:?} is said to be legal in {state:?}"
                );
            }
            assert!(table.iter().any(|(state, ..)| legal_in.contains(&format!("{state:?}"))), "{asked:?}");
        }
    }
}
