//! The simulated facts of the host.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use stead_schemas::capabilities::VmmCapabilities;
use stead_schemas::egress::{MediatorPorts, MediatorSettings};
use stead_schemas::instance::Hypervisor;
use stead_schemas::names::{Name, Platform};
use stead_schemas::network::NetworkSpec;
use stead_schemas::node::{
    Accelerator, HypervisorStatus, ImageSpace, LOCAL, Node, NodeSpec, NodeStatus, Resources,
};
use stead_schemas::quantity::Bytes;
use stead_schemas::resource::PerResource;

use super::World;
use super::vmms::capabilities;
use crate::host::{Facts, HostError, HostSeen};
use crate::node::admission::declare;
use crate::store::Store;

/// The hypervisors of the simulated host.
const HYPERVISORS: [Hypervisor; 2] = [Hypervisor::Qemu, Hypervisor::QemuMicrovm];

impl Facts for World {
    async fn inspect(&self) -> Result<HostSeen, HostError> {
        self.verb("inspect", "host", |state| {
            Ok(HostSeen {
                capacity: state.capacity,
                images: ImageSpace { content: state.image_space(), cache: Bytes(0) },
                hypervisors: simulated(),
                accelerator: Accelerator::Kvm,
                has_kernel_headers: true,
                has_cgroups: false,
                has_vhost_net: false,
                uplink_speed: None,
                accelerator_problem: None,
                missing_walls: BTreeSet::new(),
            })
        })
        .await
    }
}

/// The size of a host on which nothing is ever short: most scenarios are about other subjects.
pub const AMPLE: Resources = Resources { cpus: 1 << 24, memory: Bytes(1 << 50), disk: Bytes(1 << 60) };

impl World {
    /// Sets the size of the host. The daemon notices at its next observation of the host.
    pub fn set_capacity(&self, capacity: Resources) {
        self.lock().capacity = capacity;
    }
}

/// Returns the hypervisors of the simulated host, which are all available.
fn simulated() -> BTreeMap<Hypervisor, HypervisorStatus> {
    let status = |hypervisor| HypervisorStatus { is_available: true, capabilities: capabilities(hypervisor) };
    HYPERVISORS.into_iter().map(|hypervisor| (hypervisor, status(hypervisor))).collect()
}

/// Returns hypervisors that are all available and have the same capabilities.
#[must_use]
pub fn hypervisors(
    all: &[Hypervisor],
    capabilities: VmmCapabilities,
) -> BTreeMap<Hypervisor, HypervisorStatus> {
    let status = HypervisorStatus { is_available: true, capabilities };
    all.iter().map(|hypervisor| (*hypervisor, status)).collect()
}

/// Returns the settings of the process that carries mediated egress on a simulated host.
#[must_use]
pub fn mediator_settings() -> MediatorSettings {
    let network = network_spec();
    MediatorSettings {
        address: network.gateway.address,
        ports: MediatorPorts { captured: 18443, explicit: 18080, names: 18053 },
        subnet: network.gateway,
        dns: network.dns.iter().copied().map(IpAddr::from).collect(),
        open: BTreeSet::new(),
    }
}

/// Returns the configuration of a simulated host.
#[must_use]
pub fn node_spec() -> NodeSpec {
    NodeSpec {
        platform: Platform::LinuxAmd64,
        default_hypervisor: Hypervisor::Qemu,
        disk_reserve: Bytes(1 << 30),
        memory_reserve: Bytes(0),
        capacity: PerResource::default(),
        oversubscription: PerResource::standard(),
    }
}

/// Returns the configuration of the network of a simulated host.
///
/// # Panics
/// Panics if one of its constants is invalid, which every test would show.
#[must_use]
pub fn network_spec() -> NetworkSpec {
    NetworkSpec {
        bridge: "simbr0".parse().expect("valid"),
        gateway: "10.9.0.1/24".parse().expect("valid"),
        dns: Vec::new(),
        table: "sim".to_owned(),
        reach: Default::default(),
        resolver: Default::default(),
        mtu: None,
        mediator: None,
    }
}

/// Stores the node of the simulated host as if it was observed, for a store without reconcilers.
///
/// # Panics
/// Panics if the store does not write, which ends a test.
pub async fn observe_node(store: &Store) {
    observe_node_with(store, simulated()).await;
}

/// Stores the node of a host with these hypervisors as if it was observed.
///
/// # Panics
/// Panics if the store does not write, which ends a test.
pub async fn observe_node_with(store: &Store, hypervisors: BTreeMap<Hypervisor, HypervisorStatus>) {
    store.transact(|tx| declare(tx, node_spec())).await.expect("declared");
    let node = store.find::<Node>(&Name::resource(LOCAL).expect("valid")).expect("it was declared");
    let accelerator = Some(Accelerator::Kvm);
    let status = NodeStatus { hypervisors, accelerator, ..NodeStatus::default() };
    store.write_status::<Node>(&node.meta.uid, status).await.expect("written");
}
