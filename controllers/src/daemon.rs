//! All reconcilers together, and the mapping from changes to the reconcilers that they wake. The real daemon
//! and the simulated one run the same code.
//!
//! Reconcilers never call each other: a new status of a disk wakes the instance that owns it, a new status of
//! an image wakes the instances that refer to it, and a new status of a network wakes its ports.

use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, join_all};
use stead_schemas::disk::Disk;
use stead_schemas::image::Image;
use stead_schemas::ingress::Ingress;
use stead_schemas::instance::Instance;
use stead_schemas::meta::Kind;
use stead_schemas::names::{Name, Uid};
use stead_schemas::network::{Network, Port};
use stead_schemas::references::{Ref, Role, Target};
use stead_schemas::schedule::SnapshotSchedule;
use stead_schemas::snapshot::Snapshot;
use stead_schemas::volume::Volume;
use tokio::sync::watch;

use crate::disk::DiskReconciler;
use crate::host::Host;
use crate::image::{self, ImageReconciler};
use crate::ingress::IngressReconciler;
use crate::network::NetworkReconciler;
use crate::port::{self, PortReconciler};
use crate::runtime::{Boundary, Clock, Drift, Journal, Reconciler, Runner, RunnerConfig};
use crate::schedule::ScheduleReconciler;
use crate::snapshot::{Pools, SnapshotReconciler};
use crate::store::{Event, Kinds, Store};
use crate::vm::{Vms, forks};
use crate::volume::VolumeReconciler;

/// Returns the kinds that a store has.
#[must_use]
pub fn kinds() -> Kinds {
    Kinds::new()
        .with::<Instance>()
        .with::<Image>()
        .with::<Disk>()
        .with::<Network>()
        .with::<Port>()
        .with::<Snapshot>()
        .with::<SnapshotSchedule>()
        .with::<Volume>()
        .with::<Ingress>()
}

/// The handles by which monitors of the host report changes, by kind.
#[derive(Debug, Clone)]
pub struct Drifts {
    pub images: Drift,
    pub disks: Drift,
    pub networks: Drift,
    pub ports: Drift,
    pub instances: Drift,
    pub snapshots: Drift,
    pub ingresses: Drift,
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
            .map(move |event| freed_image(&for_freed_images, event));
        let for_snapshots = store();
        let disk = runner(settings, 2, DiskReconciler { host: host(), store: store() })
            .map(move |event| disks_of_snapshot(&for_snapshots, event));
        let network = runner(settings, 3, NetworkReconciler { host: host(), store: store() });
        let for_networks = store();
        let port = runner(settings, 4, PortReconciler { host: host(), store: store() })
            .map(move |event| port::concerned(&for_networks, event));
        let for_images = store();
        let for_origins = store();
        let for_volumes = store();
        let vm = runner(settings, 5, Vms { host: host(), store: store() })
            .map(move |event| instances_of_image(&for_images, event))
            .map(move |event| instances_of_snapshot(&for_origins, event))
            .map(move |event| instances_of_volumes(&for_volumes, event));
        let for_sources = store();
        let snapshot = SnapshotReconciler { host: host(), store: store(), pools: pools(settings) };
        let snapshot = runner(settings, 6, snapshot).map(move |event| snapshots_of(&for_sources, event));
        let for_schedules = store();
        let schedule = runner(settings, 7, ScheduleReconciler { store: store() })
            .map(move |event| schedules_of(&for_schedules, event));
        let volume = runner(settings, 8, VolumeReconciler { store: store() });
        let ingress = runner(settings, 9, IngressReconciler { host: host() });
        let drifts = Drifts {
            images: image.drift(),
            disks: disk.drift(),
            networks: network.drift(),
            ports: port.drift(),
            instances: vm.drift(),
            snapshots: snapshot.drift(),
            ingresses: ingress.drift(),
        };
        let runners = vec![
            boxed(image),
            boxed(disk),
            boxed(network),
            boxed(port),
            boxed(vm),
            boxed(snapshot),
            boxed(schedule),
            boxed(volume),
            boxed(ingress),
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
    Runner::new(reconciler, store, clock, boundary, config).telling(journal)
}

fn pools(settings: &Settings) -> Pools {
    let tap_prefix = settings.tap_prefix.clone();
    Pools(Arc::new(move |tx, snapshot| {
        forks::tend(tx, snapshot, &tap_prefix).map_err(|refused| refused.to_string())
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

/// Returns the collecting pass if a change left content behind that no object refers to any more. An image
/// that is being deleted removes its content itself.
pub(crate) fn freed_image(store: &Store, event: &Event) -> Vec<Uid> {
    let is_left = |reference: &Ref| reference.role == Role::Content && !store.is_referred_to(reference);
    let is_removed_by_its_image = event.kind == Image::NAME
        && store.get::<Image>(&event.uid).is_none_or(|image| image.meta.is_deleting());
    if is_removed_by_its_image || !event.dropped.iter().any(is_left) {
        return Vec::new();
    }
    image::collector().into_iter().collect()
}

fn disks_of_snapshot(store: &Store, event: &Event) -> Vec<Uid> {
    match event.kind {
        Snapshot::NAME => store.uids_referring::<Disk>(&Ref::to::<Snapshot>(Role::AwaitsCopy, &event.uid)),
        _ => Vec::new(),
    }
}

fn instances_of_snapshot(store: &Store, event: &Event) -> Vec<Uid> {
    match event.kind {
        Snapshot::NAME => {
            store.uids_referring::<Instance>(&Ref::to::<Snapshot>(Role::AwaitsMemory, &event.uid))
        }
        _ => Vec::new(),
    }
}

/// Returns the instances that mount a volume whose disk may exist by now, that another instance has left, or
/// that was copied.
fn instances_of_volumes(store: &Store, event: &Event) -> Vec<Uid> {
    let mounting =
        |role: Role, volume: &Uid| store.uids_referring::<Instance>(&Ref::to::<Volume>(role, volume));
    let mut concerned = Vec::new();
    if event.kind == Volume::NAME {
        concerned.extend(mounting(Role::Writes, &event.uid));
        concerned.extend(mounting(Role::Reads, &event.uid));
    }
    for reference in event.dropped.iter().filter(|_| matches!(event.kind, Instance::NAME | Snapshot::NAME)) {
        let Some(volume) = reference.uid_of::<Volume>() else { continue };
        // An instance that writes waits for all others; an instance that reads waits for those that wrote.
        concerned.extend(mounting(Role::Writes, volume));
        if reference.role == Role::Writes {
            concerned.extend(mounting(Role::Reads, volume));
        }
    }
    concerned
}

/// Returns the snapshots that wait for an instance to be captured, and the snapshots that no longer have a
/// disk or an instance that needs them.
fn snapshots_of(store: &Store, event: &Event) -> Vec<Uid> {
    let is_needing = |reference: &&Ref| matches!(reference.role, Role::AwaitsMemory | Role::AwaitsCopy);
    let left = event.dropped.iter().filter(is_needing).filter_map(|reference| reference.uid_of::<Snapshot>());
    let mut concerned: Vec<Uid> = left.cloned().collect();
    // A fork took a pooled instance.
    let owners = event.dropped.iter().filter_map(|reference| match &reference.target {
        Target::Owner(uid) => Some(uid),
        _ => None,
    });
    concerned.extend(owners.filter(|uid| store.get::<Snapshot>(uid).is_some()).cloned());
    if event.kind == Instance::NAME {
        let captures = Ref::to::<Instance>(Role::Captures, &event.uid);
        concerned.extend(store.uids_referring::<Snapshot>(&captures));
    }
    concerned
}

/// Returns the schedule of an instance that changed, or the schedule that a snapshot was taken by.
fn schedules_of(store: &Store, event: &Event) -> Vec<Uid> {
    let schedule = match event.kind {
        Instance::NAME => {
            store.find::<SnapshotSchedule>(&Name::from(&event.uid)).map(|schedule| schedule.meta.uid.clone())
        }
        Snapshot::NAME => {
            let snapshot = store.get::<Snapshot>(&event.uid).or_else(|| event.last::<Snapshot>());
            snapshot.and_then(|snapshot| Some(snapshot.spec.schedule.as_ref()?.schedule.clone()))
        }
        _ => None,
    };
    schedule.into_iter().collect()
}

fn instances_of_image(store: &Store, event: &Event) -> Vec<Uid> {
    match event.kind {
        Image::NAME => store.uids_referring::<Instance>(&Ref::to::<Image>(Role::Image, &event.uid)),
        _ => Vec::new(),
    }
}
