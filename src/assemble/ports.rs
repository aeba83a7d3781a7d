//! The real ports of this host.

use crate::host::disks::Ext4Files;
use crate::host::doors::TapDoors;
use crate::host::flows::Conntrack;
use crate::host::netlink::Netlink;
use crate::host::nft::Nft;
use crate::host::oci::Oci;
use crate::host::probe::Prober;
use crate::hypervisor::Hypervisors;
use crate::ingress::HttpListeners;

/// The ports of this host.
#[derive(Clone)]
pub(super) struct Ports {
    pub(super) hypervisors: Hypervisors,
    pub(super) images: Oci,
    pub(super) links: Netlink,
    pub(super) firewall: Nft,
    pub(super) disks: Ext4Files,
    pub(super) probes: Prober,
    pub(super) flows: Conntrack,
    pub(super) doors: TapDoors,
    pub(super) listeners: HttpListeners,
}

stead_controllers::host! { Ports, ports:
    Machines machines: Hypervisors = ports.hypervisors;
    Snapshots snapshots: Hypervisors = ports.hypervisors;
    Images images: Oci = ports.images;
    Links links: Netlink = ports.links;
    Firewall firewall: Nft = ports.firewall;
    Disks disks: Ext4Files = ports.disks;
    Probes probes: Prober = ports.probes;
    Flows flows: Conntrack = ports.flows;
    Doors doors: TapDoors = ports.doors;
    Listeners listeners: HttpListeners = ports.listeners;
}
