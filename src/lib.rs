//! The effects of Stead, and the program: HTTP, store, host, hypervisors, command line.
//!
//! Guarantees: nothing here decides what the host should look like; that is the task of `controllers`.

pub mod access;
mod allocator;
pub mod api;
pub mod assemble;
pub mod cli;
pub mod config;
pub mod doctor;
mod failpoint;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod guest_channel;
pub mod host;
pub mod hypervisor;
pub mod ingress;
mod lines;
mod locks;
mod log_sources;
pub mod mediation;
mod memory;
mod peers;
pub mod resources;
mod server_certificate;
mod signals;
mod snapshots;
pub mod store;
mod unfinished;
