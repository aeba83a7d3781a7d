//! Memory that guests do not use: the host takes its pages back.
//!
//! Guarantees: only pages of an anonymous file of the VM alone are taken back. RAM that is mapped from a saved file belongs
//! to others too: a hole in that file would be a hole in their memory. Each report of a guest is followed once, so that
//! blocks that somebody in the guest uses again without being asked are left alone.

use std::fs;
use std::ops::Range;

use stead_controllers::host::{GuestMemory, HostError, HostErrorKind};
use stead_schemas::limits::MEMORY_BLOCK;
use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;

use super::attached::Attached;
use super::driver::RamAccess;
use super::hypervisors::Hypervisors;
use super::record::{Mapping, Record, VmPaths};
use super::save::on_thread;
use crate::host::files;
use crate::memory::free_ram;

/// Returns whether the host can take memory back that the guest does not use.
pub(super) fn is_returned(record: &Record, attached: &Attached) -> bool {
    let is_own = attached.choice.driver.ram_access() == RamAccess::Host && record.mapping == Mapping::Own;
    is_own && record.hotplug > Bytes(0)
}

/// Returns whether the guest gave memory back that the host still keeps, and the host can take it.
pub(super) fn can_be_taken_back(record: &Record, attached: &Attached, paths: &VmPaths) -> bool {
    let is_new = |memory: GuestMemory| !memory.unused.is_empty() && taken_back(paths) != Some(memory.change);
    is_returned(record, attached) && attached.channel.view().memory.is_some_and(is_new)
}

/// Reads the number of the last change that was followed.
fn taken_back(paths: &VmPaths) -> Option<u64> {
    fs::read_to_string(paths.taken_back()).ok()?.trim().parse().ok()
}

impl Hypervisors {
    /// Takes back the memory that the guest reports as unused. A guest that lies loses its own memory.
    pub(super) async fn take_memory_back(&self, owner: &Uid) -> Result<(), HostError> {
        let (attached, paths) = (self.find_attached(owner)?, self.paths(owner));
        let missing = || HostError::new(HostErrorKind::Missing, "take memory back from", owner.as_str());
        let record = Record::read(&paths)?.ok_or_else(missing)?;
        let Some(memory) = attached.channel.view().memory else { return Ok(()) };
        if !can_be_taken_back(&record, &attached, &paths) {
            return Ok(());
        }
        let ranges: Vec<_> =
            memory.unused.iter().filter_map(|block| range_of(&record, &attached, *block)).collect();
        let (pid, name) = (attached.identity.pid, owner.clone());
        on_thread(owner, move || {
            free_ram(pid, &ranges)
                .map_err(|error| HostError::io("take memory back from", name.as_str(), error))?;
            // Not synced: it describes a process that ends with the host.
            files::write_passing(&paths.taken_back(), memory.change.to_string().as_bytes(), 0o600)
        })
        .await
    }
}

/// Returns the place of a block of hotplug memory in the file of the RAM.
fn range_of(record: &Record, attached: &Attached, block: u64) -> Option<Range<u64>> {
    let machine_type = attached.choice.machine_type;
    let address = block.checked_mul(MEMORY_BLOCK.0)?;
    let start = attached.choice.driver.ram_offset(machine_type, record.memory, record.hotplug, address)?;
    let end = start.checked_add(MEMORY_BLOCK.0)?;
    let hotplug = record.memory.0.checked_sub(record.hotplug.0)?..record.memory.0;
    (start >= hotplug.start && end <= hotplug.end).then_some(start..end)
}
