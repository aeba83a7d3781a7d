//! The shape of every reconciler: observe, plan, act, observe again, status.
//!
//! Guarantees asked of implementations: `observe` only reads; `plan` and `status` are total and
//! pure (no `self`); `act` is one host step without a decision; a plan toward nothing is an
//! ordinary plan. The pass (`runtime::pass`) does everything else.

use std::fmt::Debug;
use std::future::Future;
use std::time::Duration;

use jiff::Timestamp;
use stead_schemas::condition::Reason;
use stead_schemas::meta::{Kind, Object};
use stead_schemas::names::Uid;

use super::moment::Moment;
use crate::host::{HostError, HostErrorKind};

/// What shall be: the object, or nothing (deletion requested, or no such record: an orphan).
#[derive(Debug)]
pub enum Desired<'a, K: Kind> {
    Present(&'a Object<K>),
    /// The record of an object being deleted; `None` for host things whose record is gone.
    Absent(Option<&'a Object<K>>),
}

impl<'a, K: Kind> Desired<'a, K> {
    /// The record, whichever way it is going.
    #[must_use]
    pub fn object(&self) -> Option<&'a Object<K>> {
        match self {
            Self::Present(object) => Some(object),
            Self::Absent(object) => *object,
        }
    }
}

/// What a plan can say; the four conditions a user sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan<A> {
    /// The host is as wished; for `Absent`, nothing of ours is left.
    Converged,
    /// Steps in order; the pass stops at the first error and observes again.
    Act(Vec<A>),
    /// The status has to be written before the next step can be planned. The pass writes it and goes on with
    /// the object as it is then.
    Record(Record),
    /// Nothing to do until something changes, or until a time.
    Wait(Wait),
    /// The wish cannot be carried out; only a change of wish or host can help.
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
    /// Look again then even if nothing was heard; `None` waits for a change.
    pub until: Option<Timestamp>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub reason: Reason,
    pub message: String,
}

/// How a pass ended, for `status`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PassEnd {
    pub now: Moment,
    pub outcome: Outcome,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Converged,
    /// Steps were taken and more remain, or the last ones are still to be seen.
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

/// One kind's reconciler: capabilities in its fields, no other state.
pub trait Reconciler: Send + Sync + 'static {
    type Kind: Kind;
    type Observed: Debug + Send + Sync;
    type Action: Debug + Clone + PartialEq + Send + Sync;

    /// Names of all actions, for failpoints and logs; [`Reconciler::action_name`] returns these.
    const ACTIONS: &'static [&'static str];

    /// Whether a plan that waits ends a row of failures. Not where what is waited for goes on behind a port
    /// and may fail there as it did before: its retries would never become rarer.
    const WAITS_ARE_PROGRESS: bool = true;

    /// The delay after a failure of this kind, where the kind of object has its own.
    fn retry_after(kind: HostErrorKind) -> Option<Duration> {
        let _ = kind;
        None
    }

    /// Reads the ports and the statuses of objects referred to.
    fn observe(
        &self,
        uid: &Uid,
        object: Option<&Object<Self::Kind>>,
    ) -> impl Future<Output = Result<Self::Observed, HostError>> + Send;

    fn plan(desired: &Desired<'_, Self::Kind>, seen: &Self::Observed, now: Moment) -> Plan<Self::Action>;

    fn action_name(action: &Self::Action) -> &'static str;

    fn act(&self, action: &Self::Action) -> impl Future<Output = Result<(), HostError>> + Send;

    /// The new status of an object that is still recorded; `seen` is `None` when observation failed.
    fn status(
        object: &Object<Self::Kind>,
        seen: Option<&Self::Observed>,
        end: &PassEnd,
    ) -> <Self::Kind as Kind>::Status;

    /// What a status that is about to be written says beyond the one before, for people.
    fn remarks(object: &Object<Self::Kind>, next: &<Self::Kind as Kind>::Status) -> Vec<String> {
        let _ = (object, next);
        Vec::new()
    }

    /// The next time after `now`, when the pass began, at which the wish means something else, whatever
    /// the host does: looked at again then. Never an earlier one: it would be looked at again for ever.
    fn next_look(object: &Object<Self::Kind>, now: Timestamp) -> Option<Timestamp> {
        let _ = (object, now);
        None
    }

    /// Uids of everything of this kind on the host, recorded or not: the source of orphans.
    fn owned(&self) -> impl Future<Output = Result<Vec<Uid>, HostError>> + Send;
}
