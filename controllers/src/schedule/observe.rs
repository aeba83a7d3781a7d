//! Observations of a schedule: its instance, and the snapshots that it took.

use jiff::Timestamp;
use stead_schemas::instance::{Instance, State};
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;
use stead_schemas::references::{Ref, Role};
use stead_schemas::schedule::SnapshotSchedule;
use stead_schemas::snapshot::{Snapshot, SnapshotKind, SnapshotPhase};

use super::admission::kind_now;
use crate::store::Store;

/// An observation of a schedule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    pub source: Source,
    /// The existing snapshots of this schedule, oldest first.
    pub taken: Vec<Taken>,
}

/// The state of the instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A snapshot of this kind can be taken now.
    Ready(SnapshotKind),
    /// No snapshot can be taken now, but the state will change.
    Busy(State),
    Gone,
}

/// A snapshot of this schedule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    pub uid: Uid,
    pub due: Timestamp,
    pub asked_at: Timestamp,
    pub phase: SnapshotPhase,
    /// The moment that the snapshot shows; before it is taken, the time of its request.
    pub moment: Timestamp,
    pub error: Option<String>,
}

pub(super) fn observe(store: &Store, uid: &Uid, object: Option<&Object<SnapshotSchedule>>) -> Observed {
    let instance = object.and_then(|object| store.get::<Instance>(&object.spec.instance));
    let source = match instance.filter(|instance| !instance.meta.is_deleting()) {
        None => Source::Gone,
        Some(instance) => match kind_now(&instance) {
            Some(kind) => Source::Ready(kind),
            None => Source::Busy(instance.status.state),
        },
    };
    let snapshots = store.referring::<Snapshot>(&Ref::to::<SnapshotSchedule>(Role::Schedule, uid));
    let mut taken: Vec<Taken> = snapshots
        .iter()
        .filter(|snapshot| !snapshot.meta.is_deleting())
        .filter_map(|snapshot| {
            let run = snapshot.spec.schedule.as_ref().filter(|run| run.schedule == *uid)?;
            Some(Taken {
                uid: snapshot.meta.uid.clone(),
                due: run.due,
                asked_at: snapshot.meta.created_at,
                phase: snapshot.status.phase,
                moment: snapshot.status.captured_at.unwrap_or(snapshot.meta.created_at),
                error: snapshot.status.error.clone(),
            })
        })
        .collect();
    taken.sort_by(|a, b| (a.moment, &a.uid).cmp(&(b.moment, &b.uid)));
    Observed { source, taken }
}
