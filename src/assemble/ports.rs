//! The real ports of this host.

use super::facts::HostFacts;
use crate::host::cgroup::Cgroups;
use crate::host::disks::Ext4Files;
use crate::host::flows::Conntrack;
use crate::host::netlink::Netlink;
use crate::host::nft::Nft;
use crate::host::oci::Oci;
use crate::host::probe::Prober;
use crate::host::wake::TapWakeListeners;
use crate::hypervisor::Hypervisors;
use crate::ingress::HttpListeners;
use crate::mediation::Carriers;

/// The ports of this host.
#[derive(Clone)]
pub(super) struct Ports {
    pub(super) hypervisors: Hypervisors,
    pub(super) limits: Cgroups,
    pub(super) images: Oci,
    pub(super) links: Netlink,
    pub(super) firewall: Nft,
    pub(super) disks: Ext4Files,
    pub(super) probes: Prober,
    pub(super) flows: Conntrack,
    pub(super) wake_listeners: TapWakeListeners,
    pub(super) listeners: HttpListeners,
    pub(super) carriers: Carriers,
    pub(super) facts: HostFacts,
}

stead_controllers::host! { Ports, ports:
    Vmms, Guests, Memories, InstanceLogs, Snapshots: Hypervisors = ports.hypervisors;
    Limits: Cgroups = ports.limits;
    Images, ImageJobs: Oci = ports.images;
    Links, Shapers: Netlink = ports.links;
    Firewall: Nft = ports.firewall;
    Disks: Ext4Files = ports.disks;
    Probes: Prober = ports.probes;
    Flows: Conntrack = ports.flows;
    WakeListeners: TapWakeListeners = ports.wake_listeners;
    Listeners: HttpListeners = ports.listeners;
    Mediators, Policies: Carriers = ports.carriers;
    Facts: HostFacts = ports.facts;
}
