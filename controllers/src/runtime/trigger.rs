//! Triggers of a runner: the watch ring, drift of the host, and a slow resync.
//!
//! Triggers are level-triggered: a signal only names keys, and the pass reads from the store and the host
//! what to do. So a lost signal costs time until the next resync, never correctness. If the channel of drift
//! is full, everything is observed.
//! Cancel: `next` may be dropped at any await without losing a signal.

use std::sync::Arc;

use stead_schemas::limits::DRIFT_QUEUE_MAX;
use stead_schemas::meta::Kind;
use stead_schemas::names::Uid;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Interval, MissedTickBehavior};
use tracing::debug;

use super::dependents::dependents;
use crate::store::{Change, Event, Store, TooOld, Watch};

/// The keys to observe.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Signal {
    /// The store changed.
    Changed(Vec<Uid>),
    /// The host may have changed.
    Drifted(Uid),
    /// All objects may have changed, and also anything else of this kind on the host.
    Everything(Cause),
}

/// The reason why everything is observed. The reason decides how a single object is scheduled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    /// Changes of the store were missed: any object may have changed.
    Missed,
    /// A monitor of the host cannot tell what changed.
    Drift,
    /// The resync is due.
    Resync,
}

/// The handle by which monitors of the host report changes. It is cheap to clone and never blocks.
#[derive(Debug, Clone)]
pub struct Drift {
    objects: mpsc::Sender<Uid>,
    everything: Arc<Notify>,
}

impl Drift {
    /// Reports that something of this object changed on the host.
    pub fn object(&self, uid: Uid) {
        // If the queue is full, more is going on than it holds, so everything is observed. If it is closed,
        // the runner ended, and the next runner starts with everything.
        if self.objects.try_send(uid).is_err() {
            self.everything.notify_one();
        }
    }

    /// Reports that the monitor lost its position, or cannot tell what changed.
    pub fn everything(&self) {
        self.everything.notify_one();
    }
}

/// A function that returns the objects that an event concerns.
pub(super) type Mapping = Box<dyn Fn(&Event) -> Vec<Uid> + Send + Sync>;

/// The receiving ends of all triggers of a runner.
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
        let for_dependents = store.clone();
        let dependents: Mapping = Box::new(move |event| dependents::<K>(&for_dependents, event));
        let mappings = vec![dependents];
        Self { kind: K::NAME, store, watch: None, mappings, drift, drifted, resync: None }
    }

    pub(super) fn map(&mut self, mapping: Mapping) {
        self.mappings.push(mapping);
    }

    pub(super) fn drift(&self) -> Drift {
        self.drift.clone()
    }

    /// Starts to listen. The first tick of the resync comes at once and is the first full observation.
    pub(super) fn start(&mut self, resync: std::time::Duration) {
        let mut interval = tokio::time::interval(resync);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.resync = Some(interval);
        self.watch = None;
    }

    /// Waits for the next signal.
    pub(super) async fn next(&mut self) -> Signal {
        let resync = self.resync.as_mut().expect("triggers are started before they are asked");
        let Some(watch) = &mut self.watch else {
            // The watch begins before the list that `Everything` causes, so no change is missed in between.
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

/// Returns `None` if the ring moved on in between; the next call tries again.
fn rewatch(store: &Store) -> Option<Watch> {
    store.watch(None, store.revision()).ok()
}

fn concerned(kind: &'static str, mappings: &[Mapping], event: &Event) -> Vec<Uid> {
    let mut uids = Vec::new();
    // This kind's own pass writes its statuses, so a status event would only wake that pass again and again
    // while it fails. The own pass also removes the record, after it found nothing left on the host.
    if event.kind == kind && !matches!(event.change, Change::StatusUpdated | Change::Deleted) {
        uids.push(event.uid.clone());
    }
    for mapping in mappings {
        uids.extend(mapping(event));
    }
    uids
}
