//! Tests of the node and of what its status says.

use std::collections::BTreeMap;

use stead_schemas::capabilities::VmmCapabilities;
use stead_schemas::condition;
use stead_schemas::instance::Hypervisor;
use stead_schemas::meta::Meta;
use stead_schemas::node::{Accelerator, HypervisorStatus, ImageSpace, NodeSpec};
use stead_schemas::numbers::Generation;
use stead_schemas::quantity::Rate;
use stead_schemas::resource::Ratio;

use super::*;
use crate::host::HostErrorKind;
use crate::runtime::Outcome;
use crate::sim::node_spec;
use crate::store::Kinds;
use crate::store::tests::opened;

fn seen(is_available: bool) -> HostSeen {
    let status = HypervisorStatus { is_available, capabilities: VmmCapabilities::NONE };
    HostSeen {
        images: ImageSpace { content: Bytes(3 << 30), cache: Bytes(1 << 30) },
        capacity: Resources { cpus: 4, memory: Bytes(8 << 30), disk: Bytes(100 << 30) },
        hypervisors: BTreeMap::from([(Hypervisor::Firecracker, status)]),
        accelerator: Accelerator::Tcg,
        has_kernel_headers: true,
        has_cgroups: true,
        has_vhost_net: true,
        uplink_speed: Some(Rate(125_000_000)),
        accelerator_problem: None,
        missing_walls: std::collections::BTreeSet::new(),
    }
}

fn node() -> Object<Node> {
    let meta: Meta = crate::vm::example(stead_schemas::instance::Power::Running, 1, 0).meta;
    let spec = NodeSpec { disk_reserve: Bytes(10 << 30), ..node_spec() };
    Object { meta, spec, status: NodeStatus::default() }
}

fn end(outcome: Outcome) -> PassEnd {
    PassEnd {
        now: crate::vm::example(stead_schemas::instance::Power::Running, 1, 0).meta.created_at.into(),
        outcome,
    }
}

#[test]
fn a_node_reports_its_last_observation_while_none_is_possible() {
    let mut node = node();
    assert!(!node.is_observed());
    let failed = Outcome::Failed { kind: HostErrorKind::Transient, message: "no".to_owned(), attempt: 1 };
    node.status = status(&node, None, &end(failed.clone()));
    assert!(!node.is_observed() && !condition::is_ready(&node.status.conditions));
    node.status = status(&node, Some(&seen(true)), &end(Outcome::Converged));
    assert!(node.is_observed() && condition::is_ready(&node.status.conditions));
    assert_eq!(
        (node.status.capacity.disk, node.status.allocatable.disk),
        (Bytes(100 << 30), Bytes(90 << 30))
    );
    assert_eq!(node.status.observed_generation, Generation(1));
    assert_eq!(node.capabilities(Hypervisor::Firecracker), Some(VmmCapabilities::NONE));
    assert_eq!(node.capabilities(Hypervisor::Vz), None);
    let later = status(&node, None, &end(failed));
    assert_eq!((later.capacity, &later.hypervisors), (node.status.capacity, &node.status.hypervisors));
    assert!(!condition::is_ready(&later.conditions));
}

#[test]
fn a_hypervisor_whose_program_is_missing_is_known_and_not_offered() {
    let mut node = node();
    for is_available in [true, false] {
        node.status = status(&node, Some(&seen(is_available)), &end(Outcome::Converged));
        assert_eq!(node.offer().hypervisors.contains(&Hypervisor::Firecracker), is_available);
        assert!(node.capabilities(Hypervisor::Firecracker).is_some());
    }
}

#[test]
fn an_instance_gets_its_part_of_the_network_by_its_processors() {
    let mut node = node();
    let gigabit = Rate(125_000_000);
    assert_eq!(node.default_bandwidth(2), None, "nothing is known before the first observation");
    // The host has four processors, and gives its network away twice.
    node.status = status(&node, Some(&seen(true)), &end(Outcome::Converged));
    assert_eq!(node.status.uplink_speed, Some(gigabit));
    assert_eq!(node.default_bandwidth(1), Some(Rate(62_500_000)));
    assert_eq!(node.default_bandwidth(2), Some(gigabit));
    assert_eq!(node.default_bandwidth(16), Some(gigabit), "no more than there is");
    node.spec.oversubscription.network = Ratio::whole(1);
    assert_eq!(node.default_bandwidth(1), Some(Rate(31_250_000)));
    for (configured, expected) in [(0, None), (1_000_000, Some(Rate(250_000))), (9, Some(Rate(8_000)))] {
        node.spec.capacity.network = Some(configured);
        assert_eq!(node.default_bandwidth(1), expected, "{configured} in place of what was observed");
    }
    node.spec.capacity.network = Some(u64::MAX);
    node.spec.oversubscription.network = Ratio::whole(1000);
    assert_eq!(node.default_bandwidth(u32::MAX), Some(stead_schemas::limits::BANDWIDTH_MAX));
}

#[tokio::test]
async fn a_node_is_declared_once_and_follows_the_configuration() {
    let store = opened(Kinds::new().with::<Node>());
    store.transact(|tx| admission::declare(tx, node_spec())).await.expect("declared");
    let first = local(&store).expect("there");
    let changed = NodeSpec { disk_reserve: Bytes(1), ..node_spec() };
    let spec = changed.clone();
    store.transact(|tx| admission::declare(tx, spec)).await.expect("declared");
    let second = local(&store).expect("there");
    assert_eq!((&second.meta.uid, &second.spec), (&first.meta.uid, &changed));
    assert_eq!(store.count::<Node>(), 1);
}
