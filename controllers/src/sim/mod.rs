//! The simulated machine: an in-memory host behind the same ports as the real one.
//!
//! Guarantees: it holds state and keeps the promises of the ports, and no more: it refuses what the real
//! host refuses. It survives a crash of the daemon, as a host does. The same seed gives the same run: time
//! is tokio's virtual time, chance comes from one generator, and maps are ordered.
//!
//! The daemon must survive each of these faults, since the real host has them: a verb fails before its
//! effect; its effect is done and the answer is lost; a verb takes long; the daemon dies at any await;
//! another party deletes, flushes, pauses or kills our objects; foreign objects exist beside ours and must
//! stay as they are.

mod disks;
mod drift;
mod facts;
mod faults;
mod firewall;
mod flows;
mod guests;
mod images;
mod instance_logs;
mod limits;
mod links;
mod listeners;
mod mediators;
mod memories;
mod probes;
mod program;
mod rng;
mod shapers;
mod snapshots;
mod vmms;
mod volumes;
mod wake;
mod written;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use stead_schemas::ingress::IngressRule;
use stead_schemas::names::{Digest, LinkName, Uid};
use stead_schemas::node::Resources;
use stead_schemas::quantity::Bytes;
use tokio::sync::broadcast;
use tokio::time::Instant;

use crate::checks::HostSnapshot;
use crate::host::{Forwarding, Link, NicRule, Route, Shaping, StoredImage};
use crate::runtime::{Clock, Ids};

pub use drift::Drift;
pub use facts::{
    AMPLE, hypervisors, mediator_settings, network_spec, node_spec, observe_node, observe_node_with,
};
pub use faults::Faults;
pub use flows::SleptOn;
pub use images::SimRegistryImage;
pub use program::Program;
pub use rng::Rng;

/// A simulated host, which implements every port; clones share it.
#[derive(Debug, Clone)]
pub struct World {
    state: Arc<Mutex<State>>,
    /// Sender of changes: the uid of the changed object, or `None` when the owner is unknown.
    changes: broadcast::Sender<Option<Uid>>,
    epoch: Instant,
    /// Total number of seconds by which the wall clock was set.
    wall: Arc<AtomicI64>,
}

/// All the state of the host.
#[derive(Debug)]
struct State {
    rng: Rng,
    faults: Faults,
    capacity: Resources,
    uids: u64,
    next_pid: u32,
    links: BTreeMap<LinkName, Link>,
    /// The rules for the traffic of links that have any.
    shaping: BTreeMap<LinkName, Shaping>,
    /// Interfaces that are not ours; they must never change.
    foreign_links: BTreeSet<LinkName>,
    routes: Vec<Route>,
    forwarding: Forwarding,
    tables: BTreeMap<String, firewall::Table>,
    disks: BTreeMap<Uid, Bytes>,
    /// Prepared files by their names.
    prepared: BTreeMap<Uid, Bytes>,
    space_available: Bytes,
    registry: BTreeMap<String, SimRegistryImage>,
    manifests: BTreeMap<Digest, images::Manifest>,
    stored: BTreeMap<Digest, StoredImage>,
    jobs: BTreeMap<Digest, images::Running>,
    /// The pending question to the registry for each image: reference and number.
    asked: BTreeMap<Uid, (String, u64)>,
    machines: BTreeMap<Uid, vmms::Vmm>,
    mediators: BTreeMap<Uid, mediators::Process>,
    /// Owners of logs of mediated egress.
    policy_logs: BTreeSet<Uid>,
    records: BTreeSet<Uid>,
    memories: BTreeMap<Uid, memories::MemoryFile>,
    snapshots: BTreeMap<Uid, snapshots::SnapshotDir>,
    probes: BTreeMap<Uid, probes::Asking>,
    probe_serial: u64,
    /// Number of times that VMs began to write to a disk.
    disk_ages: BTreeMap<Uid, u64>,
    /// Content of the image that each root disk was first used over.
    lower_layers: BTreeMap<Uid, Digest>,
    /// VMs that ran on with a memory older than their disk.
    corrupted: Vec<Uid>,
    wake_listeners: BTreeMap<Uid, wake::Kept>,
    listeners: BTreeMap<u16, BTreeMap<Uid, Vec<IngressRule>>>,
    /// Ports that other programs listen at.
    taken_ports: BTreeSet<u16>,
    connections: BTreeMap<u64, flows::Connection>,
    /// The last reading of the connections.
    table_read: Option<(Timestamp, Vec<flows::Connection>)>,
    /// Number of connections that there ever were.
    connected: u64,
    slept_on: Vec<SleptOn>,
    /// Time since which the current daemon has watched the table of connections.
    watched_since: Timestamp,
    /// Number of verbs that listed all objects of a sort.
    listings: usize,
}

impl World {
    /// Makes an empty host. Must be called within a tokio runtime with paused time.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let state = State {
            rng: Rng::new(seed),
            faults: Faults::none(),
            capacity: AMPLE,
            uids: 0,
            next_pid: 1000,
            links: BTreeMap::new(),
            shaping: BTreeMap::new(),
            foreign_links: BTreeSet::new(),
            routes: Vec::new(),
            forwarding: Forwarding::Off,
            tables: BTreeMap::new(),
            disks: BTreeMap::new(),
            prepared: BTreeMap::new(),
            space_available: Bytes(1 << 40),
            registry: BTreeMap::new(),
            manifests: BTreeMap::new(),
            stored: BTreeMap::new(),
            jobs: BTreeMap::new(),
            asked: BTreeMap::new(),
            machines: BTreeMap::new(),
            mediators: BTreeMap::new(),
            policy_logs: BTreeSet::new(),
            records: BTreeSet::new(),
            memories: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            probes: BTreeMap::new(),
            probe_serial: 0,
            disk_ages: BTreeMap::new(),
            lower_layers: BTreeMap::new(),
            corrupted: Vec::new(),
            wake_listeners: BTreeMap::new(),
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

    /// Returns a receiver of the uids of changed objects (`None` for any object), as the real adapters
    /// announce them. It is lossy, as theirs may be.
    #[must_use]
    pub fn changes(&self) -> broadcast::Receiver<Option<Uid>> {
        self.changes.subscribe()
    }

    /// Draws a number from the world's generator, for scenarios.
    #[must_use]
    pub fn draw(&self, below: u64) -> u64 {
        self.lock().rng.below(below)
    }

    /// Returns the VMs that ran on with a memory older than their disk; there must never be any.
    #[must_use]
    pub fn corrupted(&self) -> Vec<Uid> {
        self.lock().corrupted.clone()
    }

    /// Returns the number of verbs so far that listed all objects of a sort: their cost grows with the host.
    #[must_use]
    pub fn listings(&self) -> usize {
        self.lock().listings
    }

    /// Returns the current contents of the host, for the checks.
    #[must_use]
    pub fn snapshot(&self) -> HostSnapshot {
        let now = self.time();
        let state = self.lock();
        let watched = state.wake_listeners.iter().filter(|(_, kept)| kept.watched.is_some());
        let watched = watched.map(|(uid, _)| uid.clone());
        HostSnapshot {
            links: state.links.values().cloned().collect(),
            shaping: state.shaping.clone(),
            forwarding: state.forwarding,
            firewall: state
                .tables
                .iter()
                .map(|(name, table)| (name.clone(), table.seen(state.forwarding != Forwarding::ByHost)))
                .collect(),
            disks: state.disks.clone(),
            images: state.stored.keys().cloned().collect(),
            machines: state.machines.iter().map(|(uid, vmm)| (uid.clone(), vmm.seen(uid, now))).collect(),
            limits: state.machines.iter().map(|(uid, vmm)| (uid.clone(), vmm.limits_seen())).collect(),
            records: state.records.clone(),
            memories: state.memories.iter().map(|(uid, memory)| (uid.clone(), memory.seen())).collect(),
            snapshots: state.snapshots.iter().map(|(uid, dir)| (uid.clone(), dir.seen())).collect(),
            probes: Some(state.probes.iter().map(|(uid, asking)| (uid.clone(), asking.seen())).collect()),
            watched: Some(watched.collect()),
            listeners: Some(state.listeners.clone()),
            taken_ports: state.taken_ports.clone(),
            mediators: state.mediators.iter().map(|(uid, process)| (uid.clone(), process.seen())).collect(),
            policies: Some(state.mediators.values().flat_map(|process| process.policies.clone()).collect()),
            policy_logs: state.policy_logs.clone(),
        }
    }

    /// Returns the names of links that are not ours; a scenario compares them before and after.
    #[must_use]
    pub fn foreign_links(&self) -> BTreeSet<LinkName> {
        self.lock().foreign_links.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while it is held is a failed test anyway; the state can still be read.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Returns the time of the simulated objects, which is never set.
    fn time(&self) -> Timestamp {
        let since = SignedDuration::try_from(self.epoch.elapsed()).unwrap_or(SignedDuration::MAX);
        start().saturating_add(since).unwrap_or(Timestamp::MAX)
    }

    /// Returns what the wall clock, as it is set now, shows at a time.
    fn shown(&self, time: Timestamp) -> Timestamp {
        let offset = SignedDuration::from_secs(self.wall.load(Ordering::Relaxed));
        time.saturating_add(offset).unwrap_or(Timestamp::MAX)
    }

    /// Sets the wall clock, forward or back.
    pub fn set_clock(&self, seconds: i64) {
        self.wall.fetch_add(seconds, Ordering::Relaxed);
        let now = self.time();
        // The monitor of connections starts to watch anew.
        self.lock().watched_since = now;
    }

    /// Announces a change; lossy on purpose, because there may be no listener.
    fn announce(&self, uid: &Uid) {
        let _ = self.changes.send(Some(uid.clone()));
    }

    /// Announces a change later, as when a guest makes progress.
    fn announce_in(&self, uid: &Uid, delay: Duration) {
        let (changes, uid) = (self.changes.clone(), uid.clone());
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            let _ = changes.send(Some(uid));
        });
    }
}

crate::host! { World, world:
    Vmms, Guests, Memories, InstanceLogs, Snapshots, Images, ImageJobs: World = *world;
    Limits, Links, Shapers, Firewall, Disks, Probes, Flows, WakeListeners, Listeners: World = *world;
    Mediators, Policies, Facts: World = *world;
}

impl Clock for World {
    fn now(&self) -> Timestamp {
        self.shown(self.time())
    }

    fn elapsed(&self) -> Duration {
        self.epoch.elapsed()
    }
}

/// Returns an arbitrary fixed time, so that timestamps look realistic.
fn start() -> Timestamp {
    Timestamp::from_second(1_750_000_000).expect("a valid constant")
}

impl Ids for World {
    fn next(&self) -> Uid {
        let mut state = self.lock();
        state.uids += 1;
        // The first characters must differ: short host names are made of them.
        format!("u{:08}x{:014}", state.uids, state.uids).parse().expect("24 characters, a letter first")
    }
}

impl NicRule {
    /// Returns the rules that a table holds, ordered, without duplicates.
    fn set(rules: &BTreeSet<Self>) -> Vec<Self> {
        rules.iter().cloned().collect()
    }
}
