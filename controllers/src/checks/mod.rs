//! Invariants of a whole (store, host) snapshot, written independently of every plan.
//!
//! Guarantees: the checks judge results only. They call no plan, no status function and no reconciler. The
//! same checks judge the simulated host and a real host.
//! Assumes: the system was left alone long enough to settle ([`settled`]), or not ([`always`]).

mod content;
mod hypervisor;
mod ingress;
mod mediation;
mod network;
mod pending;
mod policy;
mod resources;
mod shaping;
mod storage;
mod wake;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::sync::Arc;

use jiff::Timestamp;
use stead_schemas::condition::{self, ConditionType};
use stead_schemas::disk::Disk;
use stead_schemas::egress::Policy;
use stead_schemas::health::Verdict;
use stead_schemas::image::{Image, ImagePhase};
use stead_schemas::ingress::{Ingress, IngressRule};
use stead_schemas::instance::{Instance, Power, State};
use stead_schemas::mediation::{Mediation, Mediator};
use stead_schemas::meta::{Kind, Object};
use stead_schemas::names::{Digest, LinkName, Uid};
use stead_schemas::network::{Network, Nic};
use stead_schemas::node::Node;
use stead_schemas::quantity::Bytes;
use stead_schemas::references::Ref;
use stead_schemas::resource::Usage;
use stead_schemas::schedule::SnapshotSchedule;
use stead_schemas::snapshot::Snapshot;
use stead_schemas::volume::Volume;

use crate::host::{
    Captured, Disks, Firewall, Forwarding, Host, Images, InstanceLogs, Limits, LimitsSeen, Links, Memories,
    Shapers, Shaping, Snapshots, Vmms,
};
use crate::host::{
    FirewallRules, FirewallSeen, GuestPhase, HostError, Link, Machine, MediatorSeen, Memory, ProbeSeen,
    VmmState,
};
use crate::store::{Store, Unsettled};

/// All records of the store.
#[derive(Debug, Default)]
pub struct Records {
    pub instances: Vec<Arc<Object<Instance>>>,
    pub images: Vec<Arc<Object<Image>>>,
    pub disks: Vec<Arc<Object<Disk>>>,
    pub nics: Vec<Arc<Object<Nic>>>,
    pub networks: Vec<Arc<Object<Network>>>,
    pub snapshots: Vec<Arc<Object<Snapshot>>>,
    pub schedules: Vec<Arc<Object<SnapshotSchedule>>>,
    pub volumes: Vec<Arc<Object<Volume>>>,
    pub ingresses: Vec<Arc<Object<Ingress>>>,
    pub nodes: Vec<Arc<Object<Node>>>,
    pub mediators: Vec<Arc<Object<Mediator>>>,
    pub mediations: Vec<Arc<Object<Mediation>>>,
    /// The resources that all objects take, as the store keeps the sum and as a scan finds it.
    pub usage: Usage,
    pub scanned_usage: Usage,
    /// References in which the store's index differs from a scan.
    pub stale_references: Vec<Ref>,
    /// Objects of all kinds with which their reconcilers have not finished.
    pub unsettled: Vec<Unsettled>,
}

/// All objects of ours on a host.
#[derive(Debug, Clone, Default)]
pub struct HostSnapshot {
    pub links: Vec<Link>,
    /// The rules for the traffic of links that have any.
    pub shaping: BTreeMap<LinkName, Shaping>,
    pub forwarding: Forwarding,
    pub firewall: BTreeMap<String, FirewallSeen>,
    pub disks: BTreeMap<Uid, Bytes>,
    pub images: BTreeSet<Digest>,
    pub machines: BTreeMap<Uid, Machine>,
    /// The limits of VMMs, where the host enforces any.
    pub limits: BTreeMap<Uid, LimitsSeen>,
    pub records: BTreeSet<Uid>,
    pub memories: BTreeMap<Uid, Memory>,
    pub snapshots: BTreeMap<Uid, Captured>,
    /// The running probes; `None` while no daemon runs that could have any.
    pub probes: Option<BTreeMap<Uid, ProbeSeen>>,
    /// Owners of the active wake listeners; `None` while no daemon runs that could have any.
    pub watched: Option<BTreeSet<Uid>>,
    /// Our listening ports with the rules served there, by owner; `None` while no daemon runs that could have
    /// any.
    pub listeners: Option<BTreeMap<u16, BTreeMap<Uid, Vec<IngressRule>>>>,
    /// The ports of other programs.
    pub taken_ports: BTreeSet<u16>,
    pub mediators: BTreeMap<Uid, MediatorSeen>,
    /// The policies in force; `None` where they cannot be read whole.
    pub policies: Option<BTreeMap<Uid, Policy>>,
    /// Owners of logs of mediated egress.
    pub policy_logs: BTreeSet<Uid>,
}

impl Records {
    #[must_use]
    pub fn of(store: &Store) -> Self {
        Self {
            instances: store.list::<Instance>(),
            images: store.list::<Image>(),
            disks: store.list::<Disk>(),
            nics: store.list::<Nic>(),
            networks: store.list::<Network>(),
            snapshots: store.list::<Snapshot>(),
            schedules: store.list::<SnapshotSchedule>(),
            volumes: store.list::<Volume>(),
            ingresses: store.list::<Ingress>(),
            nodes: store.list::<Node>(),
            mediators: store.list::<Mediator>(),
            mediations: store.list::<Mediation>(),
            usage: store.usage(),
            scanned_usage: store.scanned_usage(),
            stale_references: store.stale_references(),
            unsettled: store.unsettled(),
        }
    }
}

impl HostSnapshot {
    /// Reads a host through its ports. `tables` are the rules whose tables are inspected.
    ///
    /// # Errors
    /// Returns the error of the first read that failed.
    pub async fn read<H: Host>(host: &H, tables: &[FirewallRules]) -> Result<Self, HostError> {
        let mut snapshot = Self { links: host.links().list().await?, ..Self::default() };
        for link in &snapshot.links {
            let shaping = host.shapers().inspect(&link.name).await?;
            if shaping != Shaping::default() {
                snapshot.shaping.insert(link.name.clone(), shaping);
            }
        }
        snapshot.forwarding = host.links().forwarding().await?;
        for rules in tables {
            if let Some(seen) = host.firewall().inspect(rules).await? {
                snapshot.firewall.insert(rules.table.clone(), seen);
            }
        }
        snapshot.disks = host.disks().list().await?.into_iter().map(|disk| (disk.owner, disk.size)).collect();
        snapshot.images = host.images().list().await?.into_iter().collect();
        for owner in host.vmms().list().await? {
            if let Some(machine) = host.vmms().inspect(&owner).await? {
                let limits = host.limits().inspect(&owner).await?;
                snapshot.limits.extend(limits.map(|limits| (owner.clone(), limits)));
                snapshot.machines.insert(owner.clone(), machine);
            }
            if let Some(memory) = host.memories().inspect(&owner).await? {
                snapshot.memories.insert(owner.clone(), memory);
            }
            if host.instance_logs().exist(&owner).await? {
                snapshot.records.insert(owner);
            }
        }
        for uid in host.snapshots().list().await? {
            if let Some(captured) = host.snapshots().inspect(&uid).await? {
                snapshot.snapshots.insert(uid, captured);
            }
        }
        Ok(snapshot)
    }
}

/// The list of violations; an empty list is good.
pub type Broken = Vec<String>;

/// Returns the violations of the invariants that hold at every moment, whatever happens.
#[must_use]
pub fn always(records: &Records, host: &HostSnapshot) -> Broken {
    let mut broken = Broken::new();
    let nics = || records.nics.iter();
    unique(&mut broken, "address", nics().map(|nic| nic.spec.address));
    unique(&mut broken, "hardware address", nics().map(|nic| nic.spec.mac));
    unique(&mut broken, "traffic class", nics().map(|nic| nic.spec.class));
    unique(&mut broken, "tap", nics().map(|nic| nic.spec.tap.clone()));
    unique(&mut broken, "guest cid", records.instances.iter().map(|instance| instance.spec.allocated.cid));
    unique(&mut broken, "live image name", live(&records.images).map(|image| image.meta.name.clone()));
    unique(
        &mut broken,
        "live instance name",
        live(&records.instances).map(|object| object.meta.name.clone()),
    );
    let runs = records.snapshots.iter().filter_map(|snapshot| snapshot.spec.schedule.as_ref());
    unique(&mut broken, "run of a schedule", runs.map(|run| format!("{} at {}", run.schedule, run.due)));
    unique(&mut broken, "process", host.machines.values().filter_map(|machine| machine.pid));
    for (uid, machine) in &host.machines {
        let is_saved = matches!(host.memories.get(uid), Some(Memory::Saved(_)));
        if machine.vmm == VmmState::Running && is_saved {
            broken.push(format!("{uid} runs while its saved memory could be restored over its disk"));
        }
    }
    for instance in &records.instances {
        let status = &instance.status;
        if (status.state == State::Unknown) != status.state_error.is_some() {
            broken.push(format!("{}: Unknown and state_error do not go together", instance.meta.uid));
        }
        let policy = &instance.spec.restart;
        if policy.max_attempts > 0 && status.restart.attempts > policy.max_attempts {
            broken.push(format!("{} was restarted {} times", instance.meta.uid, status.restart.attempts));
        }
        let is_starting = status.health.verdict == Verdict::Starting;
        if instance.spec.health.is_none()
            && !is_starting
            && status.observed_generation == instance.meta.generation
        {
            broken.push(format!("{} has a verdict and no check", instance.meta.uid));
        }
        if status.ended_run > instance.spec.run {
            broken.push(format!("{}: a run ended that was never asked for", instance.meta.uid));
        }
    }
    broken.extend(records.stale_references.iter().map(|at| format!("the index is not a scan: {at:?}")));
    hypervisor::machines(&mut broken, records, host);
    content::failures(&mut broken, records);
    ingress::always(&mut broken, records, host);
    resources::always(&mut broken, records, host);
    mediation::always(&mut broken, records, host);
    broken
}

/// Returns the violations of the invariants that hold once nothing has happened for a while.
#[must_use]
pub fn settled(records: &Records, host: &HostSnapshot, now: Timestamp) -> Broken {
    let mut broken = always(records, host);
    check_life_cycle(&mut broken, records);
    check_machines(&mut broken, records, host);
    pending::changes(&mut broken, records, host);
    policy::health(&mut broken, records, host);
    policy::schedules(&mut broken, records);
    storage::disks(&mut broken, records, host);
    storage::volumes(&mut broken, records);
    storage::mounts(&mut broken, records, host);
    network::check(&mut broken, records, host, now);
    content::images(&mut broken, records, host);
    content::snapshots(&mut broken, records, host, now);
    content::forks(&mut broken, records, now);
    ingress::settled(&mut broken, records, host);
    wake::listeners(&mut broken, records, host);
    mediation::settled(&mut broken, records, host);
    resources::settled(&mut broken, records);
    resources::limits(&mut broken, records, host);
    resources::memory(&mut broken, records, host, now);
    broken
}

/// Checks that no object waits for its deletion, and that every status belongs to the current spec.
fn check_life_cycle(broken: &mut Broken, records: &Records) {
    for object in &records.unsettled {
        let name = format!("{} {}", object.kind, object.uid);
        if object.is_deleting {
            broken.push(format!("{name}: still being deleted"));
        }
        if object.is_outdated {
            broken.push(format!("{name}: its status is of an older generation"));
        }
    }
}

fn check_machines(broken: &mut Broken, records: &Records, host: &HostSnapshot) {
    let instances: BTreeMap<&Uid, _> =
        records.instances.iter().map(|instance| (&instance.meta.uid, instance)).collect();
    for uid in host.machines.keys().chain(&host.records).chain(host.memories.keys()) {
        if !instances.contains_key(uid) {
            broken.push(format!("machine or record of {uid} is left over"));
        }
    }
    for (uid, instance) in instances {
        let (spec, status) = (&instance.spec, &instance.status);
        // Pinned content is enough: the image's name may have been deleted since.
        let is_pinned = status.image_digest.as_ref().is_some_and(|digest| host.images.contains(digest));
        let is_image_ready = is_pinned
            || records.images.iter().any(|image| {
                image.meta.uid == spec.allocated.image && image.status.phase == ImagePhase::Ready
            });
        if spec.power == Power::Standby && spec.run > status.ended_run {
            // An instance that has to run first has no image any more, and no memory to keep yet.
            let has_nothing = !host.machines.contains_key(uid) && !host.memories.contains_key(uid);
            if is_image_ready || !has_nothing {
                check_standby(broken, instance, host);
            }
            continue;
        }
        if instance.is_pooled() && spec.run > status.ended_run {
            // An instance without its image keeps the memory that it continues from when the image is back.
            if is_image_ready || host.machines.contains_key(uid) {
                check_warm(broken, instance, host);
            }
            continue;
        }
        let should_run = spec.power == Power::Running && spec.run > status.ended_run;
        // An instance that waits for its image continues from the memory when the image is back.
        if host.memories.contains_key(uid) && (is_image_ready || !should_run) {
            broken.push(format!("the memory of {uid} is left over"));
        }
        let machine = host.machines.get(uid);
        match (should_run && is_image_ready, machine) {
            (true, Some(machine)) => {
                let is_up = machine.vmm == VmmState::Running && machine.guest.phase == GuestPhase::Ready;
                if !is_up || machine.run != spec.run || machine.is_network_cut {
                    broken.push(format!("{uid}: should run {} but is {machine:?}", spec.run));
                }
                if machine.disk_limit != spec.disk_rate().into() {
                    broken.push(format!("{uid}: its disks have the limit {:?}", machine.disk_limit));
                }
                let incarnation = machine.guest.incarnation.as_deref().unwrap_or_default();
                if !incarnation.starts_with(uid.as_str()) {
                    broken.push(format!("the guest of {uid} takes itself for {incarnation:?}"));
                }
                if status.state != State::Running {
                    broken.push(format!("{uid}: runs, but its status says {:?}", status.state));
                }
                if status.vmm_pid != machine.pid {
                    broken.push(format!("{uid}: its status names another process"));
                }
            }
            (true, None) => broken.push(format!("{uid}: should run but has no machine: {status:?}")),
            // The image's name and content may both be gone: a running VM holds its disks open.
            (false, Some(machine)) if should_run && machine.run == spec.run => {}
            (false, Some(machine)) => broken.push(format!("{uid}: should not run but is {machine:?}")),
            (false, None) if should_run => {}
            (false, None) if status.state != State::Stopped => {
                broken.push(format!("{uid}: is down, but its status says {:?}", status.state));
            }
            (false, None) => {}
        }
    }
}

/// Checks that the memory that the instance continues from exists, and no machine.
fn check_standby(broken: &mut Broken, instance: &Object<Instance>, host: &HostSnapshot) {
    let (uid, spec) = (&instance.meta.uid, &instance.spec);
    let is_saved = matches!(host.memories.get(uid), Some(Memory::Saved(saved))
        if saved.run == spec.run && saved.standby == spec.standby);
    let state = instance.status.state;
    if !is_saved || host.machines.contains_key(uid) || state != State::Standby {
        let (memory, machine) = (host.memories.get(uid), host.machines.get(uid));
        broken.push(format!("{uid}: should be in standby but is {state:?}, {memory:?}, {machine:?}"));
    }
}

/// Checks that the instance is paused, and that the memory that it continued from is gone, because its disk
/// has changed since.
fn check_warm(broken: &mut Broken, instance: &Object<Instance>, host: &HostSnapshot) {
    let uid = &instance.meta.uid;
    let (memory, machine) = (host.memories.get(uid), host.machines.get(uid));
    let is_held = machine.is_some_and(|machine| machine.vmm == VmmState::Paused);
    if !is_held || memory.is_some() || !instance.is_warm() {
        let state = instance.status.state;
        broken.push(format!("{uid}: should be held ready but is {state:?}, {memory:?}, {machine:?}"));
    }
}

pub(crate) fn check_owner(
    broken: &mut Broken,
    records: &Records,
    kind: &str,
    uid: &Uid,
    owner: Option<&Uid>,
) {
    let has_owner = owner.is_some_and(|owner| {
        records.instances.iter().any(|instance| instance.meta.uid == *owner)
            || records.volumes.iter().any(|volume| volume.meta.uid == *owner)
    });
    if !has_owner {
        broken.push(format!("{kind} {uid} has lost its owner"));
    }
}

pub(crate) fn check_ready(broken: &mut Broken, kind: &str, uid: &Uid, conditions: &[condition::Condition]) {
    if !condition::is_ready(conditions) {
        let ready = condition::find(conditions, ConditionType::Ready);
        broken.push(format!("{kind} {uid} is not Ready: {ready:?}"));
    }
}

pub(crate) fn live<K: Kind>(objects: &[Arc<Object<K>>]) -> impl Iterator<Item = &Arc<Object<K>>> {
    objects.iter().filter(|object| !object.meta.is_deleting())
}

fn unique<T: Ord + Display>(broken: &mut Broken, what: &str, values: impl Iterator<Item = T>) {
    let mut seen = BTreeSet::new();
    for value in values {
        let text = value.to_string();
        if !seen.insert(value) {
            broken.push(format!("{what} {text} is used twice"));
        }
    }
}
