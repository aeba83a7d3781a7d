//! Memory that is taken back from instances while their host is under pressure, where the configuration allows it.
//!
//! Instances get the memory again after a few minutes.

use std::time::Duration;

use stead_schemas::limits::RECLAIM_HOLD_DEFAULT;
use stead_schemas::quantity::Bytes;
use stead_schemas::resource::Pressure;

use crate::node::local;
use crate::store::Store;
use crate::vm::admission::reclaim;

/// Time between two observations of the pressure. Guests have given back by then what they were asked for before.
const INTERVAL: Duration = Duration::from_secs(15);
/// Part of the memory of a host that should be available, in percent. A host under pressure takes back what is missing.
const AVAILABLE_PERCENT: u64 = 15;

/// Returns how many bytes a host of this size should take back.
fn missing(pressure: Pressure, size: Bytes) -> u64 {
    let available = size.0 / 100 * AVAILABLE_PERCENT;
    if pressure.is_high { available.saturating_sub(pressure.available.0) } else { 0 }
}

/// Observes the pressure again and again, and takes memory back while it is high. It never returns.
pub async fn relieve(store: Store, read: impl Fn() -> Pressure + Send) {
    let mut ticks = tokio::time::interval(INTERVAL);
    loop {
        ticks.tick().await;
        let size = local(&store).map(|node| node.status.capacity.memory).unwrap_or_default();
        let bytes = missing(read(), size);
        if bytes == 0 {
            continue;
        }
        let taken = store.transact(move |tx| reclaim(tx, bytes, RECLAIM_HOLD_DEFAULT)).await;
        match taken {
            Ok((shares, until)) => {
                let instances = shares.iter().filter(|share| share.is_possible()).count();
                tracing::warn!(bytes, instances, %until, "the host is short of memory, which is taken back");
            }
            Err(error) => tracing::warn!(%error, "the host is short of memory, and none can be taken back"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use stead_schemas::instance::{Instance, InstanceStatus, Power, State};
    use stead_schemas::meta::Tags;

    use super::*;
    use crate::sim::observe_node;
    use crate::store::tests::opened;
    use crate::store::{Kinds, New};

    const GIB: u64 = 1 << 30;

    #[test]
    fn only_a_host_under_pressure_takes_back_what_is_missing() {
        let size = Bytes(100 * GIB);
        let pressure = |available, is_high| Pressure { available: Bytes(available * GIB), is_high };
        assert_eq!(missing(pressure(1, false), size), 0);
        assert_eq!(missing(pressure(16, true), size), 0);
        assert_eq!(missing(pressure(5, true), size), 10 * GIB, "what is missing of 15 %");
        assert_eq!(missing(pressure(0, true), Bytes(0)), 0, "a host that was not measured");
    }

    #[tokio::test(start_paused = true)]
    async fn memory_is_taken_back_while_the_pressure_is_high_and_not_before() {
        let store = opened(Kinds::new().with::<Instance>().with::<stead_schemas::node::Node>());
        observe_node(&store).await;
        let mut object = crate::vm::example(Power::Running, 1, 0);
        object.spec.hotplug = Bytes(GIB);
        let uid = object.meta.uid.clone();
        let (name, spec) = (object.meta.name, object.spec);
        let new = New { uid: Some(uid.clone()), name, tags: Tags::new(), owner: None, spec };
        store.transact(move |tx| tx.create::<Instance>(new)).await.expect("created");
        let status = InstanceStatus {
            state: State::Running,
            hotplugged: Some(Bytes(GIB)),
            returns_memory: true,
            ..InstanceStatus::default()
        };
        store.write_status::<Instance>(&uid, status).await.expect("written");
        let node = local(&store).expect("declared");
        let mut status = node.status.clone();
        status.capacity.memory = Bytes(64 * GIB);
        store.write_status::<stead_schemas::node::Node>(&node.meta.uid, status).await.expect("written");

        let is_high = Arc::new(AtomicBool::new(false));
        let shown = is_high.clone();
        let read = move || Pressure { available: Bytes(GIB), is_high: shown.load(Ordering::Relaxed) };
        tokio::spawn(relieve(store.clone(), read));
        let held = || store.get::<Instance>(&uid).expect("there").spec.memory_hold;
        tokio::time::sleep(INTERVAL * 4).await;
        assert_eq!(held(), None);
        is_high.store(true, Ordering::Relaxed);
        let is_held = async {
            while held().is_none() {
                tokio::time::sleep(INTERVAL).await;
            }
        };
        tokio::time::timeout(INTERVAL * 100, is_held).await.expect("it is taken back");
        assert_eq!(held().map(|hold| hold.hotplugged), Some(Bytes(0)));
    }
}
