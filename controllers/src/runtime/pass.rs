//! A pass over a key: load, observe, plan, act, observe again, write the status.
//!
//! ```text
//! load -> observe -> plan -> Converged / Wait / Refuse ------------------> status
//!   ^        ^ \       \-> Record: status ---\
//!   \--------|--\---------------------------/   up to PASS_RECORDS_MAX times
//!            ^ \       \-> Act: steps in order, stop at the first error -\
//!            |  \-> the spec has changed by now: the next pass plans -----> status
//!            \------------ up to PASS_ROUNDS_MAX rounds -----------------/
//! ```
//! Guarantees: a pass takes one host step at a time. After the last step or an error the host is observed
//! again before the status is made. A status is written only if it differs. The finalizer is removed only
//! when a plan toward `Absent` found nothing. A plan that asks for a record gets a record that differs, or
//! the pass fails.
//! Never: plans for a record that cannot be read, or treats its objects on the host as orphans; acts on a
//! spec that changed before the observation.
//! Cancel/crash: the pass may be dropped at any await; the next pass recognises by observation what was done.

use stead_schemas::condition::Reason;
use stead_schemas::limits::{PASS_RECORDS_MAX, PASS_ROUNDS_MAX, PLAN_STEPS_MAX};
use stead_schemas::meta::{Kind, Object};
use stead_schemas::names::Uid;
use tracing::{Instrument, debug, info, info_span, warn};

use super::journal::{Entry, Journal, Subject};
use super::moment::WatchedClock;
use super::reconciler::{Action, Desired, Outcome, PassEnd, Plan, Reconciler, Record, Refusal};
use crate::host::{HostError, HostErrorKind};
use crate::store::{Store, StoreError};

/// The side of an action.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Edge {
    Before,
    After,
}

/// Is notified at both edges of every action. The daemon has its failpoints here, and the simulation its
/// crashes. `action` is one of [`Action::NAMES`].
pub trait Boundary: Send + Sync + 'static {
    fn reached(&self, kind: &'static str, action: &'static str, edge: Edge) {
        let _ = (kind, action, edge);
    }
}

/// A boundary that does nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoBoundary;

impl Boundary for NoBoundary {}

/// The dependencies of a pass.
pub(super) struct Pass<'a, Controller> {
    pub(super) reconciler: &'a Controller,
    pub(super) store: &'a Store,
    pub(super) clock: &'a WatchedClock,
    pub(super) boundary: &'a dyn Boundary,
    pub(super) journal: &'a dyn Journal,
}

/// The end of the rounds: the outcome and the last observation.
struct Rounds<Observed> {
    outcome: Outcome,
    seen: Option<Observed>,
}

impl<Controller: Reconciler> Pass<'_, Controller> {
    /// Runs the pass. `failures` is the number of failures in a row before it.
    pub(super) async fn run(&self, uid: &Uid, failures: u32) -> Outcome {
        for _ in 0..PASS_RECORDS_MAX {
            let object = self.store.get::<Controller::Kind>(uid);
            let generation = object.as_ref().map(|object| object.meta.generation.0);
            let span = info_span!("pass", kind = Controller::Kind::NAME, %uid, generation);
            let outcome = self.run_on(uid, object.as_deref(), failures).instrument(span).await;
            if !matches!(outcome, Outcome::Recording(_)) {
                return outcome;
            }
        }
        Outcome::Acting
    }

    async fn run_on(&self, uid: &Uid, object: Option<&Object<Controller::Kind>>, failures: u32) -> Outcome {
        let desired = match object {
            Some(object) if !object.meta.is_deleting() => Desired::Present(object),
            Some(object) => Desired::Absent(Some(object)),
            None if self.store.is_unreadable(uid) => return unreadable(),
            None => Desired::Absent(None),
        };
        let attempt = failures.saturating_add(1);
        let owner = object.and_then(|object| object.meta.owner.as_ref());
        let subject = Subject {
            kind: Controller::Kind::NAME,
            uid,
            owner,
            is_desired: matches!(desired, Desired::Present(_)),
        };
        let Rounds { outcome, seen } = self.rounds(subject, &desired, attempt).await;
        if let Outcome::Failed { kind, message, attempt } = &outcome {
            warn!(?kind, message, attempt, "pass failed");
            self.journal.report(subject, Entry::Ended(&outcome));
        }
        let Some(object) = object else { return outcome };
        let stored = if !subject.is_desired && outcome == Outcome::Converged {
            self.journal.report(subject, Entry::Ended(&outcome));
            self.store.remove_finalizer::<Controller::Kind>(uid).await
        } else {
            let end = PassEnd { now: self.clock.read(), outcome: outcome.clone() };
            let status = Controller::status(object, seen.as_ref(), &end);
            if status == object.status {
                return match outcome {
                    Outcome::Recording(record) => nothing_recorded(&record, attempt),
                    outcome => outcome,
                };
            }
            for note in Controller::notes(object, &status) {
                self.journal.report(subject, Entry::Note(&note));
            }
            if !matches!(outcome, Outcome::Failed { .. }) {
                self.journal.report(subject, Entry::Ended(&outcome));
            }
            self.store.write_status::<Controller::Kind>(uid, status).await
        };
        match stored {
            Ok(_) => outcome,
            Err(error) => {
                warn!(%error, "the result of a pass was not stored");
                Outcome::Failed { kind: kind_of(&error), message: error.to_string(), attempt }
            }
        }
    }

    async fn rounds(
        &self,
        subject: Subject<'_>,
        desired: &Desired<'_, Controller::Kind>,
        attempt: u32,
    ) -> Rounds<Controller::Observed> {
        let uid = subject.uid;
        let failed =
            |error: &HostError| Outcome::Failed { kind: error.kind, message: error.chain(), attempt };
        for round in 0.. {
            let seen = match self.reconciler.observe(uid, desired.object()).await {
                Ok(seen) => seen,
                Err(error) => return Rounds { outcome: failed(&error), seen: None },
            };
            // The check comes after the observation, so that a change during it counts.
            if self.is_superseded(uid, desired.object()) {
                return Rounds { outcome: Outcome::Acting, seen: Some(seen) };
            }
            let outcome = match Controller::plan(desired, &seen, self.clock.read()) {
                Plan::Converged => Outcome::Converged,
                Plan::Record(record) => Outcome::Recording(record),
                Plan::Wait(wait) => Outcome::Waiting(wait),
                Plan::Refuse(refusal) => Outcome::Refused(refusal),
                Plan::Act(_) if round == PASS_ROUNDS_MAX => Outcome::Acting,
                Plan::Act(steps) => {
                    if let Err(error) = self.act_all(subject, &steps).await {
                        let seen = self.reconciler.observe(uid, desired.object()).await.ok();
                        return Rounds { outcome: failed(&error), seen };
                    }
                    continue;
                }
            };
            return Rounds { outcome, seen: Some(seen) };
        }
        unreachable!("the round after the last one does not act")
    }

    /// True if the spec that this pass began with is not the stored spec any more.
    fn is_superseded(&self, uid: &Uid, object: Option<&Object<Controller::Kind>>) -> bool {
        let version = |object: &Object<Controller::Kind>| (object.meta.generation, object.meta.is_deleting());
        let current = self.store.get::<Controller::Kind>(uid);
        current.as_deref().map(version) != object.map(version)
    }

    async fn act_all(&self, subject: Subject<'_>, steps: &[Controller::Action]) -> Result<(), HostError> {
        assert!(!steps.is_empty(), "a plan without steps is Converged");
        assert!(steps.len() <= PLAN_STEPS_MAX, "a plan of {} steps does not converge", steps.len());
        for step in steps {
            let (kind, action) = (Controller::Kind::NAME, step.name());
            info!(action, "acting");
            self.boundary.reached(kind, action, Edge::Before);
            self.journal.report(subject, Entry::Acting(action));
            debug!(?step, "acting");
            self.reconciler.act(step).await?;
            self.boundary.reached(kind, action, Edge::After);
        }
        Ok(())
    }
}

/// Returns the failure of a plan whose record changes nothing. Such a plan would ask for the record for ever,
/// so it is a fault of the reconciler.
fn nothing_recorded(record: &Record, attempt: u32) -> Outcome {
    let message = format!("a fault of this program: {} changed nothing", record.what);
    warn!(message, "pass failed");
    debug_assert!(false, "{message}");
    Outcome::Failed { kind: HostErrorKind::Permanent, message, attempt }
}

fn unreadable() -> Outcome {
    Outcome::Refused(Refusal {
        reason: Reason::RecordUnreadable,
        message: "the stored record cannot be read".to_owned(),
    })
}

/// Returns the kind of a store error, which decides the next attempt.
fn kind_of(error: &StoreError) -> HostErrorKind {
    match error {
        StoreError::Full => HostErrorKind::Exhausted,
        StoreError::Overloaded | StoreError::Closed | StoreError::Database(_) => HostErrorKind::Transient,
        StoreError::Encode { .. }
        | StoreError::Panicked
        | StoreError::OwnerGone { .. }
        | StoreError::ForeignKey { .. }
        | StoreError::Unopenable { .. } => HostErrorKind::Permanent,
    }
}
