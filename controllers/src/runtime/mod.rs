//! The machinery under every reconciler; it knows no kind.

mod clock;
mod reconciler;

pub use clock::{Clock, Ids};
#[cfg(any(test, feature = "sim"))]
pub use clock::{SequentialIds, TokioClock};
pub use reconciler::{Desired, Outcome, PassEnd, Plan, Reconciler, Refusal, Wait};
