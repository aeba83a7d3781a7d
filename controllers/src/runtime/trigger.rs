//! What wakes a runner: the watch ring, drift of the host, and a slow resync.
//!
//! Level-triggered: a signal only names keys; what to do is read from the store and the host by the
//! pass. So a lost signal costs time until the next resync, never correctness, and a full channel
//! of drift is answered by looking at everything.
//! Cancel: `next` may be dropped at any await without losing a signal.

use std::sync::Arc;

use stead_schemas::limits::DRIFT_QUEUE_MAX;
use stead_schemas::meta::Kind;
use stead_schemas::names::Uid;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Interval, MissedTickBehavior};
use tracing::debug;

use crate::store::{Change, Event, Store, TooOld, Watch};

/// Which keys to look at.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Signal {
    /// The store changed.
    Changed(Vec<Uid>),
    /// The host may have.
    Drifted(Uid),
    /// Every object, and whatever else the host has of this kind.
    Everything(Cause),
}

/// Why everything is looked at: how much that says of one object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    /// Changes of the store were missed: any object may have changed.
    Missed,
    /// A monitor of the host cannot say what changed.
    Drift,
    /// The resync is due.
    Resync,
}

/// Where monitors of the host report; cheap to clone, never blocks.
#[derive(Debug, Clone)]
pub struct Drift {
    objects: mpsc::Sender<Uid>,
    everything: Arc<Notify>,
}

impl Drift {
    /// Something of this object changed on the host.
    pub fn object(&self, uid: Uid) {
        // Full: more is going on than the queue holds, so everything is looked at. Closed: the
        // runner ended, and the next one starts with everything.
        if self.objects.try_send(uid).is_err() {
            self.everything.notify_one();
        }
    }

    /// The monitor lost its place, or cannot say what changed.
    pub fn everything(&self) {
        self.everything.notify_one();
    }
}

/// Which further objects an event concerns.
pub(super) type Mapping = Box<dyn Fn(&Event) -> Vec<Uid> + Send + Sync>;

/// The receiving ends of all that wakes a runner.
pub(super) struct Triggers {
    kind: &'static str,
    store: Store,
    watch: Option<Watch>,
    mappings: Vec<Mapping>,
    drift: Drift,
    drifted: mpsc::Receiver<Uid>,
    resync: Option<Interval>,
}

impl Triggers {
    pub(super) fn new<K: Kind>(store: Store) -> Self {
        let (objects, drifted) = mpsc::channel(DRIFT_QUEUE_MAX);
        let drift = Drift { objects, everything: Arc::new(Notify::new()) };
        Self { kind: K::NAME, store, watch: None, mappings: Vec::new(), drift, drifted, resync: None }
    }

    pub(super) fn map(&mut self, mapping: Mapping) {
        self.mappings.push(mapping);
    }

    pub(super) fn drift(&self) -> Drift {
        self.drift.clone()
    }

    /// Begins to listen; the first tick of the resync is at once, which is the first full look.
    pub(super) fn start(&mut self, resync: std::time::Duration) {
        let mut interval = tokio::time::interval(resync);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.resync = Some(interval);
        self.watch = None;
    }

    /// The next signal.
    pub(super) async fn next(&mut self) -> Signal {
        let resync = self.resync.as_mut().expect("triggers are started before they are asked");
        let Some(watch) = &mut self.watch else {
            // The watch begins before the list that `Everything` is, so nothing falls in between.
            self.watch = rewatch(&self.store);
            return Signal::Everything(Cause::Missed);
        };
        loop {
            tokio::select! {
                biased;
                event = watch.next() => match event {
                    Ok(event) => {
                        let uids = concerned(self.kind, &self.mappings, &event);
                        if !uids.is_empty() {
                            return Signal::Changed(uids);
                        }
                    }
                    Err(TooOld { oldest }) => {
                        debug!(oldest, "fell behind the watch ring; listing again");
                        self.watch = rewatch(&self.store);
                        return Signal::Everything(Cause::Missed);
                    }
                },
                uid = self.drifted.recv() => {
                    return Signal::Drifted(uid.expect("the triggers hold a sender themselves"));
                }
                () = self.drift.everything.notified() => return Signal::Everything(Cause::Drift),
                _ = resync.tick() => return Signal::Everything(Cause::Resync),
            }
        }
    }
}

/// `None` when the ring moved on in between; the next call tries again.
fn rewatch(store: &Store) -> Option<Watch> {
    store.watch(None, store.revision()).ok()
}

fn concerned(kind: &'static str, mappings: &[Mapping], event: &Event) -> Vec<Uid> {
    let mut uids = Vec::new();
    // A status is written by this kind's own pass: it would only wake itself, again and again
    // while it fails. A record goes by its own pass too, after that pass found nothing left on the host.
    if event.kind == kind && !matches!(event.change, Change::StatusUpdated | Change::Deleted) {
        uids.push(event.uid.clone());
    }
    uids.extend(event.owner.iter().filter(|owner| owner.kind == kind).map(|owner| owner.uid.clone()));
    for mapping in mappings {
        uids.extend(mapping(event));
    }
    uids
}
