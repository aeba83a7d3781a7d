//! The boundary between what all VMMs share and what one of them does in its own way.
//!
//! A driver is one VMM program. It defines how the program is started, and connects to a running one. The rest
//! (processes, records, memories, the guest channel) is shared. A verb that a driver does not declare in its
//! capabilities is never called; the default of such a verb is an error.
//! A new driver is a folder beside this file, and one line in `dispatch`. It has to pass the suite in
//! `tests/e2e/drivers`.
//! Guarantees: a driver keeps no state of a VM. Everything it needs is in the record, in the paths and in
//! the running process, so a daemon that starts later drives VMs that an earlier one launched.

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::future::BoxFuture;
use stead_controllers::host::LaunchPlan;
use stead_schemas::capabilities::VmmCapabilities;
use stead_schemas::instance::Hypervisor;
use stead_schemas::names::LinkName;
use stead_schemas::numbers::DeviceSet;
use stead_schemas::quantity::{Bytes, Rate};

use super::record::{Mapping, VmPaths};
use crate::guest_channel::Transport;
use crate::host::kernel::Kernel;
use crate::host::tap::Frames;

/// Called for an event of a VMM. It says only that the VM should be observed.
pub type Notify = Arc<dyn Fn() + Send + Sync>;

/// The result of a verb; an error is a sentence for people.
pub type Answer<'a, T> = BoxFuture<'a, Result<T, String>>;

/// A kind of virtual machine that a driver makes. A memory that was saved on one kind fits no other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MachineType {
    /// The word in records and manifests, which no other driver uses.
    pub name: &'static str,
    pub hypervisor: Hypervisor,
    pub capabilities: VmmCapabilities,
}

/// The party that stores the RAM of a VM when it is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RamAccess {
    /// The VMM maps a file that the host gives it, so the host reads the RAM of a paused VM itself.
    Host,
    /// The RAM belongs to the VMM, which writes it to a file when it saves.
    Vmm,
}

/// The beginning of a VM: a boot, or a saved memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    Fresh,
    /// RAM and device state follow by [`Session::load`]; no processor runs before that.
    Saved,
}

/// The input of a VM's start.
#[derive(Debug, Clone, Copy)]
pub struct Start<'a> {
    pub plan: &'a LaunchPlan,
    pub machine_type: MachineType,
    pub device_set: DeviceSet,
    pub paths: &'a VmPaths,
    pub kernel: &'a Kernel,
    pub initrd: &'a Path,
    pub rootfs: &'a Path,
    pub overlay: &'a Path,
    /// Disks of volumes.
    pub volumes: &'a [VolumeFile],
    /// A disk with modules and headers of the kernel.
    pub kernel_files: Option<&'a Path>,
    /// Number of pairs of queues of the network card.
    pub queues: u16,
    /// The kernel moves the frames of the card, if the VMM can leave that to it.
    pub has_vhost_net: bool,
    pub content: Content,
    pub ram: Option<Ram>,
    /// True if the VMM runs behind walls.
    pub has_walls: bool,
}

/// The file of a volume's disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeFile {
    pub path: PathBuf,
    pub is_read_only: bool,
    /// Number by which the guest knows the disk.
    pub number: u32,
}

/// A file with the RAM of a VM, open in the VMM under this descriptor from its start.
#[derive(Debug, Clone, Copy)]
pub struct Ram {
    pub descriptor: RawFd,
    pub mapping: Mapping,
}

/// The command that starts the program of a driver.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VmmCommand {
    pub program: PathBuf,
    pub arguments: Vec<String>,
    /// The console of the guest is the standard output of the program. Otherwise that goes to the VMM's log.
    pub has_console_on_stdout: bool,
    /// The needs of a VMM that runs behind walls, or `None` for one that still reaches the whole host.
    pub needs: Option<Needs>,
}

/// The parts of the host that a VMM gets, besides its log and its memory. Its program and the libraries of the
/// program need not be named.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Needs {
    /// Files and directories that the program reads by their paths. They must be readable for everybody, and
    /// should be the same for all VMs.
    pub files: Vec<PathBuf>,
    /// Descriptors that are open in the VMM from its start: the first under [`FIRST_DESCRIPTOR`], the others
    /// under the numbers that follow.
    pub descriptors: Vec<Handed>,
    /// Paths that the program opens for writing while it starts. It gets a descriptor instead of the file, and
    /// there need not be a file of that path.
    pub opens: Vec<(PathBuf, Handed)>,
    /// Largest number of threads of the process.
    pub threads_max: u64,
}

/// The number of the first descriptor of [`Needs`] in a VMM.
pub const FIRST_DESCRIPTOR: RawFd = 3;

/// A file of the host that a VMM gets as a descriptor, opened by the daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Handed {
    Disk {
        path: PathBuf,
        is_read_only: bool,
    },
    /// A file that is written at its end, and is made when it is missing.
    Log(PathBuf),
    /// The RAM of the VM: for reading and writing if it is [`Mapping::Own`], else for reading only.
    Ram,
    /// The TAP of this name, which nobody else reads.
    Tap(LinkName),
    /// A further queue of the TAP of this name.
    TapQueue(LinkName),
    /// A Unix socket of this path that listens already.
    Listener(PathBuf),
    /// A device of the host.
    Device(PathBuf),
}

/// The state of a VM's processors, as its VMM reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// The processors were never started.
    Created,
    Running,
    Paused,
    /// The VMM paused them, because the host's disk had no room for a write of the guest.
    NoSpace,
    /// The guest powered off or panicked, and the process waits to be ended.
    Shutdown,
}

/// Files of a save.
#[derive(Debug, Clone)]
pub struct SaveFiles {
    /// The VMM writes the device state here.
    pub state: PathBuf,
    /// The file for the RAM, which the VMM writes with [`RamAccess::Vmm`] only.
    pub ram: Option<PathBuf>,
}

/// A saved memory that is loaded into a VMM that was started with [`Content::Saved`].
#[derive(Debug, Clone, Copy)]
pub struct Saved<'a> {
    /// The device state, checked.
    pub state: &'a [u8],
    /// The file that it was read from.
    pub state_file: &'a Path,
    pub start: &'a Start<'a>,
}

/// The program of a VMM, and how the host uses it.
pub trait Driver: Send + Sync + 'static {
    /// Returns the name that is written to manifests of saved memories.
    fn name(&self) -> &'static str;

    /// Returns the name of the program in messages for people.
    fn title(&self) -> &'static str;

    /// Returns the machine types of this driver. The first is that of records that name none.
    fn machine_types(&self) -> &'static [MachineType];

    /// Returns the set of devices of a VM that boots. A driver that changes what guests see raises the number, and
    /// still makes the sets of lower numbers, because memories are saved with them.
    fn device_set(&self) -> DeviceSet {
        DeviceSet::default()
    }

    /// Returns whether volumes can come and go while a VM with this set of devices runs.
    fn has_live_volumes(&self, device_set: DeviceSet) -> bool {
        let _ = device_set;
        false
    }

    /// Returns who stores the RAM of a save.
    fn ram_access(&self) -> RamAccess;

    /// Returns whether the VMM can continue its console in a new file. Otherwise the console's log is emptied
    /// in place, which loses lines that are written meanwhile.
    fn reopens_console(&self) -> bool;

    /// Asks the installed program which of the machine types it has. The list is empty when the program
    /// does not answer in time.
    fn probe(&self) -> BoxFuture<'_, Vec<Hypervisor>>;

    /// Builds the command line: a pure function of what the VM is started from.
    fn command(&self, start: &Start<'_>) -> VmmCommand;

    /// Returns the offset in the file of the RAM of a physical address of a guest with so much memory, of which a part is
    /// hotplug memory; `None` where there is no RAM. Only a VMM with [`RamAccess::Host`] and hotplug memory is asked.
    fn ram_offset(
        &self,
        machine_type: MachineType,
        memory: Bytes,
        hotplug: Bytes,
        address: u64,
    ) -> Option<u64> {
        let _ = (machine_type, memory, hotplug, address);
        None
    }

    /// Returns an argument of that command line that no other process has. A process whose record a crash
    /// prevented is found by it.
    fn mark(&self, paths: &VmPaths) -> String;

    /// Returns arguments that marked the processes of earlier versions of this driver.
    fn earlier_marks(&self, paths: &VmPaths) -> Vec<String> {
        let _ = paths;
        Vec::new()
    }

    /// Returns the socket on which the VMM is controlled.
    fn socket(&self, paths: &VmPaths) -> PathBuf;

    /// Returns the way to the guest.
    fn transport(&self, paths: &VmPaths) -> Transport;

    /// Connects to a VMM that runs. `notify` is called for events of the VMM.
    fn connect<'a>(&'a self, paths: &'a VmPaths, notify: &'a Notify) -> Answer<'a, Box<dyn Session>>;
}

/// A connection to one running VMM.
pub trait Session: Send + Sync {
    /// Returns whether the connection cannot be used any more. Another one may work.
    fn is_spent(&self) -> bool;

    /// Returns the version of the program. Only the same version loads a device state.
    fn version(&self) -> Answer<'_, String>;

    fn state(&self) -> Answer<'_, RunState>;

    /// Configures and starts a fresh VM. A driver whose command line does that already has nothing to do.
    fn set_up<'a>(&'a self, start: &'a Start<'a>) -> Answer<'a, ()> {
        let _ = start;
        Box::pin(async { Ok(()) })
    }

    fn pause(&self) -> Answer<'_, ()>;

    fn resume(&self) -> Answer<'_, ()>;

    /// Saves a paused VM, which stays paused.
    fn save<'a>(&'a self, to: &'a SaveFiles) -> Answer<'a, ()> {
        let _ = to;
        unsupported("save a memory")
    }

    /// Loads a saved memory and leaves the VM paused.
    fn load<'a>(&'a self, from: &'a Saved<'a>) -> Answer<'a, ()> {
        let _ = from;
        unsupported("load a memory")
    }

    /// Returns the form of the frames between the TAP and the VMM, which follows from what the guest negotiated. A
    /// TAP that replaces a removed one gets the same.
    fn frames(&self) -> Answer<'_, Frames> {
        unsupported("report the form of its frames")
    }

    /// Goes on with descriptors of TAPs that were attached again. A VMM that reads them itself has nothing to do.
    fn resume_card(&self) -> Answer<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    /// Returns the limit of the disks, or `None` without one.
    fn disk_rate(&self) -> Answer<'_, Option<Rate>> {
        unsupported("report the limit of its disks")
    }

    /// Limits the disks while the guest runs, or ends their limit.
    fn limit_disks(&self, rate: Option<Rate>) -> Answer<'_, ()> {
        let _ = rate;
        unsupported("limit its disks")
    }

    /// Puts the disk of a volume into the VM, which has no disk of that number.
    fn add_volume<'a>(&'a self, volume: &'a VolumeFile) -> Answer<'a, ()> {
        let _ = volume;
        unsupported("add a volume")
    }

    /// Takes the disk of this number out of the VM, or what is there of it. When this returns, the VMM does not have the
    /// file any more.
    fn remove_volume(&self, number: u32) -> Answer<'_, ()> {
        let _ = number;
        unsupported("remove a volume")
    }

    /// Makes the disk of this number have this size, in bytes. Its file has it already.
    fn grow_volume(&self, number: u32, size: Bytes) -> Answer<'_, ()> {
        let _ = (number, size);
        unsupported("grow a volume")
    }

    /// Continues the console in a new file of this name; the open file stays whole under its new name.
    /// A driver with the console on the standard output does without.
    fn reopen_console<'a>(&'a self, log: &'a Path) -> Answer<'a, ()> {
        let _ = log;
        unsupported("reopen a console")
    }
}

fn unsupported<T: Send + 'static>(verb: &'static str) -> Answer<'static, T> {
    Box::pin(async move { Err(format!("this VMM cannot {verb}")) })
}
