//! All reconcilers together: who is woken by whose changes. The real daemon and the simulated one
//! run the same.
//!
//! Reconcilers never call each other: a disk's new status wakes the instance that owns it, an
//! image's wakes the instances that refer to it, a network's wakes its ports.

use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, join_all};
use stead_schemas::disk::Disk;
use stead_schemas::image::Image;
use stead_schemas::instance::Instance;
use stead_schemas::meta::Kind;
use stead_schemas::names::{Digest, Name, Uid};
use stead_schemas::schedule::SnapshotSchedule;
use stead_schemas::snapshot::{Snapshot, SnapshotPhase};
use stead_schemas::volume::Volume;
use tokio::sync::watch;

use crate::disk::DiskReconciler;
use crate::host::{Disks, Doors, Firewall, Flows, Images, Links, Listeners, Machines, Probes, Snapshots};
use crate::image::ImageReconciler;
use crate::ingress::IngressReconciler;
use crate::network::NetworkReconciler;
use crate::port::{self, PortReconciler};
use crate::runtime::{Boundary, Clock, Drift, Journal, Reconciler, Runner, RunnerConfig};
use crate::schedule::ScheduleReconciler;
use crate::snapshot::{Pools, SnapshotReconciler};
use crate::store::{Change, Event, Store};
use crate::vm::{Vms, forks};
use crate::volume::VolumeReconciler;

/// The host, one value for each capability.
#[derive(Debug, Clone)]
pub struct Ports<M, I, L, F, D, P, C, W, N> {
    pub machines: M,
    pub images: I,
    pub links: L,
    pub firewall: F,
    pub disks: D,
    pub probes: P,
    pub flows: C,
    pub doors: W,
    pub listeners: N,
}

/// Where monitors of the host report, by kind.
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

/// What all runners share.
#[derive(Clone)]
pub struct Settings {
    pub store: Store,
    pub clock: Arc<dyn Clock>,
    pub boundary: Arc<dyn Boundary>,
    pub journal: Arc<dyn Journal>,
    pub resync: Duration,
    pub seed: u64,
    /// Of TAPs that reconcilers ask for: those of pools.
    pub tap_prefix: String,
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
    pub fn new<M, I, L, F, D, P, C, W, N>(
        ports: Ports<M, I, L, F, D, P, C, W, N>,
        settings: &Settings,
    ) -> (Self, Drifts)
    where
        M: Machines + Snapshots + Clone,
        I: Images + Clone,
        L: Links + Clone,
        F: Firewall + Clone,
        D: Disks + Clone,
        P: Probes,
        C: Flows,
        W: Doors,
        N: Listeners,
    {
        let Ports { machines, images, links, firewall, disks, probes, flows, doors, listeners } = ports;
        let store = || settings.store.clone();
        let of_freed = store();
        let image = runner(settings, 1, ImageReconciler { images: images.clone(), store: store() })
            .map(move |event| freed_image(&of_freed, event));
        let of_snapshot = store();
        let disk = runner(settings, 2, DiskReconciler { disks: disks.clone(), store: store() })
            .map(move |event| disks_of_snapshot(&of_snapshot, event));
        let network = runner(
            settings,
            3,
            NetworkReconciler { links: links.clone(), firewall: firewall.clone(), store: store() },
        );
        let of_network = store();
        let port = runner(settings, 4, PortReconciler { links, firewall, store: store() })
            .map(move |event| port::concerned(&of_network, event));
        let of_image = store();
        let of_origin = store();
        let of_volumes = store();
        let vm = Vms { machines: machines.clone(), images, probes, flows, doors, store: store() };
        let vm = runner(settings, 5, vm)
            .map(move |event| instances_of_image(&of_image, event))
            .map(move |event| instances_of_snapshot(&of_origin, event))
            .map(move |event| instances_of_volumes(&of_volumes, event));
        let of_source = store();
        let snapshots = machines.clone();
        let snapshot =
            SnapshotReconciler { snapshots, machines, disks, store: store(), pools: pools(settings) };
        let snapshot = runner(settings, 6, snapshot).map(move |event| snapshots_of(&of_source, event));
        let of_schedule = store();
        let schedule = runner(settings, 7, ScheduleReconciler { store: store() })
            .map(move |event| schedules_of(&of_schedule, event));
        let volume = runner(settings, 8, VolumeReconciler { store: store() });
        let ingress = runner(settings, 9, IngressReconciler { listeners });
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

    /// Runs until `shutdown` says true, then lets running passes end.
    pub async fn run(self, shutdown: watch::Receiver<bool>) {
        join_all(self.runners.into_iter().map(|run| run(shutdown.clone()))).await;
    }
}

fn runner<R: Reconciler>(settings: &Settings, salt: u64, reconciler: R) -> Runner<R> {
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

fn boxed<R: Reconciler>(runner: Runner<R>) -> Run {
    Box::new(|mut shutdown| {
        Box::pin(runner.run(async move {
            // A dropped sender means the same as a word from it.
            drop(shutdown.wait_for(|&is_over| is_over).await);
        }))
    })
}

/// An instance or a snapshot that is gone no longer refers to its content. Where its image still does,
/// nothing is to be done; where nothing may refer to it any more, a pass of the id that is gone collects:
/// it is no image's, so no image that fails is asked for again by that.
pub(crate) fn freed_image(store: &Store, event: &Event) -> Vec<Uid> {
    let freed = match event.change {
        Change::Deleted if event.kind == Instance::NAME => event.last::<Instance>().and_then(|instance| {
            let of_origin = instance.spec.origin.as_ref().and_then(|origin| origin.image_digest.clone());
            let digest = instance.status.image_digest.clone().or(of_origin)?;
            Some((instance.spec.allocated.image.clone(), digest))
        }),
        Change::Deleted if event.kind == Snapshot::NAME => event.last::<Snapshot>().and_then(|snapshot| {
            let digest = snapshot.spec.image_digest.clone()?;
            Some((snapshot.spec.instance.allocated.image.clone(), digest))
        }),
        _ => None,
    };
    let is_held = |(image, digest): &(Uid, Digest)| {
        let image = store.get::<Image>(image).filter(|image| !image.meta.is_deleting());
        image.is_some_and(|image| image.status.digest.as_ref() == Some(digest))
    };
    freed.filter(|freed| !is_held(freed)).map(|_| event.uid.clone()).into_iter().collect()
}

fn disks_of_snapshot(store: &Store, event: &Event) -> Vec<Uid> {
    if event.kind != Snapshot::NAME {
        return Vec::new();
    }
    let disks = store.list::<Disk>();
    let begins = disks.iter().filter(|disk| disk.spec.source.as_ref() == Some(&event.uid));
    begins.map(|disk| disk.meta.uid.clone()).collect()
}

fn instances_of_snapshot(store: &Store, event: &Event) -> Vec<Uid> {
    if event.kind != Snapshot::NAME {
        return Vec::new();
    }
    let instances = store.list::<Instance>();
    let begins = instances
        .iter()
        .filter(|instance| instance.spec.origin.as_ref().is_some_and(|origin| origin.snapshot == event.uid));
    begins.map(|instance| instance.meta.uid.clone()).collect()
}

/// Instances that mount a volume whose disk is there by now, that another instance has left, or that was
/// copied.
fn instances_of_volumes(store: &Store, event: &Event) -> Vec<Uid> {
    let volumes: Vec<Uid> = match (event.kind, event.change) {
        (Volume::NAME, _) => vec![event.uid.clone()],
        (Instance::NAME, Change::Deleted) => {
            let mounts = event.last::<Instance>().map(|instance| instance.spec.volumes.clone());
            mounts.unwrap_or_default().into_iter().map(|mount| mount.volume).collect()
        }
        (Snapshot::NAME, _) => {
            let snapshot = store.get::<Snapshot>(&event.uid).or_else(|| event.last::<Snapshot>());
            let disks = snapshot.map(|snapshot| snapshot.spec.volume_disks.clone());
            disks.unwrap_or_default().into_iter().map(|disk| disk.volume).collect()
        }
        _ => Vec::new(),
    };
    if volumes.is_empty() {
        return volumes;
    }
    let instances = store.list::<Instance>();
    let mounting = instances
        .iter()
        .filter(|instance| instance.spec.volumes.iter().any(|mount| volumes.contains(&mount.volume)));
    mounting.map(|instance| instance.meta.uid.clone()).collect()
}

/// Snapshots that wait for an instance to be captured, and those that a disk or an instance was the
/// last to need.
fn snapshots_of(store: &Store, event: &Event) -> Vec<Uid> {
    let mut concerned: Vec<Uid> = match event.kind {
        Instance::NAME => {
            let origin = store.get::<Instance>(&event.uid).or_else(|| event.last::<Instance>());
            origin
                .and_then(|instance| instance.spec.origin.clone())
                .map(|origin| origin.snapshot)
                .into_iter()
                .collect()
        }
        Disk::NAME => {
            let disk = store.get::<Disk>(&event.uid).or_else(|| event.last::<Disk>());
            disk.and_then(|disk| disk.spec.source.clone()).into_iter().collect()
        }
        _ => return Vec::new(),
    };
    if event.kind == Instance::NAME {
        let snapshots = store.list::<Snapshot>();
        let waiting = snapshots.iter().filter(|snapshot| {
            snapshot.spec.source == event.uid && snapshot.status.phase == SnapshotPhase::Pending
        });
        concerned.extend(waiting.map(|snapshot| snapshot.meta.uid.clone()));
    }
    concerned
}

/// The schedule of an instance that changed, and the one that a snapshot was taken by.
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
    if event.kind != Image::NAME {
        return Vec::new();
    }
    let instances = store.list::<Instance>();
    let refers = instances.iter().filter(|instance| instance.spec.allocated.image == event.uid);
    refers.map(|instance| instance.meta.uid.clone()).collect()
}
