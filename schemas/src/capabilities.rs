//! Capabilities of the VMs of a hypervisor. Admission refuses requests by them, and `/capabilities` shows
//! them.

use serde::{Deserialize, Serialize};

/// Capabilities that a driver declares for one machine type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmCapabilities {
    /// True if a running VM can be saved, and restored later.
    pub standby: bool,
    /// True if a saved memory can be the start of other VMs.
    pub fork_memory: bool,
    /// True if the network card of a running VM can be connected to another TAP.
    pub replace_tap: bool,
    /// True if the memory of a running VM can become larger or smaller.
    pub resize_memory: bool,
    /// True if bytes and operations per second of disks can be limited.
    pub io_limits: bool,
    /// True if disks of volumes can be put into a running VM, and taken out of it.
    #[serde(default)]
    pub live_volumes: bool,
    /// True if devices of the host can be given to a VM.
    pub devices: bool,
    /// Number of block devices that a VM has room for, for volumes.
    pub volume_devices_max: usize,
    pub vcpus_max: u32,
    /// Largest number of pairs of queues of a network card.
    #[serde(default = "one_queue")]
    pub card_queues_max: u16,
}

/// Number of pairs of queues in the capabilities that earlier daemons stored.
fn one_queue() -> u16 {
    VmmCapabilities::NONE.card_queues_max
}

impl VmmCapabilities {
    /// The capabilities of a driver that declares none.
    pub const NONE: Self = Self {
        standby: false,
        fork_memory: false,
        replace_tap: false,
        resize_memory: false,
        io_limits: false,
        live_volumes: false,
        devices: false,
        volume_devices_max: 0,
        vcpus_max: 1,
        card_queues_max: 1,
    };
}
