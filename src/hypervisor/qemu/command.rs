//! The command line of one VM: a pure function of plan and places.

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use stead_controllers::host::{LaunchPlan, NetworkCard};
use stead_schemas::guest::{CONTROL_PORT, KERNEL_FILES_DISK, OVERLAY_DISK, ROOT_DISK, volume_disk};

use super::board::Board;
use super::launching::Content;
use super::places::{Mapping, Places};
use crate::host::kernel::Kernel;
use crate::hypervisor::Accelerator;

/// Everything a command line is made of besides the plan.
#[derive(Debug)]
pub(super) struct Ingredients<'a> {
    pub(super) board: Board,
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
    /// The rate of the host's time stamp counter, which an emulated guest's has too.
    pub(super) tsc_khz: Option<u64>,
    pub(super) content: Content,
    /// A disk with modules and headers of the kernel.
    pub(super) kernel_files: Option<&'a Path>,
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
    // Nor is the state followed by a description of itself. A guest's memory is its own: in no dump of
    // the VMM, and shared by content with no other guest's, whose timing would tell of it.
    let machine = format!(
        "{},memory-backend=ram,accel={},{},suppress-vmdesc=on,dump-guest-core=off,mem-merge=off",
        from.board.as_str(),
        from.accelerator.as_str(),
        from.board.options()
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
    let kernel_line = kernel_line(from);
    add(&["-kernel", &from.kernel.vmlinux.display().to_string()]);
    add(&["-initrd", &from.initrd.display().to_string(), "-append", &kernel_line]);
    add(&["-chardev", &format!("file,id={CONSOLE},path={},append=on", escaped(&places.console_log()))]);
    add(&["-serial", &format!("chardev:{CONSOLE}")]);
    add(&["-device", &format!("{},max_ports=2", from.board.device("serial"))]);
    add(&["-chardev", &format!("socket,id=control,path={},server=on,wait=off", escaped(&places.control()))]);
    add(&["-device", &format!("virtserialport,chardev=control,name={CONTROL_PORT},nr=1")]);
    add(&["-device", &from.board.device("rng")]);
    // Found by their serial numbers: which is the guest's first is for the board to say.
    add_disk(&mut add, from.board, &Disk::new("root", ROOT_DISK, from.rootfs, true));
    add_disk(&mut add, from.board, &Disk::new("overlay", OVERLAY_DISK, from.overlay, false));
    if let Some(card) = &plan.network {
        // The card hangs on a hub, not on the TAP: a TAP that is removed under a running guest can
        // then be replaced, which a card's own back end cannot. The price is the offloads.
        let tap = format!("tap,id={TAP},ifname={},script=no,downscript=no", card.tap);
        add(&["-netdev", &tap, "-netdev", &format!("hubport,id={PLUG},hubid=0,netdev={TAP}")]);
        add(&["-netdev", "hubport,id=card,hubid=0"]);
        add(&["-device", &card_device(from.board, card)]);
    }
    // Behind what every VM has: so they move no device of a memory that was saved without them.
    if let Some(files) = from.kernel_files {
        add_disk(&mut add, from.board, &Disk::new("headers", KERNEL_FILES_DISK, files, true));
    }
    for (index, (path, is_read_only)) in from.volumes.iter().enumerate() {
        let (name, serial) = (format!("volume{index}"), volume_disk(index));
        add_disk(&mut add, from.board, &Disk::new(&name, &serial, path, *is_read_only));
    }
    line
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

fn add_disk(add: &mut impl FnMut(&[&str]), board: Board, disk: &Disk<'_>) {
    let Disk { name, serial, path, is_read_only } = disk;
    let (file, read_only) = (escaped(path), if *is_read_only { "on" } else { "off" });
    let options = format!("read-only={read_only},discard=unmap");
    add(&["-blockdev", &format!("driver=file,node-name={name}-file,filename={file},{options}")]);
    add(&["-blockdev", &format!("driver=raw,node-name={name},file={name}-file,{options}")]);
    add(&["-device", &format!("{},drive={name},serial={serial}", board.device("blk"))]);
}

fn kernel_line(from: &Ingredients<'_>) -> String {
    let is_emulated = from.accelerator == Accelerator::Tcg;
    let is_told_rate = is_emulated && !from.board.has_reference_clock();
    let rate = from.tsc_khz.filter(|_| is_told_rate).map(|khz| format!("tsc_early_khz={khz}"));
    let words = [
        Some(KERNEL_COMMAND_LINE),
        is_emulated.then_some(EMULATED_COMMAND_LINE),
        rate.as_deref(),
        from.kernel_files.map(|_| KERNEL_FILES_DISK),
    ];
    words.into_iter().flatten().collect::<Vec<_>>().join(" ")
}

fn card_device(board: Board, card: &NetworkCard) -> String {
    // No option ROM: nothing boots from the network.
    let rom = match board {
        Board::Q35 => ",romfile=",
        Board::Microvm => "",
    };
    format!("{},netdev=card,mac={}{rom}", board.device("net"), card.mac)
}

/// A path within a comma-separated option: commas are doubled.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use stead_schemas::numbers::{LaunchId, RunNo};
    use stead_schemas::quantity::Bytes;

    use super::*;

    fn plan(board: Board, has_network: bool) -> LaunchPlan {
        LaunchPlan {
            owner: "tz4a98xxat96iws9zmbrgj3a".parse().expect("valid"),
            run: RunNo(1),
            launch: LaunchId(1),
            hypervisor: board.hypervisor(),
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

    fn line(board: Board, content: Content, accelerator: Accelerator) -> Vec<String> {
        let plan = plan(board, true);
        let kernel = Kernel { vmlinux: "/k".into(), modules: "/m".into(), headers: None, modules_disk: None };
        let from = Ingredients {
            board,
            kernel: &kernel,
            initrd: Path::new("/i"),
            rootfs: Path::new("/a,b"),
            overlay: Path::new("/o"),
            volumes: &[("/v".into(), false), ("/w".into(), true)],
            ram: 9,
            mapping: Mapping::Own,
            accelerator,
            tsc_khz: Some(2_600_000),
            content,
            kernel_files: Some(Path::new("/h")),
        };
        arguments(&plan, &Places::new(Path::new("/run"), Path::new("/data"), &plan.owner), &from)
    }

    /// The values of one option, in their order.
    fn values<'a>(line: &'a [String], option: &str) -> Vec<&'a str> {
        line.windows(2).filter(|pair| pair[0] == option).map(|pair| pair[1].as_str()).collect()
    }

    #[test]
    fn each_board_has_the_devices_of_its_bus_and_the_same_ones() {
        let serials = ["root", "overlay", "headers"].map(|disk| format!("serial=stead.{disk}"));
        for (board, ending) in [(Board::Q35, "-pci"), (Board::Microvm, "-device")] {
            let line = line(board, Content::Fresh, Accelerator::Tcg);
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
            let machine = values(&line, "-machine");
            assert_eq!(machine.len(), 1);
            assert_eq!(first(machine[0]), board.as_str());
            for part in [
                "memory-backend=ram",
                "accel=tcg",
                "suppress-vmdesc=on",
                "dump-guest-core=off",
                "mem-merge=off",
            ] {
                assert!(machine[0].split(',').any(|one| one == part), "{machine:?}");
            }
            assert!(values(&line, "-blockdev").iter().any(|one| one.contains("filename=/a,,b")));
        }
    }

    #[test]
    fn what_only_one_board_knows_is_said_to_no_other() {
        let [q35, microvm] =
            [Board::Q35, Board::Microvm].map(|board| line(board, Content::Fresh, Accelerator::Tcg).join(" "));
        for (word, is_of_q35) in
            [("vmport=", true), ("romfile=", true), ("pit=on", false), ("rtc=on", false), ("acpi=on", false)]
        {
            assert_eq!((q35.contains(word), microvm.contains(word)), (is_of_q35, !is_of_q35), "{word}");
        }
        assert!(!microvm.contains("pci"), "{microvm}");
    }

    #[test]
    fn a_saved_memory_waits_for_its_device_state_on_either_board() {
        for board in Board::ALL {
            let saved = line(board, Content::Saved, Accelerator::Tcg);
            assert_eq!(values(&saved, "-incoming"), ["defer"]);
            assert!(saved.iter().any(|word| word == "-S"));
            assert!(!line(board, Content::Fresh, Accelerator::Tcg).iter().any(|word| word == "-incoming"));
        }
    }

    #[test]
    fn only_an_emulated_guest_is_told_to_rely_on_its_clock_and_its_rate_where_it_cannot_find_it_out() {
        for (board, accelerator, is_relied_on, is_told_rate) in [
            (Board::Q35, Accelerator::Tcg, true, false),
            (Board::Microvm, Accelerator::Tcg, true, true),
            (Board::Q35, Accelerator::Kvm, false, false),
            (Board::Microvm, Accelerator::Kvm, false, false),
        ] {
            let line = line(board, Content::Fresh, accelerator);
            let words: Vec<&str> = values(&line, "-append")[0].split(' ').collect();
            let told = (words.contains(&"tsc=reliable"), words.contains(&"tsc_early_khz=2600000"));
            assert_eq!(told, (is_relied_on, is_told_rate), "{board:?} {accelerator:?}");
        }
    }

    fn first(value: &str) -> &str {
        value.split(',').next().unwrap_or_default()
    }
}
