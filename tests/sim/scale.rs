//! Work that does not grow with the number of objects: the same request costs the same reads of the store among ten
//! instances and among ten thousand, and no listing of the host. It is measured in objects, not in time.

use std::collections::BTreeMap;
use std::time::Duration;

use stead_controllers::checks::{self, Records};
use stead_controllers::host::LinkKind;
use stead_controllers::node::local;
use stead_controllers::sim::{SimRegistryImage, World, network_spec};
use stead_controllers::snapshot::admission as snapshots;
use stead_controllers::store::{MemoryKv, Store, Tx};
use stead_controllers::vm::admission;
use stead_controllers::volume::admission as volumes;
use stead_schemas::api::CompressionAsked;
use stead_schemas::api::{InstanceRequest, InstanceStart, StandbyRequest, VolumeCreate};
use stead_schemas::image::ImageConfig;
use stead_schemas::instance::{Instance, Power, State};
use stead_schemas::limits::PORTS_PER_BRIDGE_MAX;
use stead_schemas::meta::Tags;
use stead_schemas::names::{Name, Uid};
use stead_schemas::network::NetworkSpec;
use stead_schemas::quantity::Bytes;
use stead_schemas::snapshot::{SnapshotKind, SnapshotPurpose};
use tokio::time::sleep;

use crate::daemon::Daemon;

const FEW: usize = 10;
const MANY: usize = 10_000;
/// Number of instances that fill several bridges.
const SEVERAL_BRIDGES: usize = 2000;
/// Resync interval that is longer than a test: a full resync is no part of the cost of a request.
const NEVER: Duration = Duration::from_secs(1_000_000);
/// Time within which all requested work is done, in virtual time.
const DONE: Duration = Duration::from_secs(30);

struct Harness {
    world: World,
    daemon: Daemon,
}

impl Harness {
    /// Creates a host with `count` running instances, each with a network and with a volume that all of them read.
    async fn with(count: usize) -> Self {
        let world = World::new(1);
        let digest = format!("sha256:{}", "a".repeat(64)).parse().expect("valid");
        let config = ImageConfig { cmd: vec!["serve".to_owned()], ..ImageConfig::default() };
        world.serve(&"sim/a".parse().expect("valid"), SimRegistryImage { digest, config });
        let wide = NetworkSpec { gateway: "10.64.0.1/16".parse().expect("valid"), ..network_spec() };
        let daemon = Daemon::start_as(&world, &MemoryKv::new(), 1, wide, NEVER).await;
        let site = Self { world, daemon };
        let name = Name::resource("shared").expect("valid");
        let request = VolumeCreate { id: None, name, size: Bytes(1 << 30), tags: Tags::new() };
        site.store().transact(move |tx| volumes::create(tx, request)).await.expect("created");
        for number in 0..count {
            site.create(&format!("i{number}")).await;
        }
        for _ in 0..100 {
            sleep(DONE).await;
            if site.store().list::<Instance>().iter().all(|one| one.status.state == State::Running) {
                return site;
            }
        }
        panic!("not all instances run");
    }

    fn store(&self) -> &Store {
        &self.daemon.store
    }

    async fn create(&self, name: &str) -> Uid {
        let node = local(self.store()).expect("declared");
        let body = serde_json::json!({
            "name": name, "image": "sim/a", "size": "256MB",
            "volumes": [{ "volume_id": "shared", "mount_path": "/shared", "readonly": true }],
        });
        let request = InstanceRequest::read(body, &node.offer()).expect("valid");
        let created = self.store().transact(move |tx| admission::create(tx, request, "st")).await;
        created.expect("created").meta.uid.clone()
    }

    async fn snapshot(&self, source: &Uid) -> Uid {
        let request = snapshots::CreateRequest {
            kind: SnapshotKind::Standby,
            name: None,
            tags: Tags::new(),
            purpose: SnapshotPurpose::Kept,
            compression: None,
            pool: 0,
            schedule: None,
        };
        let source = source.clone();
        let created = self.store().transact(move |tx| snapshots::create(tx, &source, request)).await;
        created.expect("created").meta.uid.clone()
    }

    async fn fork(&self, snapshot: &Uid) -> Uid {
        let (snapshot, name) = (snapshot.clone(), Name::resource("a-fork").expect("valid"));
        let target = admission::Target { power: Some(Power::Running), hypervisor: None };
        let forked = move |tx: &mut Tx<'_>| admission::fork_snapshot(tx, &snapshot, name, target, "st");
        self.store().transact(forked).await.expect("forked").instance.meta.uid.clone()
    }

    fn state(&self, uid: &Uid) -> Option<State> {
        self.store().get::<Instance>(uid).map(|instance| instance.status.state)
    }

    /// Returns the cost of everything that is done by and for one more instance: reads of the store and listings of
    /// the host, request by request.
    async fn costs(&self) -> BTreeMap<&'static str, (usize, usize)> {
        let mut costs = BTreeMap::new();
        let mut last = (self.store().visits(), self.world.listings());
        let mut cost = |what: &'static str| {
            let now = (self.store().visits(), self.world.listings());
            costs.insert(what, (now.0 - last.0, now.1 - last.1));
            last = (self.store().visits(), self.world.listings());
        };
        sleep(DONE).await;
        cost("nothing");
        let uid = self.create("one-more").await;
        sleep(DONE).await;
        cost("create");
        assert_eq!(self.state(&uid), Some(State::Running));
        let at = uid.clone();
        let asked = StandbyRequest { compression: CompressionAsked::Unsaid, delay: None };
        self.store().transact(move |tx| admission::standby(tx, &at, asked)).await.expect("asked");
        sleep(DONE).await;
        cost("standby");
        assert_eq!(self.state(&uid), Some(State::Standby));
        let snapshot = self.snapshot(&uid).await;
        sleep(DONE).await;
        cost("snapshot");
        let fork = self.fork(&snapshot).await;
        sleep(DONE).await;
        cost("fork");
        assert_eq!(self.state(&fork), Some(State::Running));
        let at = uid.clone();
        self.store().transact(move |tx| admission::restore(tx, &at)).await.expect("asked");
        sleep(DONE).await;
        cost("restore");
        assert_eq!(self.state(&uid), Some(State::Running));
        let at = uid.clone();
        self.store().transact(move |tx| admission::stop(tx, &at)).await.expect("asked");
        sleep(DONE).await;
        cost("stop");
        assert_eq!(self.state(&uid), Some(State::Stopped));
        let at = uid.clone();
        let start = InstanceStart::default();
        self.store().transact(move |tx| admission::start(tx, &at, start)).await.expect("asked");
        sleep(DONE).await;
        cost("start");
        for gone in [uid, fork] {
            let at = gone.clone();
            self.store().transact(move |tx| admission::delete(tx, &at, false)).await.expect("asked");
            sleep(DONE).await;
            assert_eq!(self.state(&gone), None);
        }
        cost("delete");
        self.store().transact(move |tx| snapshots::delete(tx, &snapshot)).await.expect("asked");
        sleep(DONE).await;
        cost("delete the snapshot");
        costs
    }
}

fn run<T>(play: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.expect("a runtime").block_on(play)
}

#[test]
fn a_request_costs_the_same_among_ten_instances_and_among_ten_thousand() {
    let costs = |count| run(async { Harness::with(count).await.costs().await });
    let (among_few, among_many) = (costs(FEW), costs(MANY));
    for (what, (reads, _)) in &among_many {
        let (few, _) = among_few[what];
        // The network of a further bridge costs one more read.
        assert!(*reads <= few + 1, "{what} reads {few} objects among {FEW} and {reads} among {MANY}");
    }
    assert_eq!(among_many["nothing"], (0, 0), "nothing is done for instances to which nothing happens");
    assert!(among_many.values().all(|(_, listings)| *listings == 0), "{among_many:?}");
}

#[test]
fn each_bridge_has_the_ports_it_can_and_those_that_are_down_have_none() {
    run(async {
        let site = Harness::with(SEVERAL_BRIDGES).await;
        let links = site.world.snapshot().links;
        let (bridges, taps): (Vec<_>, Vec<_>) = links.iter().partition(|link| link.kind == LinkKind::Bridge);
        assert_eq!(taps.len(), SEVERAL_BRIDGES);
        assert_eq!(bridges.len(), SEVERAL_BRIDGES.div_ceil(PORTS_PER_BRIDGE_MAX));
        for bridge in &bridges {
            let ports = taps.iter().filter(|tap| tap.master.as_ref() == Some(&bridge.name)).count();
            assert!(ports <= PORTS_PER_BRIDGE_MAX, "{} has {ports} ports", bridge.name);
        }
        let instances = site.store().list::<Instance>();
        for (at, instance) in instances.iter().enumerate() {
            let uid = instance.meta.uid.clone();
            if at % 2 == 0 {
                site.store().transact(move |tx| admission::stop(tx, &uid)).await.expect("asked");
            } else {
                let asked = StandbyRequest { compression: CompressionAsked::Unsaid, delay: None };
                site.store().transact(move |tx| admission::standby(tx, &uid, asked)).await.expect("asked");
            }
        }
        sleep(10 * DONE).await;
        let snapshot = site.world.snapshot();
        let taps = snapshot.links.iter().filter(|link| link.kind == LinkKind::Tap).count();
        assert_eq!(taps, 0, "ports of instances that are stopped or in standby");
        let broken = checks::always(&Records::of(site.store()), &snapshot);
        assert!(broken.is_empty(), "{broken:?}");
    });
}
