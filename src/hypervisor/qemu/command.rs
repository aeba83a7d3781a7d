//! The command line of one VM: a pure function of plan and places.

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use stead_controllers::host::LaunchPlan;
use stead_schemas::guest::{CONTROL_PORT, HEADERS_DISK, volume_disk};

use super::launching::Content;
use super::places::{Mapping, Places};
use crate::host::kernel::Kernel;
use crate::hypervisor::Accelerator;

/// Everything a command line is made of besides the plan.
#[derive(Debug)]
pub(super) struct Ingredients<'a> {
    pub(super) kernel: &'a Kernel,
    pub(super) initrd: &'a Path,
    pub(super) rootfs: &'a Path,
    pub(super) overlay: &'a Path,
    /// Disks of volumes, and whether they are only read.
    pub(super) volumes: &'a [(PathBuf, bool)],
    /// A file as long as the guest's memory, open in the VMM from its start.
    pub(super) ram: RawFd,
    pub(super) mapping: Mapping,
    pub(super) accelerator: Accelerator,
    pub(super) content: Content,
    /// A disk with the kernel's headers.
    pub(super) headers: Option<&'a Path>,
}

/// The guest kernel's: console on the serial port, no retries of a dead boot, plain device names. An
/// image's systemd offers no login on the console, which has no input, and does not stand still when
/// it crashes.
const KERNEL_COMMAND_LINE: &str = "console=ttyS0 quiet loglevel=3 panic=-1 reboot=triple net.ifnames=0 \
     random.trust_cpu=on rdinit=/init systemd.getty_auto=no systemd.crash_reboot=yes";
/// Besides, where the processor is emulated. Its clock is the host's: a guest that compares it with
/// another under load takes it for unstable, and reads the HPET from then on, by leaving the emulation.
/// Nor are pages cleared that are written over next, as micro-VM's own kernels do not either.
const EMULATED_COMMAND_LINE: &str = "tsc=reliable init_on_alloc=0";

/// The kind of board; what is saved of one fits no other.
pub(super) const MACHINE: &str = "q35";

/// Name of the console's output, which is replaced when its log has reached its limit.
pub(super) const CONSOLE: &str = "console";
/// Names of the replaceable parts of a card's connection.
pub(super) const TAP: &str = "tap";
pub(super) const PLUG: &str = "plug";

/// The text that marks a process as the VMM of this machine; found again in `/proc/PID/cmdline`.
pub(super) fn mark(places: &Places) -> String {
    format!("unix:{},server=on,wait=off", escaped(&places.monitor()))
}

/// Arguments, the program's name not among them.
pub(super) fn arguments(plan: &LaunchPlan, places: &Places, from: &Ingredients<'_>) -> Vec<String> {
    let mut line = Vec::new();
    let mut add = |words: &[&str]| line.extend(words.iter().map(|word| (*word).to_owned()));
    let cpu = match from.accelerator {
        Accelerator::Kvm => "host",
        // Without "fast" string moves, which this emulates byte by byte: the kernel then moves words
        // (`dd` in the guest is five times as fast, a boot a fifth shorter).
        Accelerator::Tcg => "max,-erms,-fsrm",
    };
    // Nor is the state followed by a description of itself.
    let machine = format!(
        "{MACHINE},memory-backend=ram,accel={},smm=off,vmport=off,usb=off,suppress-vmdesc=on",
        from.accelerator.as_str()
    );
    add(&["-name", &format!("guest={},debug-threads=on", plan.owner)]);
    add(&["-machine", &machine, "-cpu", cpu]);
    add(&["-m", &format!("{}M", plan.memory.mib_ceil()), "-smp", &plan.vcpus.to_string()]);
    // Shared: what is in an anonymous file is read from outside.
    let share = match from.mapping {
        Mapping::Own => "on",
        Mapping::Private => "off",
    };
    let (size, ram) = (plan.memory.mib_ceil(), from.ram);
    add(&[
        "-object",
        &format!("memory-backend-file,id=ram,size={size}M,mem-path=/proc/self/fd/{ram},share={share}"),
    ]);
    if from.content == Content::Saved {
        // The device state comes as it was saved: without a head that says what the rest will be.
        add(&["-incoming", "defer", "-S", "-global", "migration.send-configuration=off"]);
    }
    // -no-shutdown: a guest that powers off leaves the process in run state `shutdown`, which tells
    // it apart from a VMM that was killed, even to a daemon that was not there.
    add(&["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-no-shutdown"]);
    add(&["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]);
    add(&["-qmp", &mark(places)]);
    let emulated = (from.accelerator == Accelerator::Tcg).then_some(EMULATED_COMMAND_LINE);
    let words = [Some(KERNEL_COMMAND_LINE), emulated, from.headers.map(|_| HEADERS_DISK)];
    let kernel_line = words.into_iter().flatten().collect::<Vec<_>>().join(" ");
    add(&["-kernel", &from.kernel.vmlinux.display().to_string()]);
    add(&["-initrd", &from.initrd.display().to_string(), "-append", &kernel_line]);
    add(&["-chardev", &format!("file,id={CONSOLE},path={},append=on", escaped(&places.console_log()))]);
    add(&["-serial", &format!("chardev:{CONSOLE}")]);
    add(&["-device", "virtio-serial-pci,max_ports=2"]);
    add(&["-chardev", &format!("socket,id=control,path={},server=on,wait=off", escaped(&places.control()))]);
    add(&["-device", &format!("virtserialport,chardev=control,name={CONTROL_PORT},nr=1")]);
    add(&["-device", "virtio-rng-pci"]);
    add_disk(&mut add, "root", from.rootfs, true);
    add_disk(&mut add, "overlay", from.overlay, false);
    if let Some(card) = &plan.network {
        // The card hangs on a hub, not on the TAP: a TAP that is removed under a running guest can
        // then be replaced, which a card's own back end cannot. The price is the offloads.
        let tap = format!("tap,id={TAP},ifname={},script=no,downscript=no", card.tap);
        add(&["-netdev", &tap, "-netdev", &format!("hubport,id={PLUG},hubid=0,netdev={TAP}")]);
        add(&["-netdev", "hubport,id=card,hubid=0"]);
        // No option ROM: nothing boots from the network.
        add(&["-device", &format!("virtio-net-pci,netdev=card,mac={},romfile=", card.mac)]);
    }
    if let Some(headers) = from.headers {
        // Behind what every VM has, as volumes are: found by their serial numbers.
        add_backend(&mut add, "headers", headers, true);
        add(&["-device", &format!("virtio-blk-pci,drive=headers,serial={HEADERS_DISK}")]);
    }
    for (index, (path, is_read_only)) in from.volumes.iter().enumerate() {
        let name = format!("volume{index}");
        add_backend(&mut add, &name, path, *is_read_only);
        add(&["-device", &format!("virtio-blk-pci,drive={name},serial={}", volume_disk(index))]);
    }
    line
}

fn add_disk(add: &mut impl FnMut(&[&str]), name: &str, path: &Path, is_read_only: bool) {
    add_backend(add, name, path, is_read_only);
    add(&["-device", &format!("virtio-blk-pci,drive={name}")]);
}

fn add_backend(add: &mut impl FnMut(&[&str]), name: &str, path: &Path, is_read_only: bool) {
    let read_only = if is_read_only { "on" } else { "off" };
    let file = escaped(path);
    add(&[
        "-blockdev",
        &format!("driver=file,node-name={name}-file,filename={file},read-only={read_only},discard=unmap"),
    ]);
    add(&[
        "-blockdev",
        &format!("driver=raw,node-name={name},file={name}-file,read-only={read_only},discard=unmap"),
    ]);
}

/// A path within a comma-separated option: commas are doubled.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}
