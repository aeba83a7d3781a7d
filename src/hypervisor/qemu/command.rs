//! The command line of one VM: a pure function of what the VM is started from.
//!
//! QEMU opens no file of a VM by its path: disks, sockets, the console's log and the TAP are descriptors. The
//! kernel, the initial root and QEMU's own data are read by their paths, and are the same for all VMs.

use std::iter;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use stead_controllers::host::NetworkCard;
use stead_schemas::guest::{CONTROL_PORT, KERNEL_FILES_DISK, OVERLAY_DISK, ROOT_DISK};
use stead_schemas::quantity::{Bytes, Rate};

use super::disk::{CONTROLLER, Disk, as_word};
use super::machine_type::{QemuMachine, has_controller};
use super::throttle;
use crate::host::tap::VHOST_NET;
use crate::hypervisor::Accelerator;
use crate::hypervisor::driver::{Content, FIRST_DESCRIPTOR, Handed, Needs, Start, VmmCommand, VolumeFile};
use crate::hypervisor::record::{Mapping, VmPaths};

/// The guest kernel's command line: console on the serial port, no retries of a failed boot, plain device
/// names. An image's systemd offers no login on the console, which has no input, and reboots when it
/// crashes. Nothing is probed or tested that a guest never has: serial ports besides the console, and faults of the
/// kernel's own cryptography.
const KERNEL_COMMAND_LINE: &str = "console=ttyS0 quiet loglevel=3 panic=-1 reboot=triple net.ifnames=0 \
     random.trust_cpu=on rdinit=/init systemd.getty_auto=no systemd.crash_reboot=yes cryptomgr.notests \
     8250.nr_uarts=1";
/// Additions where the processor is emulated. Its clock is the host's: a guest that compares it with
/// another clock under load takes it for unstable, and reads the HPET from then on, which leaves the
/// emulation each time. Pages that are about to be overwritten are not cleared, as in kernels made for
/// micro-VMs. The timer is not tested: an emulator that the host does not run for a moment loses its ticks, and the
/// kernel panics for that. On KVM the kernel leaves the test out by itself.
const EMULATED_COMMAND_LINE: &str = "tsc=reliable init_on_alloc=0 no_timer_check";

/// Name of the console's output, which is reopened when its log has reached its limit.
pub(super) const CONSOLE: &str = "console";

/// The file that is the RAM. There is none: QEMU opens it for writing, and gets the descriptor of the RAM.
const RAM: &str = "/ram";
/// The devices that QEMU opens itself, the second with KVM only.
const NULL: &str = "/dev/null";
const KVM: &str = "/dev/kvm";
/// Name of the thread that serves all disks of a VM.
const DISK_THREAD: &str = "disks";
/// Number of random bytes that a guest gets in a period. A guest that seeds its own generator needs some hundred, and one that
/// asks without end keeps its VMM's main loop from other work.
const RNG_BYTES: u32 = 64 << 10;
/// Length of that period, in milliseconds.
const RNG_PERIOD: u32 = 100;
/// Threads of a VMM besides those of its processors: the main loop, the thread of the disks, each with a pool of 64
/// workers, and RCU, with room for those of a later version.
const THREADS: u64 = 192;

/// Returns the socket of the monitor.
pub(super) fn monitor(paths: &VmPaths) -> PathBuf {
    paths.socket("qmp.sock")
}

/// Returns the argument that marks a process as the VMM of this VM in `/proc/PID/cmdline`: the description of
/// its first descriptor, which is the console's log.
pub(super) fn mark(paths: &VmPaths) -> String {
    added(FIRST_DESCRIPTOR, &paths.console_log())
}

/// Returns the mark of processes from before files were passed as descriptors.
pub(super) fn earlier_mark(paths: &VmPaths) -> String {
    format!("unix:{},server=on,wait=off", escaped(&monitor(paths)))
}

/// Describes a descriptor for QEMU. The path is not opened: it is only for people.
fn added(descriptor: RawFd, path: &Path) -> String {
    format!("fd={descriptor},set={descriptor},opaque={}", escaped(path))
}

/// A command line that is being built, with the descriptors that it refers to.
#[derive(Debug, Default)]
struct Line {
    words: Vec<String>,
    descriptors: Vec<Handed>,
    /// The disks have a thread of their own.
    has_disk_thread: bool,
}

impl Line {
    fn add(&mut self, words: &[&str]) {
        self.words.extend(words.iter().map(|word| (*word).to_owned()));
    }

    /// Hands over a file and returns the number of its descriptor.
    fn hand(&mut self, handed: Handed) -> RawFd {
        self.descriptors.push(handed);
        let index = self.descriptors.len() - 1;
        FIRST_DESCRIPTOR + RawFd::try_from(index).unwrap_or(RawFd::MAX - FIRST_DESCRIPTOR)
    }

    /// Hands over a file and returns the name by which options refer to it.
    fn hand_as_file(&mut self, handed: Handed, path: &Path) -> String {
        let descriptor = self.hand(handed);
        self.add(&["-add-fd", &added(descriptor, path)]);
        format!("/dev/fdset/{descriptor}")
    }

    /// Adds a socket on which QEMU serves one client at a time.
    fn add_server(&mut self, id: &str, socket: PathBuf) {
        let descriptor = self.hand(Handed::Listener(socket));
        self.add(&["-chardev", &format!("socket,id={id},fd={descriptor},server=on,wait=off")]);
    }

    /// Adds the nodes of a disk, whose file has this description.
    fn add_nodes(&mut self, disk: &Disk<'_>, description: &Path) {
        let handed = Handed::Disk { path: disk.path.to_owned(), is_read_only: disk.is_read_only };
        let file = self.hand_as_file(handed, description);
        for node in disk.nodes(&file) {
            self.add(&["-blockdev", &as_word(&node)]);
        }
    }

    /// Adds a disk that stays as long as the VM.
    fn add_disk(&mut self, machine: QemuMachine, disk: &Disk<'_>) {
        self.add_nodes(disk, disk.path);
        let (device, drive, serial) = (machine.device("blk"), disk.drive(), &disk.serial);
        let thread = self.disk_thread();
        self.add(&["-device", &format!("{device},drive={drive},serial={serial}{thread}")]);
    }

    /// Adds the volumes, and the controller by which others come while the guest runs.
    fn add_volumes(&mut self, machine: QemuMachine, volumes: &[VolumeFile]) {
        let (device, thread) = (machine.device("scsi"), self.disk_thread());
        self.add(&["-device", &format!("{device},id={CONTROLLER},num_queues=1{thread}")]);
        for volume in volumes {
            let disk = Disk::volume(volume);
            // The file is found again by this description when the volume is taken out.
            self.add_nodes(&disk, Path::new(&disk.name));
            self.add(&["-device", &as_word(&disk.removable(volume.number))]);
        }
    }

    /// Returns the option that gives a device the thread of the disks.
    fn disk_thread(&self) -> String {
        if self.has_disk_thread { format!(",iothread={DISK_THREAD}") } else { String::new() }
    }

    /// Adds a thread that serves the disks, beside the main loop. Otherwise the processors of the guest do that work
    /// themselves, and wait for the main loop while it serves anything else.
    fn add_disk_thread(&mut self) {
        self.has_disk_thread = true;
        self.add(&["-object", &format!("iothread,id={DISK_THREAD}")]);
    }

    /// Adds the limit that the disks share. It is there without a rate too, so that the rate can change while the guest
    /// runs.
    fn add_disk_limit(&mut self, rate: Option<Rate>) {
        self.add(&["-object", &throttle::group(rate)]);
    }

    /// Adds a card that is connected to the TAP itself, so that the guest has its offloads. The kernel moves the frames
    /// if it can, with a thread for each pair of queues.
    fn add_card(&mut self, machine: QemuMachine, card: &NetworkCard, queues: u16, has_vhost_net: bool) {
        let further = (1..queues).map(|_| Handed::TapQueue(card.tap.clone()));
        let taps = self.hand_all(iter::once(Handed::Tap(card.tap.clone())).chain(further));
        let mut backend = format!("tap,id=card,fds={taps}");
        if has_vhost_net {
            let devices = self.hand_all((0..queues).map(|_| Handed::Device(VHOST_NET.into())));
            backend += &format!(",vhost=on,vhostfds={devices}");
        }
        self.add(&["-netdev", &backend]);
        self.add(&["-device", &card_device(machine, card, queues)]);
    }

    /// Hands over several files. Returns the list of the numbers of their descriptors.
    fn hand_all(&mut self, all: impl Iterator<Item = Handed>) -> String {
        let numbers: Vec<String> = all.map(|handed| self.hand(handed).to_string()).collect();
        numbers.join(":")
    }
}

/// Builds the command. `data` are the directories of firmware and modules, and `tsc_khz` is the rate of the
/// host's time stamp counter, which an emulated guest's counter has too.
pub(super) fn command(
    program: &Path,
    data: &[PathBuf],
    start: &Start<'_>,
    accelerator: Accelerator,
    tsc_khz: Option<u64>,
) -> VmmCommand {
    let line = line(start, accelerator, tsc_khz);
    let boot_files = [&*start.kernel.vmlinux, start.initrd].map(Path::to_owned);
    let mut opens = vec![(NULL.into(), Handed::Device(NULL.into()))];
    if start.ram.is_some() {
        opens.push((RAM.into(), Handed::Ram));
    }
    if accelerator == Accelerator::Kvm {
        opens.push((KVM.into(), Handed::Device(KVM.into())));
    }
    let needs = Needs {
        files: data.iter().cloned().chain(boot_files).collect(),
        descriptors: line.descriptors,
        opens,
        // Threads of the kernel that move frames count as the VMM's own.
        threads_max: THREADS + u64::from(start.plan.vcpus) + u64::from(start.queues),
    };
    VmmCommand {
        program: program.to_owned(),
        arguments: line.words,
        has_console_on_stdout: false,
        needs: Some(needs),
    }
}

fn line(start: &Start<'_>, accelerator: Accelerator, tsc_khz: Option<u64>) -> Line {
    let (plan, paths, machine) = (start.plan, start.paths, QemuMachine::named(start.machine_type.name));
    let mut line = Line::default();
    // The first descriptor, because it is the mark.
    let console = line.hand_as_file(Handed::Log(paths.console_log()), &paths.console_log());
    add_machine(&mut line, start, machine, accelerator);
    if start.content == Content::Saved {
        // The device state is loaded as it was saved: without a header.
        line.add(&["-incoming", "defer", "-S", "-global", "migration.send-configuration=off"]);
    }
    // -no-shutdown: a guest that powers off leaves the process in run state `shutdown`. So a daemon that starts later
    // can still distinguish it from a VMM that was killed.
    line.add(&["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-no-shutdown"]);
    line.add(&["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]);
    line.add_server("qmp", monitor(paths));
    line.add(&["-mon", "chardev=qmp,mode=control"]);
    let kernel_line = kernel_line(start, machine, accelerator, tsc_khz);
    line.add(&["-kernel", &start.kernel.vmlinux.display().to_string()]);
    line.add(&["-initrd", &start.initrd.display().to_string(), "-append", &kernel_line]);
    line.add(&["-chardev", &format!("file,id={CONSOLE},path={console},append=on")]);
    line.add(&["-serial", &format!("chardev:{CONSOLE}")]);
    line.add(&["-device", &format!("{},max_ports=2", machine.device("serial"))]);
    line.add_server("control", paths.control());
    line.add(&["-device", &format!("virtserialport,chardev=control,name={CONTROL_PORT},nr=1")]);
    line.add(&["-device", &format!("{},max-bytes={RNG_BYTES},period={RNG_PERIOD}", machine.device("rng"))]);
    if has_disk_thread(accelerator) {
        line.add_disk_thread();
    }
    line.add_disk_limit(plan.disk_rate);
    // The guest finds its disks by their serial numbers: their order depends on the machine type.
    line.add_disk(machine, &Disk::shared("root", ROOT_DISK, start.rootfs));
    line.add_disk(machine, &Disk::overlay(OVERLAY_DISK, start.overlay));
    if let Some(card) = &plan.network {
        // An emulated processor is slower than the process that emulates it: nothing is gained there.
        let has_vhost_net = start.has_vhost_net && accelerator == Accelerator::Kvm;
        line.add_card(machine, card, start.queues, has_vhost_net);
    }
    // After the devices that every VM has, so that they move no device of a memory saved without them.
    if let Some(files) = start.kernel_files {
        line.add_disk(machine, &Disk::shared("headers", KERNEL_FILES_DISK, files));
    }
    if has_controller(start.device_set) {
        line.add_volumes(machine, start.volumes);
    } else {
        for volume in start.volumes {
            line.add_disk(machine, &Disk::volume(volume));
        }
    }
    line
}

fn add_machine(line: &mut Line, start: &Start<'_>, machine: QemuMachine, accelerator: Accelerator) {
    let plan = start.plan;
    let cpu = match accelerator {
        Accelerator::Kvm => "host",
        // Without "fast" string moves, which are emulated byte by byte: the kernel then moves words
        // (`dd` in the guest is five times as fast, a boot a fifth shorter).
        Accelerator::Tcg => "max,-erms,-fsrm",
    };
    // Omit the device-state description (vmdesc); nothing reads it. A guest's memory is in no dump of the VMM,
    // and is not merged with equal pages of other guests, which could detect that by timing.
    let machine_option = format!(
        "{},memory-backend=ram,accel={},{},suppress-vmdesc=on,dump-guest-core=off,mem-merge=off{}",
        machine.as_str(),
        accelerator.as_str(),
        machine.options(start.device_set),
        machine.memory_options(plan.memory, plan.hotplug)
    );
    line.add(&["-name", &format!("guest={},debug-threads=on", plan.owner)]);
    line.add(&["-machine", &machine_option, "-cpu", cpu]);
    line.add(&["-m", &format!("{}M", plan.memory.mib_ceil()), "-smp", &plan.vcpus.to_string()]);
    if let Some(ram) = start.ram {
        // An anonymous file is shared, because a save reads it from outside.
        let share = match ram.mapping {
            Mapping::Own => "on",
            Mapping::Private => "off",
        };
        let path = if start.has_walls {
            RAM.to_owned()
        } else {
            format!("/proc/self/fd/{}", line.hand(Handed::Ram))
        };
        let file = format!("size={}M,mem-path={path},share={share}", plan.memory.mib_ceil());
        line.add(&["-object", &format!("memory-backend-file,id=ram,{file}")]);
    }
}

/// Returns whether the disks have a thread of their own. Emulated guests have none: QEMU 7.2 then reads the queues of
/// a disk in two threads at once, which breaks the disk or ends the VMM, and devices without PCI refuse it.
fn has_disk_thread(accelerator: Accelerator) -> bool {
    accelerator == Accelerator::Kvm
}

fn kernel_line(
    start: &Start<'_>,
    machine: QemuMachine,
    accelerator: Accelerator,
    tsc_khz: Option<u64>,
) -> String {
    let is_emulated = accelerator == Accelerator::Tcg;
    let needs_rate = is_emulated && !machine.has_reference_clock();
    let rate = tsc_khz.filter(|_| needs_rate).map(|khz| format!("tsc_early_khz={khz}"));
    // So much memory is kept for pages that can be moved: the kernel gives whole blocks of it back.
    let hotplug = start.plan.hotplug;
    let movable = (hotplug > Bytes(0)).then(|| format!("movablecore={}M", hotplug.mib_ceil()));
    let words = [
        Some(KERNEL_COMMAND_LINE),
        machine.kernel_options(),
        is_emulated.then_some(EMULATED_COMMAND_LINE),
        rate.as_deref(),
        movable.as_deref(),
        start.kernel_files.map(|_| KERNEL_FILES_DISK),
    ];
    words.into_iter().flatten().collect::<Vec<_>>().join(" ")
}

fn card_device(machine: QemuMachine, card: &NetworkCard, queues: u16) -> String {
    // No option ROM: nothing boots from the network.
    let rom = match machine {
        QemuMachine::Q35 => ",romfile=",
        QemuMachine::Microvm => "",
    };
    // An interrupt for each queue, one for the control queue, and one for changes of the device. A card with one pair
    // of queues stays as memories were saved with it.
    let all = match queues {
        0 | 1 => String::new(),
        _ => format!(",mq=on,vectors={}", 2 * u32::from(queues) + 2),
    };
    format!("{},netdev=card,mac={}{rom}{all}", machine.device("net"), card.mac)
}

/// Escapes a path within a comma-separated option: commas are doubled.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}
