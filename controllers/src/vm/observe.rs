//! Observations of the VM reconciler: the machine, and the progress of the objects that it needs.

use std::net::Ipv4Addr;

use jiff::Timestamp;
use stead_schemas::capabilities::VmmCapabilities;
use stead_schemas::condition::{self, ConditionStatus, ConditionType, Reason};
use stead_schemas::disk::Disk;
use stead_schemas::image::{Image, ImageConfig, ImagePhase};
use stead_schemas::instance::{Instance, Power};
use stead_schemas::mediation::{Mediation, Mediator};
use stead_schemas::meta::Object;
use stead_schemas::names::{Digest, LinkName, Name, Uid};
use stead_schemas::network::{Network, Nic, Resolver};
use stead_schemas::node::{Accelerator, LOCAL, Node};
use stead_schemas::references::Ref;
use stead_schemas::snapshot::{Snapshot, SnapshotPhase};

use super::VmReconciler;
use super::room;
use super::volumes::{self, VolumesSeen};
use crate::host::{
    Age, Flows, Host, HostError, HostErrorKind, Images, Inbound, InstanceLogs, Limits, LimitsSeen, Machine,
    Memories, Memory, NetworkCard, ProbeSeen, Probes, VmmState, Vmms, WakeListener, WakeListeners,
};
use crate::store::Store;

/// An observation of the host and of the objects that the instance refers to.
#[derive(Debug, Clone, PartialEq)]
pub struct Observed {
    pub uid: Uid,
    pub machine: Option<Machine>,
    pub has_records: bool,
    pub memory: Option<Memory>,
    pub probe: Option<ProbeSeen>,
    pub parts: Parts,
    /// The inbound connections, observed only where they matter.
    pub inbound: Option<Result<Inbound, Blind>>,
    pub listener: Option<WakeListener>,
    /// The limits of the VMM; `None` without a VMM, and where the host enforces none.
    pub limits: Option<LimitsSeen>,
    /// The resources of which the host has too little for the VM, in words; `None` while the instance holds what it
    /// needs.
    pub short_of: Option<String>,
}

/// The reason why connections could not be observed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blind {
    pub message: String,
    /// True if this host can never observe connections.
    pub is_unsupported: bool,
}

/// The state of everything that a launch needs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Parts {
    /// The content that the image object has ready now.
    pub image_ready: Option<Digest>,
    /// The content that the image of the next start has ready now.
    pub next_image_ready: Option<Digest>,
    /// The reason why that image is not ready.
    pub next_image_trouble: Option<String>,
    /// The reason why the image is not ready, in the image's own words.
    pub image_trouble: Option<(Reason, String)>,
    /// Run parameters of the pinned content; present only if its root file system is on disk.
    pub image_config: Option<ImageConfig>,
    pub is_disk_ready: bool,
    /// True if the root disk was created at some time, or if nothing is known of it.
    pub was_disk_made: bool,
    pub volumes: VolumesSeen,
    /// The message of the disk: what it waits for, or why it cannot be made.
    pub disk_trouble: Option<String>,
    /// The port, or `None` if the instance has no network.
    pub nic: Option<NicSeen>,
    /// The policy of mediated egress, or `None` if the guest reaches the outside by itself.
    pub mediation: Option<MediationSeen>,
    /// The origin, or `None` if the instance does not begin with a snapshot.
    pub origin: Option<OriginSeen>,
    /// The declared capabilities of the VM's hypervisor, or of the hypervisor of the spec while there is no VM;
    /// `None` if they are not known.
    pub capabilities: Option<VmmCapabilities>,
    /// The accelerator of the host, or `None` before its first observation.
    pub accelerator: Option<Accelerator>,
}

/// The progress of the snapshot that an instance begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OriginSeen {
    Pending,
    Ready,
    Failed {
        why: String,
        /// Time of the failure; `None` in records of earlier versions.
        at: Option<Timestamp>,
    },
    Gone,
    /// The record exists and cannot be read.
    Unreadable,
}

/// The progress of an instance's policy of mediated egress.
#[derive(Debug, Clone, PartialEq)]
pub struct MediationSeen {
    pub is_ready: bool,
    /// The reason that the policy gives for not being in force.
    pub trouble: Option<String>,
    /// URL of the proxy in the guest.
    pub proxy: String,
}

#[derive(Debug, Clone, PartialEq)]
pub struct NicSeen {
    pub is_ready: bool,
    /// The reason that the port gives for not being ready.
    pub trouble: Option<String>,
    pub card: NetworkCard,
    pub bridge: LinkName,
    pub gateway: Ipv4Addr,
    pub prefix: u8,
    pub dns: Vec<Ipv4Addr>,
    pub resolver: Resolver,
    pub mtu: Option<u16>,
}

/// Largest packet of a card without a configured size, in bytes.
const ETHERNET_MTU: u32 = 1500;
/// Smallest packet size that each IPv4 host must accept, in bytes (RFC 791).
const MTU_MIN: u16 = 576;

pub(super) async fn observe<H: Host>(
    reconciler: &VmReconciler<H>,
    uid: &Uid,
    object: Option<&Object<Instance>>,
) -> Result<Observed, HostError> {
    let machine = reconciler.host.vmms().inspect(uid).await?;
    let has_records = reconciler.host.instance_logs().exist(uid).await?;
    let memory = reconciler.host.memories().inspect(uid).await?;
    let probe = reconciler.host.probes().inspect(uid).await?;
    let parts = match object {
        Some(object) if !object.meta.is_deleting() => parts(reconciler, object, machine.as_ref()).await?,
        _ => Parts::default(),
    };
    let listener = reconciler.host.wake_listeners().inspect(uid).await?;
    let inbound = match object {
        Some(object) if is_counted(object) => match &machine {
            Some(machine) => inbound(reconciler, &parts, age(object, machine)).await,
            None => None,
        },
        _ => None,
    };
    let limits = match &machine {
        Some(machine) if machine.pid.is_some() => reconciler.host.limits().inspect(uid).await?,
        _ => None,
    };
    let short_of = object.and_then(|object| room::short_of(&reconciler.store, object));
    Ok(Observed {
        uid: uid.clone(),
        machine,
        has_records,
        memory,
        probe,
        parts,
        inbound,
        listener,
        limits,
        short_of,
    })
}

/// True if the policy of the instance depends on connections.
fn is_counted(object: &Object<Instance>) -> bool {
    object.spec.auto_standby.as_ref().is_some_and(|policy| policy.timeout().is_some())
}

/// Returns the acceptable age of an answer. For a VM that runs as the spec asks, the only consequence of an
/// answer is a standby, and the connections are queried again once the VM is paused.
fn age(object: &Object<Instance>, machine: &Machine) -> Age {
    let is_running = object.spec.power == Power::Running && machine.vmm == VmmState::Running;
    if is_running { Age::Recent } else { Age::New }
}

/// Observes the connections. A failure is a result too: it must not hide the rest of the observation.
async fn inbound<H: Host>(
    reconciler: &VmReconciler<H>,
    parts: &Parts,
    age: Age,
) -> Option<Result<Inbound, Blind>> {
    let address = parts.nic.as_ref()?.card.address;
    if parts.capabilities.is_some_and(|has| !has.standby) {
        let message = "the hypervisor cannot save a memory, so there is no automatic standby".to_owned();
        return Some(Err(Blind { message, is_unsupported: true }));
    }
    let blind = |error: HostError| Blind {
        message: error.chain(),
        is_unsupported: error.kind == HostErrorKind::Unsupported,
    };
    Some(reconciler.host.flows().inbound(address, age).await.map_err(blind))
}

async fn parts<H: Host>(
    reconciler: &VmReconciler<H>,
    object: &Object<Instance>,
    machine: Option<&Machine>,
) -> Result<Parts, HostError> {
    let allocated = &object.spec.allocated;
    let (image_ready, image_trouble) =
        image(reconciler.store.get::<Image>(&allocated.image).as_deref(), object.spec.pull);
    let next = object.spec.pending.image.as_ref();
    let next = next.map(|next| image(reconciler.store.get::<Image>(&next.image).as_deref(), next.pull));
    let (next_image_ready, next_image_trouble) = next.unwrap_or_default();
    let pinned = match object.content() {
        Some(digest) => reconciler.host.images().inspect(digest).await?,
        None => None,
    };
    let disk = reconciler.store.get::<Disk>(&allocated.disk);
    let node = Name::resource(LOCAL).ok().and_then(|name| reconciler.store.find::<Node>(&name));
    let hypervisor = machine.map_or(object.spec.hypervisor, |machine| machine.hypervisor);
    Ok(Parts {
        image_ready,
        next_image_ready,
        next_image_trouble: next_image_trouble.map(|(_, why)| why),
        image_trouble,
        image_config: pinned.map(|stored| stored.config),
        is_disk_ready: disk.as_ref().is_some_and(|disk| disk.is_ready()),
        was_disk_made: disk.as_ref().is_none_or(|disk| disk.status.was_created),
        volumes: volumes::seen(&reconciler.store, object),
        disk_trouble: disk.as_deref().and_then(disk_trouble),
        nic: allocated.nic.as_ref().and_then(|uid| nic(reconciler, uid)),
        mediation: allocated.nic.as_ref().and_then(|uid| mediation(&reconciler.store, uid)),
        origin: object.spec.origin.as_ref().map(|origin| origin_seen(reconciler, &origin.snapshot)),
        capabilities: node.as_deref().and_then(|node| node.capabilities(hypervisor)),
        accelerator: node.as_deref().and_then(|node| node.status.accelerator),
    })
}

fn disk_trouble(disk: &Object<Disk>) -> Option<String> {
    let ready = condition::find(&disk.status.conditions, ConditionType::Ready)?;
    Some(ready.message.clone()).filter(|message| !message.is_empty())
}

fn origin_seen<H: Host>(reconciler: &VmReconciler<H>, uid: &Uid) -> OriginSeen {
    let Some(snapshot) = reconciler.store.get::<Snapshot>(uid) else {
        return if reconciler.store.is_unreadable(uid) { OriginSeen::Unreadable } else { OriginSeen::Gone };
    };
    match snapshot.status.phase {
        SnapshotPhase::Pending => OriginSeen::Pending,
        SnapshotPhase::Ready => OriginSeen::Ready,
        SnapshotPhase::Failed => OriginSeen::Failed {
            why: snapshot.status.error.clone().unwrap_or_default(),
            at: snapshot.status.failed_at,
        },
    }
}

fn image(image: Option<&Object<Image>>, pull: u64) -> (Option<Digest>, Option<(Reason, String)>) {
    let Some(image) = image else {
        return (None, Some((Reason::ImageNotFound, "the image was deleted".to_owned())));
    };
    let trouble = match image.status.phase {
        ImagePhase::Ready if image.status.resolved_pull >= pull => {
            return (image.status.digest.clone(), None);
        }
        ImagePhase::Ready => not_asked_yet(image),
        ImagePhase::Pending | ImagePhase::Pulling | ImagePhase::Converting => {
            let phase = serde_json::to_value(image.status.phase).ok();
            let word = phase.as_ref().and_then(|word| word.as_str()).unwrap_or("pending");
            (Reason::WaitingForImage, format!("image {} is {word}", image.meta.name))
        }
        ImagePhase::Failed => {
            let reason = condition::find(&image.status.conditions, ConditionType::Ready)
                .map_or(Reason::WaitingForImage, |ready| ready.reason);
            let error = image.status.error.clone().unwrap_or_default();
            (reason, format!("image {} failed: {error}", image.meta.name))
        }
    };
    (None, Some(trouble))
}

/// Returns the configured MTU, else the uplink's if it is below that of Ethernet. Packets that fit the
/// guest's card but not the uplink are lost where a router drops the ICMP messages that report it.
fn mtu(network: &Object<Network>) -> Option<u16> {
    let small_uplink = network.status.uplink_mtu.filter(|mtu| *mtu < ETHERNET_MTU);
    let small_uplink = small_uplink.and_then(|mtu| u16::try_from(mtu).ok()).map(|mtu| mtu.max(MTU_MIN));
    network.spec.mtu.or(small_uplink)
}

/// Explains why content on disk is not used yet: the registry's present answer is not known.
fn not_asked_yet(image: &Object<Image>) -> (Reason, String) {
    let name = &image.meta.name;
    let degraded = condition::find(&image.status.conditions, ConditionType::Degraded);
    match degraded.filter(|degraded| degraded.status == ConditionStatus::True) {
        Some(degraded) => {
            (degraded.reason, format!("the registry cannot be asked for image {name}: {}", degraded.message))
        }
        None => (Reason::WaitingForImage, format!("image {name} is asked for again")),
    }
}

fn nic<H: Host>(reconciler: &VmReconciler<H>, uid: &Uid) -> Option<NicSeen> {
    let nic = reconciler.store.get::<Nic>(uid)?;
    let network = reconciler.store.get::<Network>(&nic.spec.network)?;
    let spec = &nic.spec;
    Some(NicSeen {
        // A card whose spec has changed may still lead packets by another way.
        is_ready: condition::is_ready(&nic.status.conditions)
            && nic.status.observed_generation == nic.meta.generation,
        trouble: condition::find(&nic.status.conditions, ConditionType::Ready)
            .filter(|ready| ready.reason == Reason::WaitingForNetwork)
            .map(|ready| ready.message.clone()),
        card: NetworkCard {
            tap: spec.tap.clone(),
            mac: spec.mac,
            address: spec.address,
            has_queues: spec.has_queues,
        },
        bridge: spec.bridge.clone(),
        gateway: network.spec.gateway.address,
        prefix: network.spec.gateway.prefix,
        dns: network.spec.dns.clone(),
        resolver: network.spec.resolver.clone(),
        mtu: mtu(&network),
    })
}

/// Returns the policy of a card.
fn mediation(store: &Store, nic: &Uid) -> Option<MediationSeen> {
    let is_kept = |mediation: &Object<Mediation>| !mediation.meta.is_deleting();
    let mediation = store.find_referring::<Mediation>(&Ref::to_owner(nic), is_kept)?;
    let settings = &store.get::<Mediator>(&mediation.spec.mediator)?.spec.settings;
    let ready = condition::find(&mediation.status.conditions, ConditionType::Ready);
    Some(MediationSeen {
        is_ready: condition::is_ready(&mediation.status.conditions),
        trouble: ready.map(|ready| ready.message.clone()).filter(|message| !message.is_empty()),
        proxy: format!("http://{}:{}", settings.address, settings.ports.explicit),
    })
}
