//! The declaration of this host as a node, and the wait for its first observation.

use std::time::Duration;

use stead_controllers::node;
use stead_controllers::store::Store;
use stead_schemas::node::NodeSpec;

use super::host::host_platform;
use super::{DEFAULT_HYPERVISOR, unrefused};
use crate::config::Config;

/// Time after which the API is served although this host was not observed yet.
const OBSERVATION_WAIT_MAX: Duration = Duration::from_secs(10);
/// Pause before a declaration that failed is tried again.
const DECLARE_AGAIN: Duration = Duration::from_secs(5);

async fn try_to_declare(store: &Store, spec: NodeSpec) -> anyhow::Result<()> {
    let declared = store.transact(move |tx| node::admission::declare(tx, spec)).await;
    declared.map(drop).map_err(unrefused)
}

/// Declares this host. On a full disk that is done as soon as there is room: until then, what exists can be read and
/// deleted, and VMs are kept.
pub(super) async fn declare(store: &Store, config: &Config) {
    declare_spec(store, config.node(host_platform(), DEFAULT_HYPERVISOR)).await;
}

async fn declare_spec(store: &Store, spec: NodeSpec) {
    let Err(error) = try_to_declare(store, spec.clone()).await else { return };
    tracing::error!(%error, "this host cannot be declared as a node yet");
    let store = store.clone();
    tokio::spawn(async move {
        while let Err(error) = try_to_declare(&store, spec.clone()).await {
            tracing::debug!(%error, "this host cannot be declared as a node yet");
            tokio::time::sleep(DECLARE_AGAIN).await;
        }
    });
}

/// Waits until this host was observed: requests that depend on it are refused until then. An observation that fails
/// is reported in the conditions of the node and in the log, and delays the API no longer than this.
pub(super) async fn observed(store: &Store) {
    if node::local(store).is_none() {
        return;
    }
    if tokio::time::timeout(OBSERVATION_WAIT_MAX, node::observed(store)).await.is_err() {
        tracing::error!("this host could not be observed yet; requests are refused until it is");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use stead_controllers::kinds;
    use stead_controllers::sim::{World, node_spec};
    use stead_controllers::store::{MemoryKv, PlainSealer};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn on_a_full_disk_the_host_is_declared_as_soon_as_there_is_room() {
        let (kv, world) = (MemoryKv::new(), Arc::new(World::new(1)));
        let opened = Store::open(kv.clone(), Arc::new(PlainSealer), world.clone(), world, kinds());
        let (store, writer) = opened.expect("opened");
        tokio::spawn(writer.run(std::future::pending::<()>()));
        kv.set_full(true);
        declare_spec(&store, node_spec()).await;
        assert!(node::local(&store).is_none());
        // Nothing waits for an observation that cannot come.
        observed(&store).await;
        kv.set_full(false);
        while node::local(&store).is_none() {
            tokio::time::sleep(DECLARE_AGAIN).await;
        }
    }
}
