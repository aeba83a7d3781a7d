//! The machine types of QEMU that VMs can have, and what differs between them.
//!
//! ```text
//! qemu           q35       a PC with PCI Express
//! qemu-microvm   microvm   no PCI: virtio devices at addresses that ACPI lists
//! ```

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use stead_schemas::capabilities::VmmCapabilities;
use stead_schemas::instance::Hypervisor;
use stead_schemas::limits::{CARD_QUEUES_MAX, VCPUS_MAX, VOLUME_DEVICES_MAX};
use stead_schemas::numbers::DeviceSet;
use stead_schemas::quantity::Bytes;
use tokio::process::Command;

use crate::host::tsc;
use crate::hypervisor::driver::MachineType;

/// Time limit for QEMU to list its machine types, which takes 30 ms.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);

/// The set of devices of VMs that boot. In the first set a PC has controllers of disks, a bus of sensors and a
/// keyboard, which no guest needs and every firmware and kernel probes. In the first two, volumes are devices that stay as
/// long as the VM.
pub(super) const DEVICE_SET: DeviceSet = DeviceSet(2);

/// Returns whether volumes are at a controller, so that they can come and go.
pub(super) fn has_controller(device_set: DeviceSet) -> bool {
    device_set >= DeviceSet(2)
}

/// Memory that a large PC has below 4 GiB, in bytes, and the address of the rest.
const LOW_MEMORY: u64 = 2 << 30;
const HIGH_MEMORY: u64 = 4 << 30;

/// The capabilities of VMs of both machine types.
const CAPABILITIES: VmmCapabilities = VmmCapabilities {
    standby: true,
    fork_memory: true,
    replace_tap: true,
    resize_memory: false,
    io_limits: true,
    live_volumes: true,
    devices: false,
    volume_devices_max: VOLUME_DEVICES_MAX,
    vcpus_max: VCPUS_MAX,
    card_queues_max: CARD_QUEUES_MAX,
};

/// The two machine types, as the driver boundary defines them. Records that name none are of the first.
pub(super) const ALL: [MachineType; 2] =
    [QemuMachine::Q35.machine_type(), QemuMachine::Microvm.machine_type()];

/// A machine type of QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum QemuMachine {
    Q35,
    Microvm,
}

impl QemuMachine {
    pub(super) const ALL: [Self; 2] = [Self::Q35, Self::Microvm];

    /// Finds the machine type by its name.
    pub(super) fn named(name: &str) -> Self {
        Self::ALL.into_iter().find(|machine| machine.as_str() == name).unwrap_or(Self::Q35)
    }

    const fn machine_type(self) -> MachineType {
        // Without PCI all queues of a device share one interrupt, so several would not be served side by side.
        let (hypervisor, card_queues_max) = match self {
            Self::Q35 => (Hypervisor::Qemu, CARD_QUEUES_MAX),
            Self::Microvm => (Hypervisor::QemuMicrovm, 1),
        };
        // The layout of the other machine type's memory cannot be chosen.
        let resize_memory = matches!(self, Self::Q35);
        let capabilities = VmmCapabilities { resize_memory, card_queues_max, ..CAPABILITIES };
        MachineType { name: self.as_str(), hypervisor, capabilities }
    }

    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Q35 => "q35",
            Self::Microvm => "microvm",
        }
    }

    /// Returns the options of QEMU's `-machine` for a set of devices.
    pub(super) fn options(self, device_set: DeviceSet) -> &'static str {
        match self {
            Self::Q35 if device_set == DeviceSet(0) => "smm=off,vmport=off,usb=off",
            Self::Q35 => "smm=off,vmport=off,usb=off,sata=off,smbus=off,i8042=off",
            // ACPI lists the devices for the guest (its kernel reads none from its command line) and powers
            // it off. Without a real-time clock the guest waits two seconds for one. A second interrupt
            // controller makes room for 24 virtio devices instead of eight, and costs nothing.
            Self::Microvm => "acpi=on,rtc=on,pit=on,pic=on,isa-serial=on,ioapic2=on",
        }
    }

    /// Returns the options that lay out the memory of a guest, of which a part is hotplug memory. The kernel keeps movable
    /// pages in the last of its zones only: all hotplug memory has to be above 4 GiB, where that zone is.
    pub(super) fn memory_options(self, memory: Bytes, hotplug: Bytes) -> String {
        match self {
            Self::Q35 if hotplug > Bytes(0) => {
                format!(",max-ram-below-4g={}", low_memory(memory, hotplug))
            }
            Self::Q35 | Self::Microvm => String::new(),
        }
    }

    /// Returns the offset in the file of the RAM of a physical address of a guest with hotplug memory.
    pub(super) fn ram_offset(self, memory: Bytes, hotplug: Bytes, address: u64) -> Option<u64> {
        let low = low_memory(memory, hotplug);
        match self {
            Self::Q35 if address < low => Some(address),
            Self::Q35 => Some(low + address.checked_sub(HIGH_MEMORY)?),
            Self::Microvm => None,
        }
    }

    /// Returns additions to the guest kernel's command line.
    pub(super) fn kernel_options(self) -> Option<&'static str> {
        match self {
            // ACPI lists all buses. Without this, the kernel asks for a device in each of 32 slots of 255 others,
            // which leaves the guest 16,000 times: three quarters of the I/O of a boot.
            Self::Q35 => Some("pci=lastbus=0"),
            Self::Microvm => None,
        }
    }

    /// Returns whether there is a clock besides the processor's, by which the guest can measure the
    /// processor's clock. The timer of the other machine type serves an emulated guest too late on a host
    /// under load.
    pub(super) fn has_reference_clock(self) -> bool {
        match self {
            Self::Q35 => true,
            Self::Microvm => false,
        }
    }

    /// Returns the name of the virtio device of a kind.
    pub(super) fn device(self, kind: &str) -> String {
        match self {
            Self::Q35 => format!("virtio-{kind}-pci"),
            Self::Microvm => format!("virtio-{kind}-device"),
        }
    }
}

/// Asks the program for its machine types; none when it does not answer in time.
pub(super) async fn probe(binary: &Path) -> Vec<Hypervisor> {
    let mut command = Command::new(binary);
    command.args(["-machine", "help"]).stdin(Stdio::null()).kill_on_drop(true);
    // Launches need the rate and should not wait for it, so it is measured while the program answers.
    let measured = tokio::task::spawn_blocking(tsc::khz);
    let (answer, _) = tokio::join!(tokio::time::timeout(ANSWER_DEADLINE, command.output()), measured);
    match answer {
        Ok(Ok(output)) => hypervisors_in(&String::from_utf8_lossy(&output.stdout)),
        Ok(Err(_)) | Err(_) => Vec::new(),
    }
}

/// Parses the list: one machine type a line, its name first.
fn hypervisors_in(help: &str) -> Vec<Hypervisor> {
    let has = |machine: &QemuMachine| {
        help.lines().any(|line| line.split_whitespace().next() == Some(machine.as_str()))
    };
    QemuMachine::ALL.into_iter().filter(has).map(|machine| machine.machine_type().hypervisor).collect()
}

/// Returns how much memory of a guest with hotplug memory is below 4 GiB, in bytes.
fn low_memory(memory: Bytes, hotplug: Bytes) -> u64 {
    memory.0.saturating_sub(hotplug.0).min(LOW_MEMORY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_machine_type_is_found_by_its_name() {
        for machine in QemuMachine::ALL {
            assert_eq!(QemuMachine::named(machine.machine_type().name), machine);
        }
    }

    #[tokio::test]
    async fn machine_types_that_a_program_lacks_are_not_listed() {
        let q35 = "q35                  Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-7.2)";
        let both =
            format!("Supported machines are:\nmicrovm              microvm (i386)\n{q35}\nnone  empty\n");
        assert_eq!(hypervisors_in(&both), [Hypervisor::Qemu, Hypervisor::QemuMicrovm]);
        assert_eq!(hypervisors_in(q35), [Hypervisor::Qemu]);
        assert_eq!(probe(Path::new("/no/such/program")).await, []);
    }
}
