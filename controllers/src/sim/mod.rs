//! The simulated machine: an in-memory host behind the same ports as the real one.
//!
//! Guarantees: it holds state and keeps the promises that the ports make, and no more: what the real
//! host refuses is refused here. It survives a crash of the daemon, as a host does. Same seed, same
//! run: time is tokio's virtual one, chance comes from one generator, maps are ordered.
//!
//! Faults, each of which the daemon must survive, since the real host has them:
//! a verb fails before its effect; its effect is done and the answer is lost; it takes long; the
//! daemon dies at any await; somebody deletes, flushes, pauses or kills what is ours; things of
//! others stand beside ours and must stay as they are.

mod disks;
mod doors;
mod drift;
mod faults;
mod firewall;
mod flows;
mod images;
mod links;
mod listeners;
mod machines;
mod memories;
mod probes;
mod program;
mod rng;
mod snapshots;
mod written;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use stead_schemas::ingress::IngressRule;
use stead_schemas::names::{Digest, LinkName, Uid};
use stead_schemas::quantity::Bytes;
use tokio::sync::broadcast;
use tokio::time::Instant;

use crate::checks::HostSnapshot;
use crate::host::{Forwarding, Link, PortRule, Route, StoredImage};
use crate::runtime::{Clock, Ids};

pub use drift::Drift;
pub use faults::Faults;
pub use flows::SleptOn;
pub use images::SimRegistryImage;
pub use program::Program;
pub use rng::Rng;

/// One simulated host; clones share it. It implements every port.
#[derive(Debug, Clone)]
pub struct World {
    state: Arc<Mutex<State>>,
    /// `None`: something of unknown owner.
    changes: broadcast::Sender<Option<Uid>>,
    epoch: Instant,
    /// Seconds by which the wall clock was set, in all.
    wall: Arc<AtomicI64>,
}

/// Everything there is on the host.
#[derive(Debug)]
struct State {
    rng: Rng,
    faults: Faults,
    uids: u64,
    next_pid: u32,
    links: BTreeMap<LinkName, Link>,
    /// Not ours; nothing of it may ever change.
    foreign_links: BTreeSet<LinkName>,
    routes: Vec<Route>,
    forwarding: Forwarding,
    tables: BTreeMap<String, firewall::Table>,
    disks: BTreeMap<Uid, Bytes>,
    space_available: Bytes,
    registry: BTreeMap<String, SimRegistryImage>,
    manifests: BTreeMap<Digest, images::Manifest>,
    stored: BTreeMap<Digest, StoredImage>,
    jobs: BTreeMap<Digest, images::Running>,
    /// The question that each image's registry is being asked: reference and number.
    asked: BTreeMap<Uid, (String, u64)>,
    machines: BTreeMap<Uid, machines::Vmm>,
    records: BTreeSet<Uid>,
    memories: BTreeMap<Uid, memories::MemoryFile>,
    snapshots: BTreeMap<Uid, snapshots::SnapshotDir>,
    probes: BTreeMap<Uid, probes::Asking>,
    probe_serial: u64,
    /// How often VMs began to write to a disk.
    disk_ages: BTreeMap<Uid, u64>,
    /// VMs that ran on with a memory older than their disk.
    corrupted: Vec<Uid>,
    doors: BTreeMap<Uid, doors::Kept>,
    listeners: BTreeMap<u16, BTreeMap<Uid, Vec<IngressRule>>>,
    /// Ports that other programs listen at.
    taken_ports: BTreeSet<u16>,
    connections: BTreeMap<u64, flows::Connection>,
    /// The last reading of them.
    table_read: Option<(Timestamp, Vec<flows::Connection>)>,
    /// How many there ever were.
    connected: u64,
    slept_on: Vec<SleptOn>,
    /// Since when the daemon that lives watches the table of connections.
    watched_since: Timestamp,
    /// Verbs that list everything there is of something.
    listings: usize,
}

impl World {
    /// An empty host. Call within a tokio runtime with paused time.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let state = State {
            rng: Rng::new(seed),
            faults: Faults::none(),
            uids: 0,
            next_pid: 1000,
            links: BTreeMap::new(),
            foreign_links: BTreeSet::new(),
            routes: Vec::new(),
            forwarding: Forwarding::Off,
            tables: BTreeMap::new(),
            disks: BTreeMap::new(),
            space_available: Bytes(1 << 40),
            registry: BTreeMap::new(),
            manifests: BTreeMap::new(),
            stored: BTreeMap::new(),
            jobs: BTreeMap::new(),
            asked: BTreeMap::new(),
            machines: BTreeMap::new(),
            records: BTreeSet::new(),
            memories: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            probes: BTreeMap::new(),
            probe_serial: 0,
            disk_ages: BTreeMap::new(),
            corrupted: Vec::new(),
            doors: BTreeMap::new(),
            listeners: BTreeMap::new(),
            taken_ports: BTreeSet::new(),
            connections: BTreeMap::new(),
            table_read: None,
            connected: 0,
            slept_on: Vec::new(),
            watched_since: start(),
            listings: 0,
        };
        let (changes, _) = broadcast::channel(4096);
        Self { state: Arc::new(Mutex::new(state)), changes, epoch: Instant::now(), wall: Arc::default() }
    }

    /// Uids of things that changed (`None`: of any), as the real adapters announce them. Lossy, as theirs may be.
    #[must_use]
    pub fn changes(&self) -> broadcast::Receiver<Option<Uid>> {
        self.changes.subscribe()
    }

    /// A draw from the world's generator, for scenarios.
    #[must_use]
    pub fn draw(&self, below: u64) -> u64 {
        self.lock().rng.below(below)
    }

    /// VMs that ran on with a memory older than their disk; there must never be one.
    #[must_use]
    pub fn corrupted(&self) -> Vec<Uid> {
        self.lock().corrupted.clone()
    }

    /// Number of verbs so far that listed everything there is of something: their cost grows with the host.
    #[must_use]
    pub fn listings(&self) -> usize {
        self.lock().listings
    }

    /// What is there now, as the checks judge it.
    #[must_use]
    pub fn snapshot(&self) -> HostSnapshot {
        let now = self.time();
        let state = self.lock();
        let watched = state.doors.iter().filter(|(_, kept)| kept.watched.is_some());
        let watched = watched.map(|(uid, _)| uid.clone());
        HostSnapshot {
            links: state.links.values().cloned().collect(),
            forwarding: state.forwarding,
            firewall: state
                .tables
                .iter()
                .map(|(name, table)| (name.clone(), table.seen(state.forwarding != Forwarding::ByHost)))
                .collect(),
            disks: state.disks.clone(),
            images: state.stored.keys().cloned().collect(),
            machines: state.machines.iter().map(|(uid, vmm)| (uid.clone(), vmm.seen(uid, now))).collect(),
            records: state.records.clone(),
            memories: state.memories.iter().map(|(uid, memory)| (uid.clone(), memory.seen())).collect(),
            snapshots: state.snapshots.iter().map(|(uid, dir)| (uid.clone(), dir.seen())).collect(),
            probes: Some(state.probes.iter().map(|(uid, asking)| (uid.clone(), asking.seen())).collect()),
            watched: Some(watched.collect()),
            listeners: Some(state.listeners.clone()),
            taken_ports: state.taken_ports.clone(),
        }
    }

    /// Names of links that are not ours; a scenario compares them before and after.
    #[must_use]
    pub fn foreign_links(&self) -> BTreeSet<LinkName> {
        self.lock().foreign_links.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while holding it is a failed test anyway; the state is still readable.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The time of the simulated things, which nobody sets.
    fn time(&self) -> Timestamp {
        let since = SignedDuration::try_from(self.epoch.elapsed()).unwrap_or(SignedDuration::MAX);
        start().saturating_add(since).unwrap_or(Timestamp::MAX)
    }

    /// What the wall clock, as it is set now, shows at a time.
    fn shown(&self, time: Timestamp) -> Timestamp {
        let offset = SignedDuration::from_secs(self.wall.load(Ordering::Relaxed));
        time.saturating_add(offset).unwrap_or(Timestamp::MAX)
    }

    /// Sets the wall clock, forward or back.
    pub fn set_clock(&self, seconds: i64) {
        self.wall.fetch_add(seconds, Ordering::Relaxed);
        let now = self.time();
        // What watches connections does so anew.
        self.lock().watched_since = now;
    }

    /// Lossy on purpose: nobody may listen.
    fn announce(&self, uid: &Uid) {
        let _ = self.changes.send(Some(uid.clone()));
    }

    /// Announces later, as a guest that gets on does.
    fn announce_in(&self, uid: &Uid, delay: Duration) {
        let (changes, uid) = (self.changes.clone(), uid.clone());
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            let _ = changes.send(Some(uid));
        });
    }
}

crate::host! { World, world:
    Machines machines: World = *world;
    Snapshots snapshots: World = *world;
    Images images: World = *world;
    Links links: World = *world;
    Firewall firewall: World = *world;
    Disks disks: World = *world;
    Probes probes: World = *world;
    Flows flows: World = *world;
    Doors doors: World = *world;
    Listeners listeners: World = *world;
}

impl Clock for World {
    fn now(&self) -> Timestamp {
        self.shown(self.time())
    }

    fn elapsed(&self) -> Duration {
        self.epoch.elapsed()
    }
}

/// An arbitrary fixed time, so that timestamps read like ones.
fn start() -> Timestamp {
    Timestamp::from_second(1_750_000_000).expect("a valid constant")
}

impl Ids for World {
    fn next(&self) -> Uid {
        let mut state = self.lock();
        state.uids += 1;
        // The head must differ: short host names are made of it.
        format!("u{:08}x{:014}", state.uids, state.uids).parse().expect("24 characters, a letter first")
    }
}

impl PortRule {
    /// The rules that a table holds, ordered, without doubles.
    fn set(rules: &BTreeSet<Self>) -> Vec<Self> {
        rules.iter().cloned().collect()
    }
}
