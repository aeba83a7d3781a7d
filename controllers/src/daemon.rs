//! All reconcilers together: who is woken by whose changes. The real daemon and the simulated one
//! run the same.
//!
//! Reconcilers never call each other: a disk's new status wakes the instance that owns it, an
//! image's wakes the instances that refer to it, a network's wakes its ports.

use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, join_all};
use stead_schemas::image::Image;
use stead_schemas::instance::Instance;
use stead_schemas::meta::Kind;
use stead_schemas::names::Uid;
use stead_schemas::network::{Network, Port};
use tokio::sync::watch;

use crate::disk::DiskReconciler;
use crate::host::{Disks, Firewall, Images, Links, Machines};
use crate::image::ImageReconciler;
use crate::network::NetworkReconciler;
use crate::port::PortReconciler;
use crate::runtime::{Boundary, Clock, Drift, Reconciler, Runner, RunnerConfig};
use crate::store::{Change, Event, Store};
use crate::vm::Vms;

/// The host, one value for each capability.
#[derive(Debug, Clone)]
pub struct Ports<M, I, L, F, D> {
    pub machines: M,
    pub images: I,
    pub links: L,
    pub firewall: F,
    pub disks: D,
}

/// Where monitors of the host report, by kind.
#[derive(Debug, Clone)]
pub struct Drifts {
    pub images: Drift,
    pub disks: Drift,
    pub networks: Drift,
    pub ports: Drift,
    pub instances: Drift,
}

/// What all runners share.
#[derive(Clone)]
pub struct Settings {
    pub store: Store,
    pub clock: Arc<dyn Clock>,
    pub boundary: Arc<dyn Boundary>,
    pub resync: Duration,
    pub seed: u64,
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Settings").field("resync", &self.resync).finish_non_exhaustive()
    }
}

/// Starts one runner, which ends after the watch says true.
type Run = Box<dyn FnOnce(watch::Receiver<bool>) -> BoxFuture<'static, ()> + Send>;

/// The runners of every kind, ready to run.
pub struct Controllers {
    runners: Vec<Run>,
}

impl std::fmt::Debug for Controllers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Controllers").field("kinds", &self.runners.len()).finish()
    }
}

impl Controllers {
    pub fn new<M, I, L, F, D>(ports: Ports<M, I, L, F, D>, settings: &Settings) -> (Self, Drifts)
    where
        M: Machines,
        I: Images + Clone,
        L: Links + Clone,
        F: Firewall + Clone,
        D: Disks,
    {
        let Ports { machines, images, links, firewall, disks } = ports;
        let store = || settings.store.clone();
        let image =
            runner(settings, 1, ImageReconciler { images: images.clone(), store: store() }).map(freed_image);
        let disk = runner(settings, 2, DiskReconciler { disks });
        let network = runner(
            settings,
            3,
            NetworkReconciler {
                links: links.clone(),
                firewall: firewall.clone(),
                store: settings.store.clone(),
            },
        );
        let of_network = store();
        let port = runner(settings, 4, PortReconciler { links, firewall, store: store() })
            .map(move |event| ports_of_network(&of_network, event));
        let of_image = store();
        let vm = runner(settings, 5, Vms { machines, images, store: store() })
            .map(move |event| instances_of_image(&of_image, event));
        let drifts = Drifts {
            images: image.drift(),
            disks: disk.drift(),
            networks: network.drift(),
            ports: port.drift(),
            instances: vm.drift(),
        };
        let runners = vec![boxed(image), boxed(disk), boxed(network), boxed(port), boxed(vm)];
        (Self { runners }, drifts)
    }

    /// Runs until `shutdown` says true, then lets running passes end.
    pub async fn run(self, shutdown: watch::Receiver<bool>) {
        join_all(self.runners.into_iter().map(|run| run(shutdown.clone()))).await;
    }
}

fn runner<R: Reconciler>(settings: &Settings, salt: u64, reconciler: R) -> Runner<R> {
    let Settings { store, clock, boundary, resync, seed } = settings.clone();
    let config = RunnerConfig { resync, ..RunnerConfig::seeded(seed.wrapping_add(salt)) };
    Runner::new(reconciler, store, clock, boundary, config)
}

fn boxed<R: Reconciler>(runner: Runner<R>) -> Run {
    Box::new(|mut shutdown| {
        Box::pin(runner.run(async move {
            // A dropped sender means the same as a word from it.
            drop(shutdown.wait_for(|&is_over| is_over).await);
        }))
    })
}

/// An instance that is gone no longer refers to its image's content.
fn freed_image(event: &Event) -> Vec<Uid> {
    let is_gone = event.change == Change::Deleted && event.kind == Instance::NAME;
    let instance = is_gone.then(|| event.last::<Instance>()).flatten();
    instance.map(|instance| instance.spec.allocated.image.clone()).into_iter().collect()
}

fn ports_of_network(store: &Store, event: &Event) -> Vec<Uid> {
    if event.kind != Network::NAME {
        return Vec::new();
    }
    let ports = store.list::<Port>();
    ports.iter().filter(|port| port.spec.network == event.uid).map(|port| port.meta.uid.clone()).collect()
}

fn instances_of_image(store: &Store, event: &Event) -> Vec<Uid> {
    if event.kind != Image::NAME {
        return Vec::new();
    }
    let instances = store.list::<Instance>();
    let refers = instances.iter().filter(|instance| instance.spec.allocated.image == event.uid);
    refers.map(|instance| instance.meta.uid.clone()).collect()
}
