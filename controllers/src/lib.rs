//! The decisions of Stead: store rules, the reconcile runtime, and one reconciler per kind.
//!
//! Guarantees: plans and statuses are pure and total; effects happen only through the ports in
//! [`host`]; time and order come from outside, so that one seed is one run.
//! Never: does I/O, reads a clock, or names a product.

#[cfg(test)]
mod asking;
pub mod checks;
mod content_checks;
pub mod daemon;
pub mod disk;
mod doors_checked;
pub mod host;
mod hypervisor_checks;
pub mod image;
pub mod ingress;
mod ingress_checks;
pub mod network;
mod policy_checks;
pub mod port;
pub mod runtime;
pub mod schedule;
#[cfg(feature = "sim")]
pub mod sim;
pub mod snapshot;
mod storage_checks;
pub mod store;
#[cfg(test)]
mod verbs;
pub mod vm;
pub mod volume;
