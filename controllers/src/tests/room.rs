//! Tests of the room of a host: what a request takes of it, what is refused, and what is given back.

use std::sync::Arc;

use serde_json::json;
use stead_schemas::api::{InstanceRequest, InstanceStart, StandbyRequest, VolumeCreate};
use stead_schemas::instance::{Instance, InstanceStatus, PowerCause, State};
use stead_schemas::meta::{Object, Tags};
use stead_schemas::names::{Name, Uid};
use stead_schemas::node::{Node, NodeStatus, Resources};
use stead_schemas::numbers::RunNo;
use stead_schemas::quantity::Bytes;
use stead_schemas::resource::vm_memory;

use crate::kinds;
use crate::node::local;
use crate::refused::{Refused, RefusedKind};
use crate::sim::observe_node;
use crate::store::tests::opened;
use crate::store::{Store, TransactError, Tx};
use crate::vm::admission;
use crate::volume::admission as volumes;

const MIB: u64 = 1 << 20;
const GUEST: Bytes = Bytes(256 * MIB);

/// Opens a store whose host has this size. A factor of 4 for processors, and of 1 for the others, is in force.
async fn host(capacity: Resources) -> Store {
    let store = opened(kinds());
    observe_node(&store).await;
    let node = local(&store).expect("declared");
    let status = NodeStatus { capacity, ..node.status.clone() };
    store.write_status::<Node>(&node.meta.uid, status).await.expect("written");
    store
}

/// Returns a host with room for the memory of this number of VMs.
fn memory_of(vms: u64) -> Resources {
    let memory = u64::try_from(vm_memory(GUEST)).expect("small") * vms;
    Resources { cpus: 64, memory: Bytes(memory), disk: Bytes(1 << 50) }
}

type Answer<T> = Result<T, TransactError<Refused>>;

async fn create(store: &Store, name: &str) -> Answer<Arc<Object<Instance>>> {
    let body = json!({
        "name": name, "image": "alpine", "size": "256MB", "vcpus": 1, "overlay_size": "1GB",
        "network": {"enabled": false},
    });
    let request = InstanceRequest::read(body, &local(store).expect("declared").offer()).expect("valid");
    store.transact(move |tx| admission::create(tx, request, "st")).await
}

/// Returns the sentence of a refusal for lack of room.
fn short<T: std::fmt::Debug>(answer: Answer<T>) -> String {
    match answer {
        Err(TransactError::Refused(Refused { kind: RefusedKind::NoRoom, message, .. })) => message,
        other => panic!("{other:?}"),
    }
}

/// Writes the status of an instance whose VM is gone.
async fn is_down(store: &Store, uid: &Uid, state: State) {
    let object = store.get::<Instance>(uid).expect("there");
    let ended_run = if state == State::Stopped { object.spec.run } else { RunNo(0) };
    let status =
        InstanceStatus { state, ended_run, returned: object.spec.grant, ..InstanceStatus::default() };
    store.write_status::<Instance>(uid, status).await.expect("written");
}

async fn ask<T: Send + 'static>(
    store: &Store,
    uid: &Uid,
    verb: impl FnOnce(&mut Tx<'_>, &Uid) -> Result<T, Refused> + Send + 'static,
) -> Answer<T> {
    let uid = uid.clone();
    store.transact(move |tx| verb(tx, &uid)).await
}

#[tokio::test]
async fn a_refusal_names_each_resource_with_what_was_asked_and_what_is_left() {
    let store = host(memory_of(1)).await;
    create(&store, "one").await.expect("room for one");
    let message = short(create(&store, "two").await);
    assert_eq!(
        message,
        "memory is not enough on this host: 384.0 MB are asked for, and 0 B of 384.0 MB are left"
    );
    assert_eq!(store.count::<Instance>(), 1, "a refusal leaves nothing");
    let store = host(Resources { cpus: 1, memory: Bytes(MIB), disk: Bytes((1 << 30) + MIB) }).await;
    let message = short(create(&store, "one").await);
    assert!(
        message.starts_with("memory is not enough") && message.contains("; disk is not enough"),
        "{message}"
    );
    let request = VolumeCreate {
        id: None,
        name: Name::resource("v").expect("valid"),
        size: Bytes(1 << 30),
        tags: Tags::new(),
    };
    let message = short(store.transact(move |tx| volumes::create(tx, request)).await);
    assert_eq!(
        message,
        "disk is not enough on this host: 1.0 GB are asked for, and 1.0 MB of 1.0 MB are left"
    );
}

#[tokio::test]
async fn processors_are_promised_as_often_as_their_factor_allows() {
    let store = host(Resources { cpus: 1, ..memory_of(64) }).await;
    for number in 0..4 {
        create(&store, &format!("i{number}")).await.expect("four times one processor");
    }
    assert!(short(create(&store, "more").await).starts_with("cpu is not enough"));
}

#[tokio::test]
async fn what_is_down_gives_back_its_processors_and_memory_and_asks_for_them_again() {
    let store = host(memory_of(1)).await;
    let one = create(&store, "one").await.expect("room").meta.uid.clone();
    let running = InstanceStatus { state: State::Running, ..InstanceStatus::default() };
    store.write_status::<Instance>(&one, running.clone()).await.expect("written");
    ask(&store, &one, admission::stop).await.expect("stopped");
    // Its VM is there until it is observed to be gone.
    short(create(&store, "two").await);
    is_down(&store, &one, State::Stopped).await;
    let overlays = store.usage().overlays;
    assert_eq!((store.usage().memory, overlays), (0, 1 << 30), "a disk stays");
    let two = create(&store, "two").await.expect("room").meta.uid.clone();
    short(ask(&store, &one, |tx, uid| admission::start(tx, uid, InstanceStart::default())).await);
    // An instance that is on its way to standby still has its room, so that a restore is always possible.
    store.write_status::<Instance>(&two, running).await.expect("written");
    ask(&store, &two, |tx, uid| admission::standby(tx, uid, StandbyRequest::PLAIN)).await.expect("asked");
    short(ask(&store, &one, |tx, uid| admission::start(tx, uid, InstanceStart::default())).await);
    ask(&store, &two, admission::restore).await.expect("undone");
    let standby = ask(&store, &two, |tx, uid| admission::standby(tx, uid, StandbyRequest::PLAIN)).await;
    let standby = standby.expect("asked").spec.standby;
    is_down(&store, &two, State::Standby).await;
    ask(&store, &one, |tx, uid| admission::start(tx, uid, InstanceStart::default())).await.expect("room");
    short(ask(&store, &two, admission::restore).await);
    short(ask(&store, &two, move |tx, uid| admission::wake(tx, uid, standby, PowerCause::Traffic)).await);
    short(ask(&store, &two, move |tx, uid| admission::regrant(tx, uid, standby)).await);
    ask(&store, &one, |tx, uid| admission::delete(tx, uid, false)).await.expect("deleted");
    short(ask(&store, &two, admission::restore).await);
    store.remove_finalizer::<Instance>(&one).await.expect("gone");
    ask(&store, &two, move |tx, uid| admission::regrant(tx, uid, standby)).await.expect("room");
    assert_eq!(store.usage(), store.scanned_usage());
}

#[tokio::test]
async fn an_instance_of_an_earlier_daemon_is_admitted_however_small_the_host_is() {
    let store = host(memory_of(1)).await;
    let one = create(&store, "one").await.expect("room").meta.uid.clone();
    // As such a daemon left it: without a grant.
    let forget = |tx: &mut Tx<'_>, uid: &Uid| {
        Ok(tx.update_spec::<Instance>(uid, None, |spec| spec.grant = Default::default())?)
    };
    ask(&store, &one, forget).await.expect("stored");
    let node = local(&store).expect("declared");
    let capacity = Resources { memory: Bytes(MIB), ..memory_of(1) };
    let status = NodeStatus { capacity, ..node.status.clone() };
    store.write_status::<Node>(&node.meta.uid, status).await.expect("written");
    assert!(store.get::<Instance>(&one).expect("there").holds_resources());
    short(create(&store, "two").await);
    // A request that takes nothing more is not refused on a host with too little.
    ask(&store, &one, |tx, uid| admission::start(tx, uid, InstanceStart::default())).await.expect("it runs");
    ask(&store, &one, admission::stop).await.expect("stopped");
    assert!(store.get::<Instance>(&one).expect("there").holds_resources(), "until its VM is gone");
}
