//! The watch ring: changes in order, for as long as they are kept.
//!
//! Guarantees: the events of one store have unique, rising revisions. A watch sees every event after its
//! start, or gets [`TooOld`]. An event can be read only after the state that it reports.
//! Never: blocks the writer; a slow watcher loses its position instead.
//! Cancel: `next` may be dropped at any await, and no event is lost by that.

use std::any::Any;
use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex};

use stead_schemas::limits::WATCH_RING_EVENTS;
use stead_schemas::meta::{Kind, Object, OwnerRef};
use stead_schemas::names::Uid;
use stead_schemas::references::Ref;
use tokio::sync::watch;

use super::error::TooOld;
use super::object::Erased;

/// The change of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    Created,
    /// The spec, the tags, the deletion mark or the finalizers changed.
    Updated,
    /// The status changed, and nothing else.
    StatusUpdated,
    Deleted,
}

/// A change of one object. Readers get the object itself by its uid.
#[derive(Clone)]
pub struct Event {
    /// The object's `resource_version` after the change; for deletions the deletion's own revision.
    pub revision: u64,
    pub kind: &'static str,
    pub uid: Uid,
    pub owner: Option<OwnerRef>,
    pub change: Change,
    /// References that the object had before and no longer has, the reference to its owner included.
    pub dropped: Vec<Ref>,
    /// References that the object has now and did not have before.
    pub gained: Vec<Ref>,
    pub(super) last: Option<Erased>,
}

impl Event {
    /// Returns the object as it was before its removal. It exists only with [`Change::Deleted`], and not if
    /// the record was unreadable.
    #[must_use]
    pub fn last<K: Kind>(&self) -> Option<Arc<Object<K>>> {
        let any: Arc<dyn Any + Send + Sync> = self.last.clone()?;
        any.downcast().ok()
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?} {} {}", self.revision, self.change, self.kind, self.uid)
    }
}

/// The last events, and the watchers that wait for more.
#[derive(Debug)]
pub(super) struct Ring {
    inner: Mutex<Events>,
    /// The newest revision in the ring, which watchers wait on.
    latest: watch::Sender<u64>,
}

#[derive(Debug)]
struct Events {
    ring: VecDeque<Arc<Event>>,
    /// The revision after which every event is in the ring.
    floor: u64,
}

impl Ring {
    pub(super) fn new(floor: u64) -> Self {
        let inner = Mutex::new(Events { ring: VecDeque::new(), floor });
        Self { inner, latest: watch::Sender::new(floor) }
    }

    pub(super) fn push(&self, events: impl IntoIterator<Item = Event>) {
        let mut latest = None;
        {
            let mut inner = self.inner.lock().expect("no code panics while it holds the ring");
            for event in events {
                latest = Some(event.revision);
                if inner.ring.len() == WATCH_RING_EVENTS {
                    let evicted = inner.ring.pop_front().expect("a full ring has a front");
                    inner.floor = evicted.revision;
                }
                inner.ring.push_back(Arc::new(event));
            }
        }
        if let Some(latest) = latest {
            self.latest.send_replace(latest);
        }
    }

    fn floor(&self) -> u64 {
        self.inner.lock().expect("no code panics while it holds the ring").floor
    }

    /// Returns the first event after `cursor` that fits, else the revision up to which none fits.
    fn after(&self, cursor: u64, kind: Option<&'static str>) -> Result<Result<Arc<Event>, u64>, TooOld> {
        let inner = self.inner.lock().expect("no code panics while it holds the ring");
        if cursor < inner.floor {
            return Err(TooOld { oldest: inner.floor });
        }
        let start = inner.ring.partition_point(|event| event.revision <= cursor);
        let fitting = inner.ring.range(start..).find(|event| kind.is_none_or(|kind| event.kind == kind));
        let newest = inner.ring.back().map_or(cursor, |event| event.revision.max(cursor));
        Ok(fitting.cloned().ok_or(newest))
    }
}

/// A position in the stream of events.
#[derive(Debug)]
pub struct Watch {
    ring: Arc<Ring>,
    latest: watch::Receiver<u64>,
    kind: Option<&'static str>,
    cursor: u64,
}

impl Watch {
    /// Creates a watch. `current` is the store's revision: a later `from` belongs to another life of the
    /// store.
    pub(super) fn new(
        ring: Arc<Ring>,
        kind: Option<&'static str>,
        from: u64,
        current: u64,
    ) -> Result<Self, TooOld> {
        let oldest = ring.floor();
        if from < oldest || from > current {
            return Err(TooOld { oldest });
        }
        let latest = ring.latest.subscribe();
        Ok(Self { ring, latest, kind, cursor: from })
    }

    /// Returns the next event and waits for it if needed.
    ///
    /// # Errors
    /// Returns [`TooOld`] if events were lost to this watch. The caller must list again and start a new
    /// watch.
    pub async fn next(&mut self) -> Result<Event, TooOld> {
        loop {
            // The revision is marked as seen before the ring is read, so that a push in between ends the
            // wait.
            self.latest.borrow_and_update();
            match self.ring.after(self.cursor, self.kind)? {
                Ok(event) => {
                    self.cursor = event.revision;
                    return Ok(Event::clone(&event));
                }
                Err(newest) => self.cursor = newest,
            }
            self.changed().await;
        }
    }

    /// Waits until anything changed since the last call of [`Watch::next`], whether it fits this watch or not.
    pub async fn changed(&mut self) {
        // The call fails only without a sender, and `self.ring` holds the sender.
        self.latest.changed().await.expect("the ring lives as long as its watches");
    }

    /// Returns the revision up to which events were seen or do not fit this watch.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.cursor
    }
}
