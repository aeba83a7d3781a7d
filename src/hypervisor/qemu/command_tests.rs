//! The command line of QEMU for each machine type, accelerator and content.

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use stead_controllers::host::{LaunchPlan, NetworkCard, VmmLimits};
use stead_schemas::names::LinkName;
use stead_schemas::numbers::{DeviceSet, LaunchId, RunNo};
use stead_schemas::quantity::{Bytes, Rate};

use super::command;
use super::machine_type::{DEVICE_SET, QemuMachine};
use crate::host::kernel::Kernel;
use crate::host::tap::VHOST_NET;
use crate::hypervisor::Accelerator;
use crate::hypervisor::driver::{
    Content, FIRST_DESCRIPTOR, Handed, MachineType, Ram, Start, VmmCommand, VolumeFile,
};
use crate::hypervisor::record::{Mapping, VmPaths};

fn machine_type(machine: QemuMachine) -> MachineType {
    let all = super::machine_type::ALL;
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
        hotplug: Bytes(0),
        disk_rate: Some(Rate(20 << 20)),
        rootfs: format!("sha256:{}", "0".repeat(64)).parse().expect("valid"),
        overlay: "tz4a98xxat96iws9zmbrgj3b".parse().expect("valid"),
        cid: 3,
        network: has_network.then(|| NetworkCard {
            tap: "st0".parse().expect("valid"),
            mac: stead_schemas::network::Mac([2, 0, 0, 0, 0, 7]),
            address: std::net::Ipv4Addr::new(10, 0, 0, 2),
            has_queues: false,
        }),
        wants_headers: true,
        volumes: Vec::new(),
        limits: VmmLimits { vcpus: 2, memory: Bytes(384 << 20) },
    }
}

fn line(machine: QemuMachine, content: Content, accelerator: Accelerator) -> Vec<String> {
    command(machine, content, accelerator).arguments
}

fn command(machine: QemuMachine, content: Content, accelerator: Accelerator) -> VmmCommand {
    command_with(machine, content, accelerator, DEVICE_SET, 1)
}

fn command_with(
    machine: QemuMachine,
    content: Content,
    accelerator: Accelerator,
    device_set: DeviceSet,
    queues: u16,
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
        volumes: &[
            VolumeFile { path: "/v".into(), is_read_only: false, number: 0 },
            VolumeFile { path: "/w".into(), is_read_only: true, number: 1 },
        ],
        kernel_files: Some(Path::new("/h")),
        queues,
        has_vhost_net: true,
        content,
        ram: Some(Ram { descriptor: 9, mapping: Mapping::Own }),
        has_walls: true,
    };
    let data = [PathBuf::from("/usr/share/qemu")];
    command::command(Path::new("/q"), &data, &start, accelerator, Some(2_600_000))
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
        let expected = ["serial", "rng", "blk", "blk", "net", "blk", "scsi"]
            .map(|kind| format!("virtio-{kind}{ending}"));
        assert_eq!(virtio, expected);
        assert!(devices.iter().any(|one| one.ends_with(",max-bytes=65536,period=100")), "{devices:?}");
        for serial in &serials {
            let having = devices.iter().filter(|one| one.split(',').any(|part| part == serial)).count();
            assert_eq!(having, 1, "{serial}: {devices:?}");
        }
        let options = values(&line, "-machine");
        assert_eq!(options.len(), 1);
        assert_eq!(first(options[0]), machine.as_str());
        for part in
            ["memory-backend=ram", "accel=tcg", "suppress-vmdesc=on", "dump-guest-core=off", "mem-merge=off"]
        {
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
fn a_card_is_at_its_tap_and_its_frames_are_moved_by_the_kernel_where_that_executes_the_guest() {
    for machine in QemuMachine::ALL {
        for accelerator in [Accelerator::Kvm, Accelerator::Tcg] {
            let VmmCommand { arguments, needs, .. } = command(machine, Content::Fresh, accelerator);
            let handed = needs.expect("it is behind walls").descriptors;
            let number = |wanted: &Handed| {
                let index = handed.iter().position(|handed| handed == wanted)?;
                Some(FIRST_DESCRIPTOR + RawFd::try_from(index).expect("small"))
            };
            let tap = number(&Handed::Tap("st0".parse().expect("valid"))).expect("handed over");
            let vhost = match (accelerator, number(&Handed::Device(VHOST_NET.into()))) {
                (Accelerator::Kvm, Some(device)) => format!(",vhost=on,vhostfds={device}"),
                (Accelerator::Tcg, None) => String::new(),
                (accelerator, device) => panic!("{device:?} with {accelerator:?}"),
            };
            assert_eq!(values(&arguments, "-netdev"), [format!("tap,id=card,fds={tap}{vhost}")]);
        }
    }
}

#[test]
fn each_further_queue_of_a_card_has_a_tap_a_thread_of_the_kernel_and_its_interrupts() {
    let command = command_with(QemuMachine::Q35, Content::Fresh, Accelerator::Kvm, DEVICE_SET, 3);
    let needs = command.needs.expect("it is behind walls");
    let tap: LinkName = "st0".parse().expect("valid");
    // The first TAP must be free, and the others are at the same one.
    let wanted = [Handed::Tap(tap.clone()), Handed::TapQueue(tap.clone()), Handed::TapQueue(tap)];
    let numbers = |is_wanted: &dyn Fn(&Handed) -> bool| {
        let all = needs.descriptors.iter().enumerate().filter(|(_, handed)| is_wanted(handed));
        let all =
            all.map(|(index, _)| (usize::try_from(FIRST_DESCRIPTOR).expect("small") + index).to_string());
        all.collect::<Vec<_>>().join(":")
    };
    let handed: Vec<&Handed> = needs.descriptors.iter().filter(|handed| wanted.contains(handed)).collect();
    assert_eq!(handed, wanted.iter().collect::<Vec<_>>());
    let taps = numbers(&|handed| wanted.contains(handed));
    let devices = numbers(&|handed| *handed == Handed::Device(VHOST_NET.into()));
    assert_eq!(devices.split(':').count(), 3);
    let backend = format!("tap,id=card,fds={taps},vhost=on,vhostfds={devices}");
    assert_eq!(values(&command.arguments, "-netdev"), [backend]);
    let card = values(&command.arguments, "-device").into_iter().find(|one| first(one).contains("-net-"));
    assert!(card.is_some_and(|card| card.ends_with(",mq=on,vectors=8")), "{card:?}");
}

#[test]
fn all_disks_of_an_instance_share_one_limit_and_shared_disks_have_none() {
    for machine in QemuMachine::ALL {
        let line = line(machine, Content::Fresh, Accelerator::Tcg);
        let groups: Vec<&str> =
            values(&line, "-object").into_iter().filter(|one| one.contains("throttle-group")).collect();
        assert_eq!(groups, [super::throttle::group(Some(Rate(20 << 20)))]);
        let backends = values(&line, "-blockdev");
        for (disk, is_limited) in
            [("root", false), ("headers", false), ("overlay", true), ("volume0", true), ("volume1", true)]
        {
            let drive = if is_limited { format!("{disk}-limited") } else { disk.to_owned() };
            let node = |driver: &str, name: &str, rest: &str| {
                let start = format!("driver={driver},node-name={name},{rest},");
                backends.iter().find_map(|one| one.strip_prefix(&start))
            };
            let filter =
                node("throttle", &format!("{disk}-limited"), &format!("throttle-group=io,file={disk}"));
            assert_eq!(filter.is_some(), is_limited, "{disk}");
            // Every node of a disk must let pass what the ones below it can do, and no more.
            let format = node("raw", disk, &format!("file={disk}-file")).expect("a format");
            assert!(format.contains("read-only=") && format.contains("discard=unmap"), "{disk}: {format}");
            assert_eq!(filter.unwrap_or(format), format, "{disk}");
            let drive = format!("drive={drive}");
            let is_used = |device: &&str| device.split(',').any(|part| part == drive);
            assert!(values(&line, "-device").iter().any(is_used), "{disk}");
        }
    }
}

#[test]
fn only_the_disks_of_a_guest_that_is_not_emulated_have_a_thread() {
    for machine in QemuMachine::ALL {
        for (accelerator, has_thread) in [(Accelerator::Tcg, false), (Accelerator::Kvm, true)] {
            let line = line(machine, Content::Fresh, accelerator);
            let is_disk = |one: &&str| first(one).contains("-blk-") || first(one).contains("-scsi-");
            let disks: Vec<&str> = values(&line, "-device").into_iter().filter(is_disk).collect();
            // The volumes are at one controller.
            assert_eq!(disks.len(), 4);
            for disk in disks {
                assert_eq!(disk.ends_with(",iothread=disks"), has_thread, "{accelerator:?}: {disk}");
            }
            assert_eq!(values(&line, "-object").contains(&"iothread,id=disks"), has_thread);
        }
    }
}

#[test]
fn a_memory_gets_the_devices_that_it_was_saved_with() {
    for (device_set, has_controllers, has_live_volumes) in
        [(DeviceSet(0), true, false), (DeviceSet(1), false, false), (DEVICE_SET, false, true)]
    {
        let words = command_with(QemuMachine::Q35, Content::Saved, Accelerator::Tcg, device_set, 1).arguments;
        for (number, access) in [(0, "off"), (1, "on")] {
            let serial = format!("serial=stead.volume.{number}");
            let device = values(&words, "-device").into_iter().find(|one| one.contains(&serial));
            let device = device.expect("each volume has a device");
            assert_eq!(device.starts_with("driver=scsi-hd,"), has_live_volumes, "{device}");
            assert_eq!(device.contains(&format!("lun={number}")), has_live_volumes, "{device}");
            assert!(device.contains(&format!("drive=volume{number}-limited")), "{device}");
            let node = format!(
                "node-name=volume{number}-limited,throttle-group=io,file=volume{number},read-only={access}"
            );
            assert!(values(&words, "-blockdev").iter().any(|one| one.contains(&node)), "{words:?}");
        }
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
        assert_eq!(words.contains(&"no_timer_check"), relies_on_clock, "{machine:?} {accelerator:?}");
    }
}

fn first(value: &str) -> &str {
    value.split(',').next().unwrap_or_default()
}

#[test]
fn hotplug_memory_is_above_4_gib_and_found_again_in_the_file_of_the_ram() {
    const GIB: u64 = 1 << 30;
    for (boot, low) in [(GIB, GIB), (3 * GIB, 2 * GIB)] {
        let (memory, hotplug) = (Bytes(boot + GIB), Bytes(GIB));
        let q35 = QemuMachine::Q35;
        assert_eq!(q35.memory_options(memory, hotplug), format!(",max-ram-below-4g={low}"));
        assert_eq!(q35.memory_options(memory, Bytes(0)), "", "memories were saved with this layout");
        let at = |address| q35.ram_offset(memory, hotplug, address);
        assert_eq!((at(0), at(low - 1)), (Some(0), Some(low - 1)));
        assert_eq!((at(low), at(4 * GIB - 1)), (None, None), "no RAM is there");
        // All of the hotplug memory, to its last byte.
        let end = 4 * GIB + memory.0 - low;
        assert_eq!((at(end - GIB), at(end - 1)), (Some(boot), Some(memory.0 - 1)));
    }
}
