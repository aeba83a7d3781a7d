//! Tests of the mounts that may share a volume, and of the users that prevent its deletion.

use jiff::Timestamp;
use stead_schemas::instance::{Instance, Power};
use stead_schemas::meta::{Object, Tags};
use stead_schemas::names::{Name, Uid};
use stead_schemas::node::Node;
use stead_schemas::quantity::Bytes;
use stead_schemas::snapshot::Snapshot;
use stead_schemas::volume::{Access, VolumeMount};

use super::admission::{check_free, create, delete};
use super::*;
use crate::refused::Refused;
use crate::store::tests::opened;
use crate::store::{Kinds, New, Tx};

fn name(text: &str) -> Name {
    Name::resource(text).expect("valid")
}

/// Opens a store with one volume.
async fn with_volume() -> (Store, Uid) {
    let kinds = Kinds::new().with::<Instance>().with::<Disk>().with::<Snapshot>().with::<Volume>();
    let kinds = kinds.with::<Node>();
    let store = opened(kinds);
    let request = stead_schemas::api::VolumeCreate {
        id: None,
        name: name("data"),
        size: Bytes(1 << 30),
        tags: Tags::new(),
    };
    let volume = store.transact(move |tx| create(tx, request)).await.expect("created");
    (store, volume.meta.uid.clone())
}

fn mount_in(tx: &mut Tx<'_>, instance: &str, volume: &Uid, access: Access) -> Uid {
    let mut spec = crate::vm::example(Power::Running, 1, 0).spec;
    spec.volumes = vec![VolumeMount {
        volume: volume.clone(),
        path: "/data".to_owned(),
        access,
        first_disk: None,
        is_leaving: false,
    }];
    let new = New { uid: None, name: name(instance), tags: Tags::new(), owner: None, spec };
    tx.create::<Instance>(new).expect("created").meta.uid.clone()
}

#[tokio::test(start_paused = true)]
async fn a_writer_is_alone_and_readers_are_among_themselves() {
    for (theirs, is_writing, is_free) in [
        (Access::ReadWrite, true, false),
        (Access::ReadWrite, false, false),
        (Access::ReadOnly, true, false),
        (Access::ReadOnly, false, true),
    ] {
        let (store, volume) = with_volume().await;
        let moved = (volume.clone(), theirs.clone());
        let checked = store.transact(move |tx| {
            let (volume, theirs) = moved;
            let other = mount_in(tx, "other", &volume, theirs);
            let object = tx.get::<Volume>(&volume).expect("there");
            let me = tx.next_uid();
            let checked = check_free(tx, &object, &me, is_writing);
            assert_eq!(check_free(tx, &object, &other, true), Ok(()), "itself is in nobody's way");
            tx.request_deletion::<Instance>(&other).expect("there");
            assert_eq!(check_free(tx, &object, &me, true), Ok(()), "nor is one that is being deleted");
            Ok::<_, Refused>(checked)
        });
        let checked = checked.await.expect("stored");
        assert_eq!(checked.is_ok(), is_free, "{theirs:?} and writing: {is_writing}: {checked:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_volume_goes_when_nobody_has_it_and_its_disk_goes_with_it() {
    let (store, volume) = with_volume().await;
    let moved = volume.clone();
    let refused = store.transact(move |tx| {
        let other = mount_in(tx, "other", &moved, Access::ReadOnly);
        tx.request_deletion::<Instance>(&other).expect("there");
        delete(tx, &moved)
    });
    // The refused transaction stored nothing.
    assert!(refused.await.is_err());
    assert!(store.list::<Instance>().is_empty());
    let disk = store.get::<Volume>(&volume).expect("there").spec.disk.clone();
    let moved = volume.clone();
    store.transact(move |tx| delete(tx, &moved)).await.expect("deleted");
    store.remove_finalizer::<Volume>(&volume).await.expect("stored");
    assert!(store.get::<Volume>(&volume).is_none());
    assert!(store.get::<Disk>(&disk).is_none_or(|disk| disk.meta.is_deleting()));
}

#[test]
fn a_volume_is_ready_when_its_disk_is() {
    let now = Timestamp::UNIX_EPOCH;
    let uid: Uid = "v00000000000000000000000".parse().expect("valid");
    let meta = crate::vm::example(Power::Running, 1, 0).meta;
    let spec = stead_schemas::volume::VolumeSpec { size: Bytes(1 << 30), disk: uid };
    let object: Object<Volume> = Object { meta, spec, status: VolumeStatus::default() };
    let plan = |trouble: Option<&str>| {
        let seen = Observed { trouble: trouble.map(ToOwned::to_owned), degraded: None };
        VolumeReconciler::plan(&Desired::Present(&object), &seen, now.into())
    };
    assert!(matches!(plan(None), Plan::Converged));
    assert!(matches!(plan(Some("the disk is full")), Plan::Wait(wait)
        if wait.reason == Reason::WaitingForDisk && wait.message == "the disk is full"));
    let seen = Observed { trouble: Some("its disk is gone".to_owned()), degraded: None };
    assert!(matches!(
        VolumeReconciler::plan(&Desired::Absent(Some(&object)), &seen, now.into()),
        Plan::Converged
    ));
}

#[test]
fn a_loss_of_the_disk_is_reported_by_the_volume_with_its_time() {
    let uid: Uid = "v00000000000000000000000".parse().expect("valid");
    let meta = crate::vm::example(Power::Running, 1, 0).meta;
    let spec = stead_schemas::volume::VolumeSpec { size: Bytes(1 << 30), disk: uid };
    let mut object: Object<Volume> = Object { meta, spec, status: VolumeStatus::default() };
    let lost =
        Observed { trouble: None, degraded: Some((Reason::HostFault, "the file went missing".to_owned())) };
    for second in [5, 9] {
        let now = Timestamp::from_second(second).expect("in range");
        let end = PassEnd { now: now.into(), outcome: crate::runtime::Outcome::Converged };
        object.status = VolumeReconciler::status(&object, Some(&lost), &end);
        let found = condition::find(&object.status.conditions, ConditionType::Degraded).expect("said");
        assert_eq!((found.status, found.message.as_str()), (ConditionStatus::True, "the file went missing"));
        assert_eq!(found.last_transition_time.as_second(), 5, "at {second}");
        assert!(condition::is_ready(&object.status.conditions), "there is an empty one");
    }
}
