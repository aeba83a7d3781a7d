//! The decisions of Stead: store rules, the reconcile runtime, and one reconciler per kind.
//!
//! Guarantees: plans and statuses are pure and total. Effects happen only through the ports in [`host`]. Time
//! and order come from outside, so that a seed determines a run.
//! Never: does I/O, reads a clock, or names a product.

pub mod checks;
pub mod daemon;
pub mod disk;
pub mod host;
pub mod image;
pub mod ingress;
pub mod mediation;
pub mod mediator;
pub mod network;
pub mod nic;
pub mod node;
pub mod pressure;
pub mod refused;
pub mod runtime;
pub mod schedule;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
pub mod snapshot;
pub mod store;
#[cfg(test)]
mod tests;
pub mod vm;
pub mod volume;

pub use daemon::kinds;
