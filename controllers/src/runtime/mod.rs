//! The machinery under every reconciler; it knows no kind.

mod reconciler;

pub use reconciler::{Desired, Outcome, PassEnd, Plan, Reconciler, Refusal, Wait};
