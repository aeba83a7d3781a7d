//! Stored objects of an earlier release are read with their old meaning.
//!
//! `stored/d987b61.tar.zst` is the database of commit d987b61, written by its daemon with real VMs: a running VM, a
//! VM in standby, a VM whose program ended and is started again later, a VM whose VMM died, and also a snapshot, a
//! volume and an ingress. Launches were identified by their times then.

use std::path::Path;

use jiff::Timestamp;
use stead_controllers::kinds;
use stead_controllers::node::{self, local};
use stead_controllers::sim::node_spec;
use stead_controllers::store::Store;
use stead_schemas::ingress::Ingress;
use stead_schemas::instance::{Instance, State};
use stead_schemas::meta::Object;
use stead_schemas::numbers::{Generation, LaunchId, RunNo, StandbyNo};
use stead_schemas::snapshot::Snapshot;
use stead_schemas::volume::Volume;

const STORED: &[u8] = include_bytes!("stored/d987b61.tar.zst");
/// Time of the second launch of the VM of the instance `health`, from its `machine.json`.
const SECOND_LAUNCH: &str = "2026-11-26T16:56:55.389535815Z";

fn unpack(directory: &Path) {
    let plain = zstd::stream::read::Decoder::new(STORED).expect("it is zstd");
    tar::Archive::new(plain).unpack(directory).expect("unpacked");
}

fn instance(store: &Store, name: &str) -> Object<Instance> {
    let all = store.list::<Instance>();
    let found = all.iter().find(|instance| instance.meta.name.as_str() == name).expect("it was stored");
    Object::clone(found)
}

#[tokio::test]
async fn what_an_earlier_release_stored_is_read_as_what_it_was() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    unpack(scratch.path());
    let opened = stead::store::open(scratch.path(), kinds()).expect("it opens");
    let store = &opened.store;
    assert_eq!(store.unreadable(), []);
    let others =
        (store.list::<Snapshot>().len(), store.list::<Volume>().len(), store.list::<Ingress>().len());
    assert_eq!(others, (1, 1, 1));

    // The node of this host is younger than that release: its daemon declares it.
    assert_eq!(local(store), None);
    let writer = tokio::spawn(opened.writer.run(std::future::pending::<()>()));
    store.transact(|tx| node::admission::declare(tx, node_spec())).await.expect("declared");
    assert!(local(store).is_some_and(|node| !node.is_observed()));
    writer.abort();

    let run = instance(store, "run");
    assert_eq!((run.status.state, run.spec.run, run.status.ended_run), (State::Running, RunNo(1), RunNo(0)));
    assert_eq!(run.meta.generation, Generation(1));
    assert!(run.status.started_at.is_some() && run.status.started_launch.is_none());

    assert!(run.content().is_some() && run.content() == run.status.image_digest.as_ref());
    assert!(run.spec.pending.is_empty());

    let standby = instance(store, "stand");
    assert_eq!((standby.status.state, standby.spec.standby), (State::Standby, StandbyNo(1)));
    assert!(standby.status.has_saved_memory);

    let restarted = instance(store, "restart");
    let ended = restarted.status.ended_launch.expect("its launch ended");
    assert!(ended.0 > u64::from(u32::MAX), "a time that was read as a number: {ended}");
    assert!(restarted.status.restart.next_attempt_at.is_some());

    let died = instance(store, "health");
    let second: Timestamp = SECOND_LAUNCH.parse().expect("a time");
    assert_eq!(died.status.health.of.map(|asked| asked.launch), Some(LaunchId::from(second)));
    let first = died.status.last_death.expect("its VMM died").launch;
    assert!(first != LaunchId::default() && first < LaunchId::from(second));
}
