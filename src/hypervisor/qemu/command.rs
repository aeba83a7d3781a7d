//! The command line of one VM: a pure function of what the VM is started from.
//!
//! QEMU opens no file of a VM by its path: disks, sockets, the console's log and the TAP are descriptors. The
//! kernel, the initial root and QEMU's own data are read by their paths, and are the same for all VMs.

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use stead_controllers::host::NetworkCard;
use stead_schemas::guest::{CONTROL_PORT, KERNEL_FILES_DISK, OVERLAY_DISK, ROOT_DISK, volume_disk};

use super::machine_type::QemuMachine;
use crate::hypervisor::Accelerator;
use crate::hypervisor::driver::{Content, FIRST_DESCRIPTOR, Handed, Needs, Start, VmmCommand};
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
/// micro-VMs.
const EMULATED_COMMAND_LINE: &str = "tsc=reliable init_on_alloc=0";

/// Name of the console's output, which is reopened when its log has reached its limit.
pub(super) const CONSOLE: &str = "console";
/// Names of the replaceable parts of a card's connection.
pub(super) const TAP: &str = "tap";
pub(super) const PLUG: &str = "plug";

/// The file that is the RAM. There is none: QEMU opens it for writing, and gets the descriptor of the RAM.
const RAM: &str = "/ram";
/// The devices that QEMU opens itself, the second with KVM only.
const NULL: &str = "/dev/null";
const KVM: &str = "/dev/kvm";
/// Name of the thread that serves all disks of a VM.
const DISK_THREAD: &str = "disks";
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

    fn add_disk(&mut self, machine: QemuMachine, disk: &Disk<'_>) {
        let Disk { name, serial, path, is_read_only } = *disk;
        let file = self.hand_as_file(Handed::Disk { path: path.to_owned(), is_read_only }, path);
        let options = format!("read-only={},discard=unmap", if is_read_only { "on" } else { "off" });
        self.add(&["-blockdev", &format!("driver=file,node-name={name}-file,filename={file},{options}")]);
        self.add(&["-blockdev", &format!("driver=raw,node-name={name},file={name}-file,{options}")]);
        let thread = if self.has_disk_thread { format!(",iothread={DISK_THREAD}") } else { String::new() };
        self.add(&["-device", &format!("{},drive={name},serial={serial}{thread}", machine.device("blk"))]);
    }

    /// Adds a thread that serves the disks, beside the main loop. Otherwise the processors of the guest do that work
    /// themselves, and wait for the main loop while it serves anything else.
    fn add_disk_thread(&mut self) {
        self.has_disk_thread = true;
        self.add(&["-object", &format!("iothread,id={DISK_THREAD}")]);
    }

    /// Adds a card that is connected to a hub and not to the TAP. A TAP that is removed under a running guest
    /// can then be replaced, which the back end of a card cannot be. The price is the offloads.
    fn add_card(&mut self, machine: QemuMachine, card: &NetworkCard) {
        let tap = self.hand(Handed::Tap(card.tap.clone()));
        self.add(&["-netdev", &format!("tap,id={TAP},fd={tap}")]);
        self.add(&["-netdev", &format!("hubport,id={PLUG},hubid=0,netdev={TAP}")]);
        self.add(&["-netdev", "hubport,id=card,hubid=0"]);
        self.add(&["-device", &card_device(machine, card)]);
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
        threads_max: THREADS + u64::from(start.plan.vcpus),
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
    line.add(&["-device", &machine.device("rng")]);
    if has_disk_thread(accelerator) {
        line.add_disk_thread();
    }
    // The guest finds its disks by their serial numbers: their order depends on the machine type.
    line.add_disk(machine, &Disk::new("root", ROOT_DISK, start.rootfs, true));
    line.add_disk(machine, &Disk::new("overlay", OVERLAY_DISK, start.overlay, false));
    if let Some(card) = &plan.network {
        line.add_card(machine, card);
    }
    // After the devices that every VM has, so that they move no device of a memory saved without them.
    if let Some(files) = start.kernel_files {
        line.add_disk(machine, &Disk::new("headers", KERNEL_FILES_DISK, files, true));
    }
    for (index, (path, is_read_only)) in start.volumes.iter().enumerate() {
        let (name, serial) = (format!("volume{index}"), volume_disk(index));
        line.add_disk(machine, &Disk::new(&name, &serial, path, *is_read_only));
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
        "{},memory-backend=ram,accel={},{},suppress-vmdesc=on,dump-guest-core=off,mem-merge=off",
        machine.as_str(),
        accelerator.as_str(),
        machine.options(start.device_set)
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
        let file = format!("size={}M,mem-path={RAM},share={share}", plan.memory.mib_ceil());
        line.add(&["-object", &format!("memory-backend-file,id=ram,{file}")]);
    }
}

/// Returns whether the disks have a thread of their own. Emulated guests have none: QEMU 7.2 then reads the queues of
/// a disk in two threads at once, which breaks the disk or ends the VMM, and devices without PCI refuse it.
fn has_disk_thread(accelerator: Accelerator) -> bool {
    accelerator == Accelerator::Kvm
}

struct Disk<'a> {
    name: &'a str,
    serial: &'a str,
    path: &'a Path,
    is_read_only: bool,
}

impl<'a> Disk<'a> {
    fn new(name: &'a str, serial: &'a str, path: &'a Path, is_read_only: bool) -> Self {
        Self { name, serial, path, is_read_only }
    }
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
    let words = [
        Some(KERNEL_COMMAND_LINE),
        machine.kernel_options(),
        is_emulated.then_some(EMULATED_COMMAND_LINE),
        rate.as_deref(),
        start.kernel_files.map(|_| KERNEL_FILES_DISK),
    ];
    words.into_iter().flatten().collect::<Vec<_>>().join(" ")
}

fn card_device(machine: QemuMachine, card: &NetworkCard) -> String {
    // No option ROM: nothing boots from the network.
    let rom = match machine {
        QemuMachine::Q35 => ",romfile=",
        QemuMachine::Microvm => "",
    };
    format!("{},netdev=card,mac={}{rom}", machine.device("net"), card.mac)
}

/// Escapes a path within a comma-separated option: commas are doubled.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use stead_controllers::host::LaunchPlan;
    use stead_schemas::numbers::{DeviceSet, LaunchId, RunNo};
    use stead_schemas::quantity::Bytes;

    use super::super::machine_type::DEVICE_SET;
    use super::*;
    use crate::host::kernel::Kernel;
    use crate::hypervisor::driver::{MachineType, Ram};

    fn machine_type(machine: QemuMachine) -> MachineType {
        let all = super::super::machine_type::ALL;
        *all.iter().find(|machine_type| machine_type.name == machine.as_str()).expect("it is one of them")
    }

    fn plan(machine: QemuMachine, has_network: bool) -> LaunchPlan {
        LaunchPlan {
            owner: "tz4a98xxat96iws9zmbrgj3a".parse().expect("valid"),
            run: RunNo(1),
            launch: LaunchId(1),
            hypervisor: machine_type(machine).hypervisor,
            vcpus: 2,
            memory: Bytes(256 << 20),
            rootfs: format!("sha256:{}", "0".repeat(64)).parse().expect("valid"),
            overlay: "tz4a98xxat96iws9zmbrgj3b".parse().expect("valid"),
            cid: 3,
            network: has_network.then(|| NetworkCard {
                tap: "st0".parse().expect("valid"),
                mac: stead_schemas::network::Mac([2, 0, 0, 0, 0, 7]),
                address: std::net::Ipv4Addr::new(10, 0, 0, 2),
            }),
            wants_headers: true,
            volumes: Vec::new(),
        }
    }

    fn line(machine: QemuMachine, content: Content, accelerator: Accelerator) -> Vec<String> {
        command(machine, content, accelerator).arguments
    }

    fn command(machine: QemuMachine, content: Content, accelerator: Accelerator) -> VmmCommand {
        command_with(machine, content, accelerator, DEVICE_SET)
    }

    fn command_with(
        machine: QemuMachine,
        content: Content,
        accelerator: Accelerator,
        device_set: DeviceSet,
    ) -> VmmCommand {
        let plan = plan(machine, true);
        let kernel = Kernel { vmlinux: "/k".into(), modules: "/m".into(), headers: None, modules_disk: None };
        let paths = VmPaths::new(Path::new("/run"), Path::new("/data"), &plan.owner);
        let start = Start {
            plan: &plan,
            machine_type: machine_type(machine),
            device_set,
            paths: &paths,
            kernel: &kernel,
            initrd: Path::new("/i"),
            rootfs: Path::new("/a,b"),
            overlay: Path::new("/o"),
            volumes: &[("/v".into(), false), ("/w".into(), true)],
            kernel_files: Some(Path::new("/h")),
            content,
            ram: Some(Ram { descriptor: 9, mapping: Mapping::Own }),
        };
        let data = [PathBuf::from("/usr/share/qemu")];
        super::command(Path::new("/q"), &data, &start, accelerator, Some(2_600_000))
    }

    /// Returns the values of one option, in their order.
    fn values<'a>(line: &'a [String], option: &str) -> Vec<&'a str> {
        line.windows(2).filter(|pair| pair[0] == option).map(|pair| pair[1].as_str()).collect()
    }

    #[test]
    fn each_machine_type_has_the_devices_of_its_bus_and_the_same_ones() {
        let serials = ["root", "overlay", "headers"].map(|disk| format!("serial=stead.{disk}"));
        for (machine, ending) in [(QemuMachine::Q35, "-pci"), (QemuMachine::Microvm, "-device")] {
            let line = line(machine, Content::Fresh, Accelerator::Tcg);
            let devices = values(&line, "-device");
            let virtio: Vec<&str> =
                devices.iter().filter(|one| one.starts_with("virtio-")).map(|one| first(one)).collect();
            let expected = ["serial", "rng", "blk", "blk", "net", "blk", "blk", "blk"]
                .map(|kind| format!("virtio-{kind}{ending}"));
            assert_eq!(virtio, expected);
            for serial in &serials {
                let having = devices.iter().filter(|one| one.split(',').any(|part| part == serial)).count();
                assert_eq!(having, 1, "{serial}: {devices:?}");
            }
            let options = values(&line, "-machine");
            assert_eq!(options.len(), 1);
            assert_eq!(first(options[0]), machine.as_str());
            for part in [
                "memory-backend=ram",
                "accel=tcg",
                "suppress-vmdesc=on",
                "dump-guest-core=off",
                "mem-merge=off",
            ] {
                assert!(options[0].split(',').any(|one| one == part), "{options:?}");
            }
            assert!(values(&line, "-add-fd").iter().any(|one| one.contains("opaque=/a,,b")));
        }
    }

    #[test]
    fn each_file_of_a_vm_is_a_descriptor_and_a_saved_ram_is_opened_by_nobody_for_writing() {
        let VmmCommand { arguments, needs, .. } = command(QemuMachine::Q35, Content::Fresh, Accelerator::Kvm);
        let needs = needs.expect("it is behind walls");
        let disk = |path: &str, is_read_only| Handed::Disk { path: path.into(), is_read_only };
        let disks = [("/a,b", true), ("/o", false), ("/h", true), ("/v", false), ("/w", true)];
        for (path, is_read_only) in disks {
            let index = needs.descriptors.iter().position(|handed| *handed == disk(path, is_read_only));
            let number = FIRST_DESCRIPTOR + RawFd::try_from(index.expect("handed over")).expect("small");
            let used = format!("filename=/dev/fdset/{number},");
            assert!(values(&arguments, "-blockdev").iter().any(|value| value.contains(&used)), "{path}");
        }
        let opened: Vec<&Path> = needs.opens.iter().map(|(path, _)| path.as_path()).collect();
        assert_eq!(opened, ["/dev/null", "/ram", "/dev/kvm"].map(Path::new));
        assert_eq!(needs.files, ["/usr/share/qemu", "/k", "/i"].map(PathBuf::from));
        let words = arguments.join(" ");
        for path in ["filename=/a", "path=/data", "path=/run", "ifname="] {
            assert!(!words.contains(path), "{path} in {words}");
        }
    }

    #[test]
    fn only_the_disks_of_a_guest_that_is_not_emulated_have_a_thread() {
        for machine in QemuMachine::ALL {
            for (accelerator, has_thread) in [(Accelerator::Tcg, false), (Accelerator::Kvm, true)] {
                let line = line(machine, Content::Fresh, accelerator);
                let disks: Vec<&str> =
                    values(&line, "-device").into_iter().filter(|one| first(one).contains("-blk-")).collect();
                assert_eq!(disks.len(), 5);
                for disk in disks {
                    assert_eq!(disk.ends_with(",iothread=disks"), has_thread, "{accelerator:?}: {disk}");
                }
                assert_eq!(values(&line, "-object").contains(&"iothread,id=disks"), has_thread);
            }
        }
    }

    #[test]
    fn a_memory_gets_the_devices_that_it_was_saved_with() {
        for (device_set, has_controllers) in [(DeviceSet(0), true), (DEVICE_SET, false)] {
            let words =
                command_with(QemuMachine::Q35, Content::Saved, Accelerator::Tcg, device_set).arguments;
            let options = values(&words, "-machine")[0];
            for option in ["sata=off", "smbus=off", "i8042=off"] {
                assert_eq!(!options.split(',').any(|one| one == option), has_controllers, "{options}");
            }
        }
    }

    #[test]
    fn options_of_one_machine_type_are_not_given_to_the_other() {
        let [q35, microvm] = [QemuMachine::Q35, QemuMachine::Microvm]
            .map(|machine| line(machine, Content::Fresh, Accelerator::Tcg).join(" "));
        for (word, is_of_q35) in [
            ("vmport=", true),
            ("romfile=", true),
            ("pci=", true),
            ("pit=on", false),
            ("rtc=on", false),
            ("acpi=on", false),
        ] {
            assert_eq!((q35.contains(word), microvm.contains(word)), (is_of_q35, !is_of_q35), "{word}");
        }
        assert!(!microvm.contains("pci"), "{microvm}");
    }

    #[test]
    fn a_saved_memory_waits_for_its_device_state_on_either_machine_type() {
        for machine in QemuMachine::ALL {
            let saved = line(machine, Content::Saved, Accelerator::Tcg);
            assert_eq!(values(&saved, "-incoming"), ["defer"]);
            assert!(saved.iter().any(|word| word == "-S"));
            assert!(!line(machine, Content::Fresh, Accelerator::Tcg).iter().any(|word| word == "-incoming"));
        }
    }

    #[test]
    fn only_an_emulated_guest_relies_on_its_clock_and_gets_its_rate_where_it_cannot_measure_it() {
        for (machine, accelerator, relies_on_clock, gets_rate) in [
            (QemuMachine::Q35, Accelerator::Tcg, true, false),
            (QemuMachine::Microvm, Accelerator::Tcg, true, true),
            (QemuMachine::Q35, Accelerator::Kvm, false, false),
            (QemuMachine::Microvm, Accelerator::Kvm, false, false),
        ] {
            let line = line(machine, Content::Fresh, accelerator);
            let words: Vec<&str> = values(&line, "-append")[0].split(' ').collect();
            let found = (words.contains(&"tsc=reliable"), words.contains(&"tsc_early_khz=2600000"));
            assert_eq!(found, (relies_on_clock, gets_rate), "{machine:?} {accelerator:?}");
        }
    }

    fn first(value: &str) -> &str {
        value.split(',').next().unwrap_or_default()
    }
}
