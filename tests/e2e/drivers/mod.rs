//! The conformance suite of the driver boundary: every driver passes it for the verbs that it declares.
//!
//! A new driver is a folder, and one line in [`drivers`] (as it is in `src/hypervisor/dispatch.rs`). The VMs
//! of the suite are never asked what their guests do: a driver runs processors, and saves and loads memory.

mod firecracker;
mod suite;

use std::sync::Arc;

use stead::hypervisor::qemu::Qemu;
use stead::hypervisor::{Accelerator, Drivers, Programs};
use stead_schemas::instance::Hypervisor;

use crate::namespace::in_namespace;

/// Returns all drivers under test together, so that records and plans have to find theirs.
fn drivers() -> Drivers {
    Drivers::new(vec![
        Arc::new(Qemu::new(&Programs::new(), Accelerator::probe())),
        Arc::new(firecracker::Firecracker::new()),
    ])
}

#[test]
fn qemu_conforms() {
    in_namespace(async || suite::run(Hypervisor::Qemu).await);
}

#[test]
fn qemu_microvm_conforms() {
    in_namespace(async || suite::run(Hypervisor::QemuMicrovm).await);
}

#[test]
fn a_second_driver_conforms() {
    in_namespace(async || suite::run(Hypervisor::Firecracker).await);
}

#[test]
fn a_driver_that_declares_no_verb_conforms() {
    in_namespace(async || suite::run(Hypervisor::Vz).await);
}
