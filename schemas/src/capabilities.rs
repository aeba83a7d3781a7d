//! Capabilities of the VMs of a hypervisor. Admission refuses requests by them, and `/capabilities` shows
//! them.

use serde::{Deserialize, Serialize};

/// Capabilities that a driver declares for one machine type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmCapabilities {
    /// A running VM can be saved, and restored later.
    pub standby: bool,
    /// A saved memory can be the beginning of other VMs.
    pub fork_memory: bool,
    /// The network card of a running VM can be connected to another TAP.
    pub replace_tap: bool,
    /// The memory of a running VM can become larger or smaller.
    pub resize_memory: bool,
    /// Bytes and operations per second of disks can be limited.
    pub io_limits: bool,
    /// Devices of the host can be given to a VM.
    pub devices: bool,
    /// Number of block devices that a VM has room for, for volumes.
    pub volume_devices_max: usize,
    pub vcpus_max: u32,
}
