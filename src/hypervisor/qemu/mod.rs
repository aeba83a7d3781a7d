//! The driver of QEMU: machine types, command line, and control by QMP.
//!
//! RAM is a file that the host makes and QEMU maps: shared while it is anonymous, so that a save reads it
//! from outside, and private when it is a saved file. QEMU itself saves only the device state.

mod command;
#[cfg(test)]
mod command_tests;
mod disk;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod machine_type;
mod monitor;
#[cfg(test)]
mod monitor_tests;
mod session;
mod throttle;
mod volumes;

use std::path::{Path, PathBuf};

use futures::future::BoxFuture;
use stead_schemas::instance::Hypervisor;
use stead_schemas::numbers::DeviceSet;
use stead_schemas::quantity::Bytes;

use self::machine_type::QemuMachine;

use super::driver::{Answer, Driver, MachineType, Notify, RamAccess, Session, Start, VmmCommand};
use super::record::VmPaths;
use super::{Accelerator, Programs};
use crate::guest_channel::Transport;
use crate::host::process::find_program;

const NAME: &str = "qemu";
/// The program where the configuration names none.
const PROGRAM: &str = "qemu-system-x86_64";

/// Directories of firmware and modules, beside those below the program's own prefix. Debian's firmware has
/// links from the first into the second.
const DATA: [&str; 4] =
    ["/usr/share/qemu", "/usr/share/seabios", "/usr/lib/x86_64-linux-gnu/qemu", "/usr/lib/qemu"];
/// Directories of the same kinds of a program with another prefix, below that prefix.
const OWN_DATA: [&str; 4] = ["share/qemu", "share/seabios", "lib/x86_64-linux-gnu/qemu", "lib/qemu"];

/// QEMU with both of its machine types.
#[derive(Debug)]
pub struct Qemu {
    program: PathBuf,
    /// Directories that exist on this host.
    data: Vec<PathBuf>,
    accelerator: Accelerator,
}

impl Qemu {
    #[must_use]
    pub fn new(programs: &Programs, accelerator: Accelerator) -> Self {
        let program = programs.get(NAME).cloned().unwrap_or_else(|| PROGRAM.into());
        // The program is found once, so that no launch has to search for it.
        let program = find_program(&program).unwrap_or(program);
        Self { data: data_of(&program), program, accelerator }
    }
}

fn data_of(program: &Path) -> Vec<PathBuf> {
    let prefix = program.parent().and_then(Path::parent).map(Path::to_owned).unwrap_or_default();
    let own = OWN_DATA.iter().map(|below| prefix.join(below));
    let mut all: Vec<PathBuf> =
        DATA.iter().map(PathBuf::from).chain(own).filter(|dir| dir.is_dir()).collect();
    all.sort();
    all.dedup();
    all
}

impl Driver for Qemu {
    fn name(&self) -> &'static str {
        NAME
    }

    fn title(&self) -> &'static str {
        "QEMU"
    }

    fn machine_types(&self) -> &'static [MachineType] {
        &machine_type::ALL
    }

    fn device_set(&self) -> DeviceSet {
        machine_type::DEVICE_SET
    }

    fn has_live_volumes(&self, device_set: DeviceSet) -> bool {
        machine_type::has_controller(device_set)
    }

    fn ram_access(&self) -> RamAccess {
        RamAccess::Host
    }

    fn reopens_console(&self) -> bool {
        true
    }

    fn probe(&self) -> BoxFuture<'_, Vec<Hypervisor>> {
        Box::pin(machine_type::probe(&self.program))
    }

    fn command(&self, start: &Start<'_>) -> VmmCommand {
        command::command(&self.program, &self.data, start, self.accelerator, crate::host::tsc::khz())
    }

    fn ram_offset(
        &self,
        machine_type: MachineType,
        memory: Bytes,
        hotplug: Bytes,
        address: u64,
    ) -> Option<u64> {
        QemuMachine::named(machine_type.name).ram_offset(memory, hotplug, address)
    }

    fn mark(&self, paths: &VmPaths) -> String {
        command::mark(paths)
    }

    fn earlier_marks(&self, paths: &VmPaths) -> Vec<String> {
        vec![command::earlier_mark(paths)]
    }

    fn socket(&self, paths: &VmPaths) -> PathBuf {
        command::monitor(paths)
    }

    fn transport(&self, paths: &VmPaths) -> Transport {
        Transport::VirtioSerial { socket: paths.control() }
    }

    fn connect<'a>(&'a self, paths: &'a VmPaths, notify: &'a Notify) -> Answer<'a, Box<dyn Session>> {
        Box::pin(session::connect(paths, notify))
    }
}
