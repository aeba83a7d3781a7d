//! Tests of changes of an instance's name, image and network.

use serde_json::{Value, json};
use stead_schemas::api::{Applies, InstancePatch, InstanceRequest};
use stead_schemas::disk::Disk;
use stead_schemas::image::Image;
use stead_schemas::instance::{CardChange, Instance, InstanceStatus, Power, State};
use stead_schemas::meta::{Object, Tags};
use stead_schemas::names::{ImageRef, Name, Uid};
use stead_schemas::network::{Network, NetworkSpec, Nic};
use stead_schemas::node::Node;
use stead_schemas::numbers::RunNo;
use stead_schemas::quantity::Rate;
use stead_schemas::root_image::PinnedImage;
use stead_schemas::snapshot::{Snapshot, SnapshotKind, SnapshotPhase, SnapshotPurpose, SnapshotStatus};
use stead_schemas::volume::Volume;

use super::{Refused, Target, Updated, apply_changes, create, delete, restore_snapshot, update};
use crate::network::admission::declare_network;
use crate::node::local;
use crate::refused::RefusedKind;
use crate::sim::{network_spec, observe_node};
use crate::snapshot::admission as snapshots;
use crate::store::tests::opened;
use crate::store::{Kinds, Store, TransactError, Tx};

/// The image of the changes, as it is stored.
const SECOND: &str = "docker.io/library/second:latest";

async fn opened_with(network: NetworkSpec) -> Store {
    let kinds = Kinds::new().with::<Instance>().with::<Disk>().with::<Snapshot>().with::<Volume>();
    let store = opened(kinds.with::<Image>().with::<Node>().with::<Network>().with::<Nic>());
    observe_node(&store).await;
    store.transact(move |tx| declare_network(tx, network)).await.expect("declared");
    store
}

async fn created(store: &Store, name: &str, has_network: bool) -> Uid {
    let body = json!({"name": name, "image": "first", "network": {"enabled": has_network}});
    let request = InstanceRequest::read(body, &local(store).expect("declared").offer()).expect("valid");
    let object = store.transact(move |tx| create(tx, request, "st")).await.expect("created");
    object.meta.uid.clone()
}

/// Opens a store with an instance that runs.
async fn running(has_network: bool) -> (Store, Uid) {
    let store = opened_with(network_spec()).await;
    let uid = created(&store, "web", has_network).await;
    reports(&store, &uid, InstanceStatus { state: State::Running, ..InstanceStatus::default() }).await;
    (store, uid)
}

async fn reports(store: &Store, uid: &Uid, status: InstanceStatus) {
    store.write_status::<Instance>(uid, status).await.expect("written");
}

async fn stops(store: &Store, uid: &Uid) {
    let moved = uid.clone();
    store.transact(move |tx| super::stop(tx, &moved).map(drop)).await.expect("stopped");
    let run = get(store, uid).spec.run;
    reports(
        store,
        uid,
        InstanceStatus { ended_run: run, state: State::Stopped, ..get(store, uid).status.clone() },
    )
    .await;
}

fn get(store: &Store, uid: &Uid) -> Object<Instance> {
    Object::clone(&store.get::<Instance>(uid).expect("it is there"))
}

async fn asked(store: &Store, uid: &Uid, body: Value) -> Result<Updated, RefusedKind> {
    let patch = InstancePatch::read(body, &local(store).expect("declared").offer()).expect("valid");
    let uid = uid.clone();
    store.transact(move |tx| update(tx, &uid, patch, "st")).await.map_err(|error| match error {
        TransactError::Refused(Refused { kind, .. }) => kind,
        other => panic!("{other:?}"),
    })
}

async fn patched(store: &Store, uid: &Uid, body: Value) -> Object<Instance> {
    let what = body.to_string();
    let updated = asked(store, uid, body).await.unwrap_or_else(|kind| panic!("{what}: {kind:?}"));
    Object::clone(&updated.object)
}

/// Carries out the changes as the reconciler does.
async fn applied(store: &Store, uid: &Uid) -> Object<Instance> {
    let (moved, generation) = (uid.clone(), get(store, uid).meta.generation);
    store.transact(move |tx| apply_changes(tx, &moved, generation)).await.expect("applied");
    get(store, uid)
}

fn image(store: &Store, name: &str) -> Uid {
    let reference: ImageRef = name.parse().expect("valid");
    store.find::<Image>(&Name::from(&reference)).expect("it is asked for").meta.uid.clone()
}

/// Lists the cards that are not being deleted.
fn cards(store: &Store) -> Vec<Uid> {
    let nics = store.list::<Nic>();
    nics.iter().filter(|nic| !nic.meta.is_deleting()).map(|nic| nic.meta.uid.clone()).collect()
}

#[tokio::test]
async fn a_rename_moves_the_name_and_is_refused_like_a_creation() {
    let (store, uid) = running(false).await;
    let other = created(&store, "db", false).await;
    let find = |name: &str| {
        store.find::<Instance>(&Name::resource(name).expect("valid")).map(|object| object.meta.uid.clone())
    };
    let before = get(&store, &uid).meta;
    let renamed = patched(&store, &uid, json!({"name": "shop"})).await.meta;
    assert_eq!((find("web"), find("shop")), (None, Some(uid.clone())));
    assert_eq!(renamed.generation, before.generation);
    assert!(renamed.resource_version > before.resource_version);
    // The name that it has changes nothing.
    assert_eq!(patched(&store, &uid, json!({"name": "shop"})).await.meta, renamed);
    assert_eq!(asked(&store, &uid, json!({"name": "db"})).await.err(), Some(RefusedKind::NameTaken));
    assert_eq!(find("db"), Some(other.clone()));
    // The name of an instance that is being deleted is free, as at a creation.
    store.transact(move |tx| delete(tx, &other, false)).await.expect("requested");
    patched(&store, &uid, json!({"name": "db", "tags": {"team": "a"}})).await;
    assert_eq!((find("shop"), find("db")), (None, Some(uid.clone())));
    created(&store, "web", false).await;
    store.transact(move |tx| delete(tx, &uid, false)).await.expect("requested");
    assert_eq!(find("db"), None);
}

#[tokio::test]
async fn another_image_is_pulled_at_once_and_comes_with_an_empty_disk() {
    let (store, uid) = running(false).await;
    let before = get(&store, &uid).spec;
    let waits = patched(&store, &uid, json!({"image": "second"})).await.spec;
    let next = waits.pending.image.as_ref().expect("it waits");
    assert_eq!((&next.image, waits.pending.fields()), (&image(&store, "second"), vec!["image"]));
    assert_eq!((&waits.image, &waits.allocated), (&before.image, &before.allocated));
    // The present image does not wait, but what it means now does.
    let back = patched(&store, &uid, json!({"image": "first", "platform": "linux/amd64"})).await.spec;
    assert_eq!(back, before);
    let again = patched(&store, &uid, json!({"pull": "always"})).await.spec;
    assert_eq!(again.pending.image.map(|next| (next.image, next.pull)), Some((image(&store, "first"), 2)));

    patched(&store, &uid, json!({"image": "second", "overlay_size": "20GB"})).await;
    let usage = store.usage();
    let digest = format!("sha256:{}", "b".repeat(64)).parse().expect("valid");
    let pinned = PinnedImage { image: image(&store, "second"), pull: 0, digest };
    let status = get(&store, &uid).status;
    reports(&store, &uid, InstanceStatus { next_image: Some(pinned.clone()), ..status }).await;
    let after = applied(&store, &uid).await;
    assert_eq!((after.spec.image.to_string().as_str(), after.spec.image_version), (SECOND, 1));
    assert_eq!((&after.spec.allocated.image, after.content()), (&pinned.image, Some(&pinned.digest)));
    let disk = store.get::<Disk>(&after.spec.allocated.disk).expect("a new one");
    assert_ne!(after.spec.allocated.disk, before.allocated.disk);
    assert_eq!((disk.spec.size, disk.spec.source.as_ref()), (after.spec.overlay, None));
    let old = store.get::<Disk>(&before.allocated.disk);
    assert!(old.is_none_or(|old| old.meta.is_deleting()));
    assert_eq!(store.usage(), usage, "what was admitted is what is taken");
    assert!(after.spec.pending.is_empty());
}

#[tokio::test]
async fn a_program_is_started_again_when_its_new_image_is_there() {
    let (store, uid) = running(false).await;
    let updated = asked(&store, &uid, json!({"image": "second", "vcpus": 3, "restart": true})).await;
    let updated = updated.expect("accepted");
    let changes: Vec<_> = updated.changes.iter().map(|(name, applies)| (name.as_str(), *applies)).collect();
    assert_eq!(changes, [("image", Applies::WithRestart), ("vcpus", Applies::WithRestart)]);
    let object = get(&store, &uid);
    assert_eq!((object.spec.run, object.is_restart_due()), (RunNo(1), false));
    let digest = format!("sha256:{}", "b".repeat(64)).parse().expect("valid");
    let pinned = PinnedImage { image: image(&store, "second"), pull: 0, digest };
    let ready = InstanceStatus { next_image: Some(pinned), ..object.status };
    reports(&store, &uid, ready).await;
    assert!(get(&store, &uid).is_restart_due());
    let restarted = applied(&store, &uid).await;
    assert_eq!((restarted.spec.run, restarted.is_restart_due()), (RunNo(2), false));
    assert_eq!(restarted.spec.pending.fields(), ["vcpus", "image"]);
    // An image that is not wanted any more is not waited for.
    patched(&store, &uid, json!({"image": "third", "restart": true})).await;
    patched(&store, &uid, json!({"image": "first"})).await;
    assert!(get(&store, &uid).is_restart_due());
    stops(&store, &uid).await;
    let stopped = applied(&store, &uid).await.spec;
    assert_eq!((stopped.power, stopped.vcpus, stopped.pending.is_empty()), (Power::Stopped, 3, true));
}

#[tokio::test]
async fn a_card_has_its_addresses_when_it_is_asked_for_and_goes_when_it_is_not_used() {
    let (store, uid) = running(false).await;
    let limited = json!({"network": {"enabled": true, "bandwidth_download": "8Mbps"}, "vcpus": 4});
    let waits = patched(&store, &uid, limited).await.spec;
    let Some(CardChange::Add(nic)) = waits.pending.card.clone() else { panic!("{waits:?}") };
    assert_eq!((waits.has_network, waits.allocated.nic.as_ref()), (false, None));
    assert_eq!(patched(&store, &uid, json!({"network": {"enabled": true}})).await.spec, waits);
    assert_eq!(cards(&store), std::slice::from_ref(&nic));
    let back = patched(&store, &uid, json!({"network": {"enabled": false}})).await.spec;
    assert_eq!((back.pending.fields(), back.rates.download), (vec!["vcpus"], None));
    assert_eq!(cards(&store), []);

    patched(&store, &uid, json!({"network": {"enabled": true}})).await;
    patched(&store, &uid, json!({"network": {"bandwidth_upload": "16Mbps"}})).await;
    let has = applied(&store, &uid).await.spec;
    let nic = has.allocated.nic.clone().expect("it is used");
    let upload = store.get::<Nic>(&nic).expect("it is there").spec.bandwidth.upload;
    assert_eq!((has.has_network, upload, cards(&store)), (true, Some(Rate(2_000_000)), vec![nic.clone()]));

    let loses = patched(&store, &uid, json!({"network": {"enabled": false}})).await.spec;
    assert_eq!((loses.pending.card, loses.allocated.nic), (Some(CardChange::Remove), Some(nic.clone())));
    let keeps = patched(&store, &uid, json!({"network": {"enabled": true}})).await.spec;
    assert_eq!((keeps.pending.card, keeps.allocated.nic), (None, Some(nic)));
    patched(&store, &uid, json!({"network": {"enabled": false}})).await;
    let lost = applied(&store, &uid).await.spec;
    assert_eq!((lost.has_network, lost.allocated.nic, lost.rates.upload), (false, None, None));
    assert_eq!(cards(&store), []);
}

#[tokio::test]
async fn what_a_change_of_the_network_contradicts_is_refused_and_leaves_nothing() {
    let mut small = network_spec();
    small.gateway.prefix = 30;
    let store = opened_with(small).await;
    let uid = created(&store, "web", true).await;
    let alone = created(&store, "db", false).await;
    let tcp = json!({"type": "tcp", "tcp": {"port": 80}});
    patched(&store, &uid, json!({"health_check": tcp})).await;
    let off = json!({"network": {"enabled": false}});
    assert_eq!(asked(&store, &uid, off).await.err(), Some(RefusedKind::InvalidHealthCheck));
    let off = json!({"network": {"enabled": false}, "health_check": {"type": "none"}});
    patched(&store, &uid, off).await;
    // The only address is in use until the start that gives it back.
    let on = || json!({"network": {"enabled": true}, "health_check": {"type": "tcp", "tcp": {"port": 80}}});
    assert_eq!(asked(&store, &alone, on()).await.err(), Some(RefusedKind::NoRoom));
    let limited = json!({"network": {"bandwidth_upload": "8Mbps"}});
    assert_eq!(asked(&store, &alone, limited).await.err(), Some(RefusedKind::InvalidUpload));
    assert_eq!(cards(&store).len(), 1);
    let nic = applied(&store, &uid).await.spec.allocated.nic;
    assert_eq!(nic, None);
    for nic in store.list::<Nic>() {
        store.remove_finalizer::<Nic>(&nic.meta.uid).await.expect("its links are gone");
    }
    assert_eq!(patched(&store, &alone, on()).await.spec.pending.fields(), ["network.enabled"]);
}

#[tokio::test]
async fn a_stopped_instance_has_its_changes_at_once_and_a_restore_undoes_them() {
    let (store, uid) = running(true).await;
    stops(&store, &uid).await;
    let before = get(&store, &uid).spec;
    let (moved, kind) = (uid.clone(), SnapshotKind::Stopped);
    let kept = move |tx: &mut Tx<'_>| {
        let (purpose, tags) = (SnapshotPurpose::Kept, Tags::new());
        let request = snapshots::CreateRequest {
            kind,
            name: None,
            tags,
            purpose,
            compression: None,
            pool: 0,
            schedule: None,
        };
        snapshots::create(tx, &moved, request)
    };
    let snapshot = store.transact(kept).await.expect("created").meta.uid.clone();
    let ready = SnapshotStatus { phase: SnapshotPhase::Ready, ..SnapshotStatus::default() };
    store.write_status::<Snapshot>(&snapshot, ready).await.expect("written");

    let changed = patched(&store, &uid, json!({"image": "second", "network": {"enabled": false}})).await.spec;
    assert_eq!((changed.image_version, changed.has_network, changed.pending.is_empty()), (1, false, true));
    assert_eq!((&changed.allocated.image, cards(&store)), (&image(&store, "second"), vec![]));
    let restore = {
        let uid = uid.clone();
        move |tx: &mut Tx<'_>| restore_snapshot(tx, &uid, &snapshot, Target::default(), "st")
    };
    let restored = store.transact(restore).await.expect("restored").spec.clone();
    assert_eq!((&restored.image, &restored.allocated.image), (&before.image, &before.allocated.image));
    assert_eq!((restored.image_version, restored.has_network), (2, true));
    assert_eq!(restored.allocated.nic.into_iter().collect::<Vec<_>>(), cards(&store));
}
