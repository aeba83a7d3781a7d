//! The shape of every reconciler: observe, plan, act, observe again, status.
//!
//! Guarantees required of implementations: `observe` only reads. `plan` and `status` are total and pure (no
//! `self`). `act` is one host step without a decision. A plan toward `Absent` is an ordinary plan. The pass
//! (`runtime::pass`) does everything else.

use std::fmt::Debug;
use std::future::Future;
use std::time::Duration;

use jiff::Timestamp;
use stead_schemas::condition::Reason;
use stead_schemas::meta::{Kind, Object};
use stead_schemas::names::Uid;

use super::moment::Moment;
use crate::host::{HostError, HostErrorKind};

/// The desired state: the object, or nothing (its deletion was requested, or there is no such record: an
/// orphan).
#[derive(Debug)]
pub enum Desired<'a, K: Kind> {
    Present(&'a Object<K>),
    /// The record of an object that is being deleted; `None` for objects on the host whose record is gone.
    Absent(Option<&'a Object<K>>),
}

impl<'a, K: Kind> Desired<'a, K> {
    /// Returns the record, whether it should exist or be deleted.
    #[must_use]
    pub fn object(&self) -> Option<&'a Object<K>> {
        match self {
            Self::Present(object) => Some(object),
            Self::Absent(object) => *object,
        }
    }
}

/// The results that a plan can have. A user sees them as conditions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan<Step> {
    /// The host is as the spec asks; for `Absent`, nothing of ours is left.
    Converged,
    /// Steps to take in order; the pass stops at the first error and observes again.
    Act(Vec<Step>),
    /// The status has to be written before the next step can be planned. The pass writes it and continues
    /// with the object as it is then.
    Record(Record),
    /// No step is due until something changes, or until a time.
    Wait(Wait),
    /// The spec cannot be carried out; only a change of the spec or the host can help.
    Refuse(Refusal),
}

/// A request to record the status before the next step. The status of this pass must differ from the stored one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub reason: Reason,
    /// Completes the sentence "recording ...".
    pub what: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wait {
    pub reason: Reason,
    pub message: String,
    /// Time of the next observation even without a notification; `None` waits for a change.
    pub until: Option<Timestamp>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub reason: Reason,
    pub message: String,
}

/// The end of a pass, as `status` receives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PassEnd {
    pub now: Moment,
    pub outcome: Outcome,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Converged,
    /// Steps were taken and more remain, or the effects of the last steps are still to be observed.
    Acting,
    Recording(Record),
    Waiting(Wait),
    Refused(Refusal),
    /// A step or an observation failed; `attempt` counts failures in a row, from 1.
    Failed {
        kind: HostErrorKind,
        message: String,
        attempt: u32,
    },
}

/// A host step. Failpoints and logs use the name of its variant.
pub trait Action: Debug + Clone + PartialEq + Send + Sync {
    /// Names of all actions.
    const NAMES: &'static [&'static str];

    fn name(&self) -> &'static str;
}

impl<T> Action for T
where
    T: strum::VariantNames + Debug + Clone + PartialEq + Send + Sync,
    for<'a> &'a T: Into<&'static str>,
{
    const NAMES: &'static [&'static str] = T::VARIANTS;

    fn name(&self) -> &'static str {
        self.into()
    }
}

/// The reconciler of a kind. Its fields hold its capabilities and no other state.
pub trait Reconciler: Send + Sync + 'static {
    type Kind: Kind;
    type Observed: Debug + Send + Sync;
    type Action: Action;

    /// True if a plan that waits ends a row of failures. It is false where the awaited work runs behind a
    /// port and may fail there as before: otherwise the delays of its retries would never grow.
    const WAITS_ARE_PROGRESS: bool = true;

    /// Returns the delay after a failure of this kind, if the kind of object has its own.
    fn retry_after(kind: HostErrorKind) -> Option<Duration> {
        let _ = kind;
        None
    }

    /// Reads the ports and the statuses of referenced objects.
    fn observe(
        &self,
        uid: &Uid,
        object: Option<&Object<Self::Kind>>,
    ) -> impl Future<Output = Result<Self::Observed, HostError>> + Send;

    fn plan(desired: &Desired<'_, Self::Kind>, seen: &Self::Observed, now: Moment) -> Plan<Self::Action>;

    fn act(&self, action: &Self::Action) -> impl Future<Output = Result<(), HostError>> + Send;

    /// Returns the new status of an object that is still recorded; `seen` is `None` if the observation
    /// failed.
    fn status(
        object: &Object<Self::Kind>,
        seen: Option<&Self::Observed>,
        end: &PassEnd,
    ) -> <Self::Kind as Kind>::Status;

    /// Describes for people what a new status reports in addition to the status before.
    fn notes(object: &Object<Self::Kind>, next: &<Self::Kind as Kind>::Status) -> Vec<String> {
        let _ = (object, next);
        Vec::new()
    }

    /// Returns the next time at which the meaning of the spec changes, whatever the host does; the object is
    /// observed again then. The time is after `now`, the start of the pass: an earlier time would be observed
    /// again for ever.
    fn next_poll(object: &Object<Self::Kind>, now: Timestamp) -> Option<Timestamp> {
        let _ = (object, now);
        None
    }

    /// Returns the uids of everything of this kind on the host, recorded or not. Orphans are found by it.
    fn owned(&self) -> impl Future<Output = Result<Vec<Uid>, HostError>> + Send;
}
