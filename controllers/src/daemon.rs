//! All reconcilers together. The real daemon and the simulated one run the same code.
//!
//! Reconcilers never call each other: a new status of a disk wakes the instance that owns it, a new status of
//! an image wakes the instances that refer to it, and a new status of a network wakes its ports. Each kind
//! declares what wakes it (`Kind::WOKEN_BY`).

use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, join_all};
use stead_schemas::disk::Disk;
use stead_schemas::image::Image;
use stead_schemas::ingress::Ingress;
use stead_schemas::instance::Instance;
use stead_schemas::mediation::{Mediation, Mediator};
use stead_schemas::network::{Network, Nic};
use stead_schemas::node::Node;
use stead_schemas::schedule::SnapshotSchedule;
use stead_schemas::snapshot::Snapshot;
use stead_schemas::volume::Volume;
use tokio::sync::watch;

use crate::disk::DiskReconciler;
use crate::host::Host;
use crate::image::{self, ImageReconciler};
use crate::ingress::IngressReconciler;
use crate::mediation::MediationReconciler;
use crate::mediator::MediatorReconciler;
use crate::network::NetworkReconciler;
use crate::nic::NicReconciler;
use crate::node::{self, NodeReconciler};
use crate::runtime::{Boundary, Clock, Drift, Journal, Reconciler, Runner, RunnerConfig};
use crate::schedule::ScheduleReconciler;
use crate::snapshot::{Pools, SnapshotReconciler};
use crate::store::{Kinds, Store};
use crate::vm::{VmReconciler, admission};
use crate::volume::VolumeReconciler;

/// Returns the kinds that a store has.
#[must_use]
pub fn kinds() -> Kinds {
    Kinds::new()
        .with::<Instance>()
        .with::<Image>()
        .with::<Disk>()
        .with::<Network>()
        .with::<Nic>()
        .with::<Snapshot>()
        .with::<SnapshotSchedule>()
        .with::<Volume>()
        .with::<Ingress>()
        .with::<Node>()
        .with::<Mediator>()
        .with::<Mediation>()
}

/// The handles by which monitors of the host report changes, by kind.
#[derive(Debug, Clone)]
pub struct Drifts {
    pub images: Drift,
    pub disks: Drift,
    pub networks: Drift,
    pub nics: Drift,
    pub instances: Drift,
    pub snapshots: Drift,
    pub ingresses: Drift,
    pub mediators: Drift,
}

/// The settings that all runners share.
#[derive(Clone)]
pub struct Settings {
    pub store: Store,
    pub clock: Arc<dyn Clock>,
    pub boundary: Arc<dyn Boundary>,
    pub journal: Arc<dyn Journal>,
    pub resync: Duration,
    pub seed: u64,
    /// Prefix of the names of TAPs that reconcilers request, which are those of pooled instances.
    pub tap_prefix: String,
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Settings").field("resync", &self.resync).finish_non_exhaustive()
    }
}

/// A function that starts one runner. The runner ends after the watch becomes true.
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
    pub fn new<H: Host>(host: &H, settings: &Settings) -> (Self, Drifts) {
        let host = || host.clone();
        let store = || settings.store.clone();
        let for_freed_images = store();
        let image = runner(settings, 1, ImageReconciler { host: host(), store: store() })
            .map(move |event| image::freed(&for_freed_images, event));
        let disk = runner(settings, 2, DiskReconciler { host: host(), store: store() });
        let network = runner(settings, 3, NetworkReconciler { host: host(), store: store() });
        let nic = runner(settings, 4, NicReconciler { host: host(), store: store() });
        let vm = runner(settings, 5, VmReconciler { host: host(), store: store() });
        let snapshot = SnapshotReconciler { host: host(), store: store(), pools: pools(settings) };
        let snapshot = runner(settings, 6, snapshot);
        let schedule = runner(settings, 7, ScheduleReconciler { store: store() });
        let volume = runner(settings, 8, VolumeReconciler { store: store() });
        let ingress = runner(settings, 9, IngressReconciler { host: host() });
        let for_image_space = store();
        let node = runner(settings, 10, NodeReconciler { host: host() })
            .map(move |event| node::of_image_change(&for_image_space, event));
        let mediator = runner(settings, 11, MediatorReconciler { host: host(), store: store() });
        let mediation = runner(settings, 12, MediationReconciler { host: host(), store: store() });
        let drifts = Drifts {
            images: image.drift(),
            disks: disk.drift(),
            networks: network.drift(),
            nics: nic.drift(),
            instances: vm.drift(),
            snapshots: snapshot.drift(),
            ingresses: ingress.drift(),
            mediators: mediator.drift(),
        };
        let runners = vec![
            boxed(image),
            boxed(disk),
            boxed(network),
            boxed(nic),
            boxed(vm),
            boxed(snapshot),
            boxed(schedule),
            boxed(volume),
            boxed(ingress),
            boxed(node),
            boxed(mediator),
            boxed(mediation),
        ];
        (Self { runners }, drifts)
    }

    /// Runs until `shutdown` becomes true, and then lets running passes end.
    pub async fn run(self, shutdown: watch::Receiver<bool>) {
        join_all(self.runners.into_iter().map(|run| run(shutdown.clone()))).await;
    }
}

fn runner<Controller: Reconciler>(
    settings: &Settings,
    salt: u64,
    reconciler: Controller,
) -> Runner<Controller> {
    let Settings { store, clock, boundary, journal, resync, seed, tap_prefix: _ } = settings.clone();
    let config = RunnerConfig { resync, ..RunnerConfig::seeded(seed.wrapping_add(salt)) };
    Runner::new(reconciler, store, clock, boundary, config).with_journal(journal)
}

fn pools(settings: &Settings) -> Pools {
    let tap_prefix = settings.tap_prefix.clone();
    Pools(Arc::new(move |tx, snapshot| {
        admission::scale(tx, snapshot, &tap_prefix).map_err(|refused| refused.to_string())
    }))
}

fn boxed<Controller: Reconciler>(runner: Runner<Controller>) -> Run {
    Box::new(|mut shutdown| {
        Box::pin(runner.run(async move {
            // A dropped sender has the same meaning as `true`.
            drop(shutdown.wait_for(|&is_over| is_over).await);
        }))
    })
}
