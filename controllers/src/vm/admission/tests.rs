//! Tests of admission of instances.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use serde_json::{Value, json};
use stead_schemas::api::{CompressionAsked, InstancePatch, InstanceRequest, StandbyRequest, VolumeCreate};
use stead_schemas::capabilities::VmmCapabilities;
use stead_schemas::compression::{Algorithm, Compression, DesiredCompression};
use stead_schemas::disk::{Disk, DiskPurpose, DiskSpec};
use stead_schemas::image::Image;
use stead_schemas::instance::{Hypervisor, Instance, InstanceSpec, InstanceStatus, Power, State};
use stead_schemas::meta::{Object, Tags};
use stead_schemas::names::{Name, Uid};
use stead_schemas::node::{Accelerator, HypervisorStatus, Node, NodeStatus};
use stead_schemas::policy::AutoStandbyPolicy;
use stead_schemas::quantity::{Bytes, GoDuration};
use stead_schemas::snapshot::{
    Snapshot, SnapshotKind, SnapshotPhase, SnapshotPurpose, SnapshotSpec, SnapshotStatus,
};
use stead_schemas::volume::{Access, Volume, VolumeMount};

use super::capabilities::Declared;
use super::from_snapshot::goal;
use super::{
    ForkRequest, Refused, Target, create, expire, fork, live, owner, restore_snapshot, standby, stop, update,
};
use crate::disk::admission::new_disk;
use crate::refused::RefusedKind;
use crate::sim::{hypervisors, node_spec, observe_node_with};
use crate::snapshot::admission as snapshots;
use crate::store::tests::opened;
use crate::store::{Kinds, New, Store, TransactError, Tx, TxError};

/// The capabilities of a VMM that declares everything that admission asks for.
const ALL: VmmCapabilities = VmmCapabilities {
    standby: true,
    fork_memory: true,
    replace_tap: true,
    resize_memory: true,
    io_limits: true,
    live_volumes: true,
    devices: true,
    volume_devices_max: 8,
    vcpus_max: 16,
    card_queues_max: 8,
};

/// Returns the hypervisor of the tests' example.
fn example_hypervisor() -> Hypervisor {
    crate::vm::example(Power::Running, 1, 0).spec.hypervisor
}

/// Opens a store whose node has Firecracker with these capabilities, and other hypervisors with all.
async fn opened_with(firecracker: VmmCapabilities) -> Store {
    let kinds = Kinds::new().with::<Instance>().with::<Disk>().with::<Snapshot>();
    let store = opened(kinds.with::<Volume>().with::<Image>().with::<Node>());
    let mut all = hypervisors(&[example_hypervisor(), Hypervisor::CloudHypervisor], ALL);
    all.extend(hypervisors(&[Hypervisor::Firecracker], firecracker));
    observe_node_with(&store, all).await;
    store
}

/// Opens a store with one instance in standby, whose memory is to be compressed.
async fn in_standby() -> (Store, Uid) {
    let store = opened_with(ALL).await;
    let mut object = crate::vm::example(Power::Standby, 1, 0);
    let how = Compression { algorithm: Algorithm::Zstd, level: 1 };
    object.spec.compression = Some(DesiredCompression { how, not_before: Timestamp::UNIX_EPOCH });
    object.spec.expires_at = Some(Timestamp::MAX);
    let uid = object.meta.uid.clone();
    let (name, spec) = (object.meta.name, object.spec);
    let new = New { uid: Some(uid.clone()), name, tags: Tags::new(), owner: None, spec };
    store.transact(move |tx| tx.create::<Instance>(new)).await.expect("created");
    let status = InstanceStatus { state: State::Standby, ..InstanceStatus::default() };
    store.write_status::<Instance>(&uid, status).await.expect("written");
    (store, uid)
}

#[tokio::test]
async fn a_fork_takes_neither_the_compression_nor_the_end_of_its_source_along() {
    let (store, source) = in_standby().await;
    let request =
        ForkRequest { name: Name::resource("fork").expect("valid"), from_running: false, target: None };
    let forked = store.transact(move |tx| fork(tx, &source, request, "st")).await.expect("forked");
    let spec = &forked.instance.spec;
    assert_eq!((spec.power, spec.compression, spec.expires_at), (Power::Standby, None, None));
    assert_eq!(spec.origin.as_ref().and_then(|origin| origin.memory_for_run), Some(spec.run));
}

#[tokio::test(start_paused = true)]
async fn a_useless_pooled_instance_is_deleted_and_a_taken_instance_is_not() {
    let (store, uid) = in_standby().await;
    for (power, is_deleted) in [(Power::Running, false), (Power::Warm, true)] {
        let moved = uid.clone();
        let expired = store.transact(move |tx| {
            let change = |spec: &mut InstanceSpec| (spec.power, spec.expires_at) = (power, None);
            tx.update_spec::<Instance>(&moved, None, change)?;
            Ok::<_, TxError>(expire(tx, &moved).is_ok())
        });
        assert!(expired.await.expect("stored"), "{power:?}");
        let object = store.get::<Instance>(&uid).expect("it goes when its host things are gone");
        assert_eq!(object.meta.is_deleting(), is_deleted, "{power:?}");
    }
}

/// Returns an observed node with these hypervisors.
fn node(hypervisors: BTreeMap<Hypervisor, HypervisorStatus>) -> Object<Node> {
    let status = NodeStatus { hypervisors, accelerator: Some(Accelerator::Kvm), ..NodeStatus::default() };
    Object { meta: crate::vm::example(Power::Running, 1, 0).meta, spec: node_spec(), status }
}

/// Returns a ready snapshot of an instance that is stopped or in standby.
fn snapshot(kind: SnapshotKind, hypervisor: Hypervisor) -> Object<Snapshot> {
    let mut source = crate::vm::example(Power::Stopped, 1, 1);
    source.spec.hypervisor = hypervisor;
    Object {
        spec: SnapshotSpec {
            source: source.meta.uid.clone(),
            source_name: source.meta.name.clone(),
            kind,
            name: None,
            purpose: SnapshotPurpose::Kept,
            schedule: None,
            instance: Box::new(source.spec),
            image_digest: None,
            compression: None,
            pool: 0,
            volume_disks: Vec::new(),
        },
        meta: source.meta,
        status: SnapshotStatus::default(),
    }
}

#[test]
fn a_disk_goes_to_any_hypervisor_and_a_memory_to_its_own_alone() {
    use Hypervisor::{CloudHypervisor, Firecracker};
    use SnapshotKind::{Standby, Stopped};
    for (kind, taken_on, asked, is_refused) in [
        (Stopped, CloudHypervisor, None, false),
        (Stopped, CloudHypervisor, Some(CloudHypervisor), false),
        (Stopped, CloudHypervisor, Some(Firecracker), false),
        (Stopped, Firecracker, Some(CloudHypervisor), false),
        (Standby, CloudHypervisor, None, false),
        (Standby, Firecracker, None, false),
        (Standby, Firecracker, Some(Firecracker), false),
        (Standby, CloudHypervisor, Some(Firecracker), true),
        (Standby, Firecracker, Some(CloudHypervisor), true),
    ] {
        // The request is refused even where the memory would not be used.
        let power = asked.map(|_| Power::Stopped);
        let all = hypervisors(&[CloudHypervisor, Firecracker], ALL);
        let reached = goal(&node(all), &snapshot(kind, taken_on), Target { power, hypervisor: asked });
        match reached {
            Ok(goal) => {
                assert!(!is_refused, "{kind:?} {taken_on:?} {asked:?} {power:?}");
                assert_eq!(goal.hypervisor, asked.unwrap_or(taken_on));
            }
            Err(refused) => {
                assert!(is_refused, "{kind:?} {taken_on:?} {asked:?} {power:?}");
                let message = refused.to_string();
                assert_eq!(refused.kind, RefusedKind::Invalid, "{refused:?}");
                assert_eq!(refused.path.as_deref(), Some("target_hypervisor"));
                assert!(message.starts_with("target_hypervisor must be "), "{message}");
            }
        }
    }
}

/// Puts a ready snapshot of the instance into the store, and a disk for the instance to lose.
fn stage_restore(tx: &mut Tx<'_>, uid: &Uid, kind: SnapshotKind) -> Result<Arc<Object<Snapshot>>, Refused> {
    let size = live(tx, uid)?.spec.overlay;
    let disk = new_disk(tx, owner(uid), DiskSpec::empty(size, DiskPurpose::RootOverlay))?;
    let instance = tx.update_spec::<Instance>(uid, None, |spec| spec.allocated.disk = disk)?;
    let mut spec = snapshot(kind, instance.spec.hypervisor).spec;
    spec.instance = Box::new(instance.spec.clone());
    let name = Name::resource("s").expect("valid");
    Ok(tx.create::<Snapshot>(New { uid: None, name, tags: Tags::new(), owner: None, spec })?)
}

#[tokio::test]
async fn a_restore_in_place_changes_disk_run_and_hypervisor_at_once_and_a_refused_one_nothing() {
    for (kind, is_refused) in [(SnapshotKind::Stopped, false), (SnapshotKind::Standby, true)] {
        let (store, uid) = in_standby().await;
        let moved = uid.clone();
        let staged = store.transact(move |tx| stage_restore(tx, &moved, kind)).await.expect("staged");
        let snapshot = staged.meta.uid.clone();
        let status = SnapshotStatus { phase: SnapshotPhase::Ready, ..SnapshotStatus::default() };
        store.write_status::<Snapshot>(&snapshot, status).await.expect("written");
        let before = store.get::<Instance>(&uid).expect("there");
        let target = Target { power: None, hypervisor: Some(Hypervisor::Firecracker) };
        let moved = uid.clone();
        let restored = store.transact(move |tx| restore_snapshot(tx, &moved, &snapshot, target, "st")).await;
        let after = store.get::<Instance>(&uid).expect("there");
        assert_eq!(restored.is_err(), is_refused, "{restored:?}");
        if is_refused {
            assert_eq!(after, before);
            continue;
        }
        let (was, is) = (&before.spec, &after.spec);
        assert_eq!((is.hypervisor, is.run), (Hypervisor::Firecracker, was.run.next()));
        assert_ne!(is.allocated.disk, was.allocated.disk);
    }
}

#[test]
fn as_many_devices_fit_as_the_hypervisor_declares_and_not_one_more() {
    let uid: Uid = "tz4a98xxat96iws9zmbrgj3a".parse().expect("valid");
    let mount = |access| VolumeMount {
        volume: uid.clone(),
        path: "/data".to_owned(),
        access,
        first_disk: None,
        is_leaving: false,
    };
    let over = mount(Access::Overlay { disk: uid.clone(), size: Bytes(1) });
    for most in [3, 18] {
        let has = VmmCapabilities { volume_devices_max: most, ..ALL };
        let declared = Declared { hypervisor: Hypervisor::Firecracker, has };
        let mut mounts = vec![mount(Access::ReadOnly); most];
        assert_eq!(declared.check_volumes(&mounts), Ok(()), "{most}");
        // The number of mounts is the same, but one of them takes two devices.
        mounts[0] = over.clone();
        let refused = declared.check_volumes(&mounts).expect_err("one too many");
        assert!(refused.to_string().contains(&format!("need {} devices", most + 1)), "{refused}");
    }
}

/// Requests an instance on the made-up VMM with one more field, and returns the refusal's kind and field.
async fn created_with(key: &str, value: Value) -> (Option<RefusedKind>, String) {
    let store = opened_with(VmmCapabilities::NONE).await;
    let volume = VolumeCreate {
        id: None,
        name: Name::resource("v").expect("valid"),
        size: Bytes(1 << 30),
        tags: Tags::new(),
    };
    store.transact(move |tx| crate::volume::admission::create(tx, volume)).await.expect("created");
    let mut body = json!({
        "name": "a", "image": "b", "hypervisor": "firecracker", "vcpus": 1, "network": {"enabled": false},
    });
    body[key] = value;
    let node = crate::node::local(&store).expect("declared");
    let request = match InstanceRequest::read(body, &node.offer()) {
        Ok(request) => request,
        // A field that no hypervisor of this server can carry out yet.
        Err(errors) => {
            let first = errors.iter().next().expect("not empty");
            assert_eq!(first.code, "not_supported");
            return (None, first.path.clone());
        }
    };
    match store.transact(move |tx| create(tx, request, "st")).await {
        Err(TransactError::Refused(refused)) => (Some(refused.kind), refused.path.unwrap_or_default()),
        created => panic!("{key}: {created:?}"),
    }
}

#[tokio::test]
async fn each_field_that_a_vmm_does_not_declare_is_refused_by_its_path() {
    let unsupported = Some(RefusedKind::UnsupportedField);
    let compression = json!({"compression": {"enabled": true, "algorithm": "zstd"}});
    let mount = json!([{"volume_id": "v", "mount_path": "/data", "readonly": true}]);
    for (key, value, expected) in [
        ("vcpus", json!(2), unsupported),
        ("auto_standby", json!({"enabled": true, "idle_timeout": "5m"}), unsupported),
        ("snapshot_policy", compression, unsupported),
        ("volumes", mount, Some(RefusedKind::Invalid)),
        ("hotplug_size", json!("1GB"), unsupported),
        ("disk_io_bps", json!("1MB/s"), unsupported),
        ("devices", json!(["l4"]), None),
    ] {
        assert_eq!(created_with(key, value).await, (expected, key.to_owned()), "{key}");
    }
}

/// Puts an instance on Firecracker, in this state, into a store in which Firecracker has these capabilities.
async fn on_firecracker(has: VmmCapabilities, power: Power, state: State) -> (Store, Uid) {
    let store = opened_with(has).await;
    let mut object = crate::vm::example(power, 1, u64::from(state == State::Stopped));
    object.spec.hypervisor = Hypervisor::Firecracker;
    let uid = object.meta.uid.clone();
    let (name, spec) = (object.meta.name, object.spec);
    let new = New { uid: Some(uid.clone()), name, tags: Tags::new(), owner: None, spec };
    store.transact(move |tx| tx.create::<Instance>(new)).await.expect("created");
    let status = InstanceStatus { state, ended_run: object.status.ended_run, ..InstanceStatus::default() };
    store.write_status::<Instance>(&uid, status).await.expect("written");
    (store, uid)
}

fn desired(kind: SnapshotKind, pool: u32) -> snapshots::CreateRequest {
    let (purpose, tags) = (SnapshotPurpose::Kept, Tags::new());
    snapshots::CreateRequest { kind, name: None, tags, purpose, compression: None, pool, schedule: None }
}

/// Returns the kind and the field of a refusal.
fn refusal<T: std::fmt::Debug>(answer: Result<T, TransactError<Refused>>) -> (RefusedKind, Option<String>) {
    match answer {
        Err(TransactError::Refused(refused)) => (refused.kind, refused.path),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn each_verb_that_a_vmm_does_not_declare_is_refused() {
    let verb = (RefusedKind::UnsupportedVerb, None);
    let (store, uid) = on_firecracker(VmmCapabilities::NONE, Power::Running, State::Running).await;
    let at = uid.clone();
    let asked = StandbyRequest { compression: CompressionAsked::Unsaid, delay: None };
    assert_eq!(refusal(store.transact(move |tx| standby(tx, &at, asked)).await), verb);
    let at = uid.clone();
    let request = ForkRequest { name: Name::resource("f").expect("valid"), from_running: true, target: None };
    assert_eq!(refusal(store.transact(move |tx| fork(tx, &at, request, "st")).await), verb);
    let at = uid.clone();
    let memory = desired(SnapshotKind::Standby, 0);
    assert_eq!(refusal(store.transact(move |tx| snapshots::create(tx, &at, memory)).await), verb);
    let at = uid.clone();
    let policy = AutoStandbyPolicy {
        enabled: true,
        idle_timeout: Some(GoDuration(std::time::Duration::from_secs(60))),
        ignore_source_cidrs: Vec::new(),
        ignore_destination_ports: Vec::new(),
        wake_on_traffic: false,
    };
    let patch = InstancePatch { auto_standby: Some(policy), ..InstancePatch::default() };
    let field = |path: &str| (RefusedKind::UnsupportedField, Some(path.to_owned()));
    assert_eq!(refusal(store.transact(move |tx| update(tx, &at, patch, "st")).await), field("auto_standby"));
    // What needs no capability is accepted.
    let at = uid.clone();
    store.transact(move |tx| stop(tx, &at)).await.expect("a stop");

    let savable = VmmCapabilities { standby: true, ..VmmCapabilities::NONE };
    let (store, uid) = on_firecracker(savable, Power::Running, State::Running).await;
    let pooled = desired(SnapshotKind::Standby, 1);
    let at = uid.clone();
    assert_eq!(
        refusal(store.transact(move |tx| snapshots::create(tx, &at, pooled)).await),
        field("pool_size")
    );
    let memory = desired(SnapshotKind::Standby, 0);
    let at = uid.clone();
    store.transact(move |tx| snapshots::create(tx, &at, memory)).await.expect("a memory that is saved");

    let (store, uid) = on_firecracker(VmmCapabilities::NONE, Power::Stopped, State::Stopped).await;
    let disk = desired(SnapshotKind::Stopped, 0);
    store.transact(move |tx| snapshots::create(tx, &uid, disk)).await.expect("a disk");
}

#[test]
fn a_snapshot_moves_only_to_a_vmm_that_declares_what_it_needs() {
    let node_with = |has| {
        let mut all = hypervisors(&[Hypervisor::CloudHypervisor], ALL);
        all.extend(hypervisors(&[Hypervisor::Firecracker], has));
        node(all)
    };
    let to_firecracker = Target { power: Some(Power::Running), hypervisor: Some(Hypervisor::Firecracker) };
    let refused = |has, vcpus, is_automatic, kind| {
        let on =
            if kind == SnapshotKind::Standby { Hypervisor::Firecracker } else { Hypervisor::CloudHypervisor };
        let mut snapshot = snapshot(kind, on);
        snapshot.spec.instance.vcpus = vcpus;
        if is_automatic {
            let body = json!({"enabled": true, "idle_timeout": "5m"});
            snapshot.spec.instance.auto_standby = serde_json::from_value(body).ok();
        }
        goal(&node_with(has), &snapshot, to_firecracker).err().map(|refused| (refused.kind, refused.path))
    };
    let field = Some((RefusedKind::UnsupportedField, Some("target_hypervisor".to_owned())));
    assert_eq!(refused(VmmCapabilities::NONE, 1, false, SnapshotKind::Stopped), None);
    assert_eq!(refused(VmmCapabilities::NONE, 2, false, SnapshotKind::Stopped), field);
    assert_eq!(refused(VmmCapabilities::NONE, 1, true, SnapshotKind::Stopped), field);
    assert_eq!(refused(ALL, 2, true, SnapshotKind::Stopped), None);
    let verb = Some((RefusedKind::UnsupportedVerb, None));
    assert_eq!(refused(VmmCapabilities::NONE, 1, false, SnapshotKind::Standby), verb);
    assert_eq!(refused(ALL, 1, false, SnapshotKind::Standby), None);
    let unknown = goal(
        &node(hypervisors(&[], ALL)),
        &snapshot(SnapshotKind::Stopped, Hypervisor::Vz),
        Target::default(),
    );
    assert_eq!(unknown.err().map(|refused| refused.kind), Some(RefusedKind::UnsupportedVerb), "no driver");
}

#[tokio::test]
async fn until_the_host_was_observed_requests_that_depend_on_it_wait() {
    let store = opened(Kinds::new().with::<Instance>().with::<Snapshot>().with::<Node>());
    store.transact(|tx| crate::node::admission::declare(tx, node_spec())).await.expect("declared");
    let object = crate::vm::example(Power::Running, 1, 0);
    let uid = object.meta.uid.clone();
    let new = New {
        uid: Some(uid.clone()),
        name: object.meta.name,
        tags: Tags::new(),
        owner: None,
        spec: object.spec,
    };
    store.transact(move |tx| tx.create::<Instance>(new)).await.expect("created");
    let status = InstanceStatus { state: State::Running, ..InstanceStatus::default() };
    store.write_status::<Instance>(&uid, status).await.expect("written");
    let asked = StandbyRequest { compression: CompressionAsked::Unsaid, delay: None };
    let at = uid.clone();
    let refused = refusal(store.transact(move |tx| standby(tx, &at, asked)).await);
    assert_eq!(refused.0, RefusedKind::NotObserved);
    store.transact(move |tx| stop(tx, &uid)).await.expect("a stop needs no capability");
}
