//! The machinery under every reconciler. It depends on no kind.
//!
//! ```text
//! watch ring, drift, resync -> trigger -> queue (dedup, due times) -> runner -> pass -> store
//! ```

mod clock;
pub mod conditions;
mod dependents;
mod journal;
mod moment;
mod pass;
mod queue;
mod reconciler;
mod retry;
mod runner;
mod trigger;

#[cfg(test)]
mod tests;

pub use clock::{Clock, Ids};
#[cfg(any(test, feature = "sim"))]
pub use clock::{SequentialIds, TokioClock};
pub use journal::{Entry, Journal, NoJournal, Subject};
#[cfg(test)]
pub(crate) use moment::WatchedClock;
pub use moment::{Moment, after};
pub use pass::{Boundary, Edge, NoBoundary};
pub use reconciler::{Action, Desired, Outcome, PassEnd, Plan, Reconciler, Record, Refusal, Wait};
pub use runner::{Runner, RunnerConfig};
pub use trigger::Drift;
