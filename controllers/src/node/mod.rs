//! The node reconciler: it writes what was observed of this host to the status of its node.
//!
//! Guarantees: a fact that could not be observed keeps its last value, and the conditions say why.
//! Never: changes the host.
//! Cancel/crash: there is no step that could be cut short.
//!
//! ```text
//! declared --(first observation)--> observed --(each observation)--> observed
//! ```

pub mod admission;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use stead_schemas::image::Image;
use stead_schemas::meta::{Kind, Object};
use stead_schemas::names::{Name, Uid};
use stead_schemas::node::{LOCAL, Node, NodeStatus, Resources};
use stead_schemas::quantity::Bytes;

use crate::host::{Facts, Host, HostError, HostSeen};
use crate::runtime::{Desired, Moment, PassEnd, Plan, Reconciler, conditions};
use crate::store::{Event, Store};

/// Capabilities of the node reconciler.
#[derive(Debug)]
pub struct NodeReconciler<H> {
    pub host: H,
}

/// The empty set of steps: a node is only observed.
#[derive(Debug, Clone, PartialEq, Eq, strum::IntoStaticStr, strum::VariantNames)]
pub enum Action {}

impl<H: Host> Reconciler for NodeReconciler<H> {
    type Kind = Node;
    type Observed = HostSeen;
    type Action = Action;

    async fn observe(&self, _: &Uid, _: Option<&Object<Node>>) -> Result<HostSeen, HostError> {
        self.host.facts().inspect().await
    }

    fn plan(_: &Desired<'_, Node>, _: &HostSeen, _: Moment) -> Plan<Action> {
        Plan::Converged
    }

    async fn act(&self, action: &Action) -> Result<(), HostError> {
        match *action {}
    }

    fn status(object: &Object<Node>, seen: Option<&HostSeen>, end: &PassEnd) -> NodeStatus {
        status(object, seen, end)
    }

    /// Returns no uids, because nothing on the host is made for a node.
    async fn owned(&self) -> Result<Vec<Uid>, HostError> {
        Ok(Vec::new())
    }
}

fn status(object: &Object<Node>, seen: Option<&HostSeen>, end: &PassEnd) -> NodeStatus {
    let generation = object.meta.generation;
    let conditions = conditions::standard(&object.status.conditions, generation, end);
    let known = NodeStatus { conditions, observed_generation: generation, ..object.status.clone() };
    let Some(seen) = seen else { return known };
    let left = |size: Bytes, reserve: Bytes| Bytes(size.0.saturating_sub(reserve.0));
    let disk = left(seen.capacity.disk, object.spec.disk_reserve);
    let memory = left(seen.capacity.memory, object.spec.memory_reserve);
    NodeStatus {
        capacity: seen.capacity,
        allocatable: Resources { disk, memory, ..seen.capacity },
        images: seen.images,
        hypervisors: seen.hypervisors.clone(),
        accelerator: Some(seen.accelerator),
        has_kernel_headers: seen.has_kernel_headers,
        has_cgroups: seen.has_cgroups,
        has_vhost_net: seen.has_vhost_net,
        uplink_speed: seen.uplink_speed,
        accelerator_problem: seen.accelerator_problem.clone(),
        missing_walls: seen.missing_walls.clone(),
        ..known
    }
}

/// Waits until this host was observed. Requests that depend on the host are refused until then.
pub async fn observed(store: &Store) {
    loop {
        // The watch begins before the question, so that no change is missed in between.
        let watch = store.watch(Some(Node::NAME), store.revision());
        if local(store).is_some_and(|node| node.is_observed()) {
            return;
        }
        match watch {
            Ok(mut watch) => drop(watch.next().await),
            Err(_) => tokio::task::yield_now().await,
        }
    }
}

/// Returns the node if an event changes the space that images take.
#[must_use]
pub fn of_image_change(store: &Store, event: &Event) -> Vec<Uid> {
    let is_image = event.kind == Image::NAME;
    let node = if is_image { local(store) } else { None };
    node.map(|node| node.meta.uid.clone()).into_iter().collect()
}

/// Returns the node of this host, or `None` before it was declared.
#[must_use]
pub fn local(store: &Store) -> Option<Arc<Object<Node>>> {
    store.find::<Node>(&Name::resource(LOCAL).ok()?)
}
