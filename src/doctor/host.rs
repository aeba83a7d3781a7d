//! The host: rights, programs, acceleration, guest kernel, limits.

use std::path::Path;
use std::process::Stdio;

use tokio::process::Command;

use super::{ANSWER_DEADLINE, Finding};
use crate::config::Config;
use crate::host::kernel::Kernel;
use crate::host::tap::has_vhost_net;
use crate::hypervisor::{Accelerator, Drivers};

/// Programs that the daemon starts, with their Debian packages.
const PROGRAMS: [(&str, &str); 5] = [
    ("nft", "nftables"),
    ("unshare", "util-linux"),
    ("mkfs.ext4", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("sqfstar", "squashfs-tools"),
];
/// Oldest QEMU that was tested: major and minor version.
const QEMU_MIN: (u32, u32) = (7, 2);
/// Number of entries of the connection table below which one busy guest affects others.
const CONNTRACK_MIN: u64 = 65_536;

pub(super) async fn examine(config: &Config) -> Vec<Finding> {
    let mut findings = vec![rights()];
    findings.extend(programs());
    findings.push(vmm(config).await);
    findings.push(acceleration(config));
    findings.push(walls(config));
    findings.push(kernel(config));
    findings.extend(limits());
    findings
}

fn rights() -> Finding {
    if rustix::process::geteuid().is_root() {
        Finding::ok("rights", "runs as root")
    } else {
        Finding::problem("rights", "runs without root's rights", "run it as root, as the daemon is run")
    }
}

/// True if a shell would find the program; the sbin directories are added, because root's shells do not
/// always have them.
fn find(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut directories = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    directories.any(|folder| folder.join(program).is_file())
}

fn programs() -> Vec<Finding> {
    let missing: Vec<_> = PROGRAMS.iter().filter(|(program, _)| !find(program)).collect();
    if missing.is_empty() {
        return vec![Finding::ok("programs", PROGRAMS.map(|(program, _)| program).join(", "))];
    }
    let problem = |(program, package): &&(&str, &str)| {
        Finding::problem(
            "programs",
            format!("the program {program} is not installed"),
            format!("apt-get install {package}"),
        )
    };
    missing.iter().map(problem).collect()
}

async fn vmm(config: &Config) -> Finding {
    let name = config.qemu.display();
    let mut command = Command::new(&config.qemu);
    command.arg("--version").stdin(Stdio::null()).kill_on_drop(true);
    let reported = tokio::time::timeout(ANSWER_DEADLINE, command.output()).await;
    let Ok(Ok(output)) = reported else {
        return Finding::problem(
            "qemu",
            format!("{name} does not run"),
            "apt-get install qemu-system-x86, or set `qemu` in the configuration",
        );
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.split_whitespace().skip_while(|word| *word != "version").nth(1).unwrap_or("unknown");
    let mut numbers = version.split('.').map_while(|part| part.parse::<u32>().ok());
    let is_known = numbers.next().zip(numbers.next()).is_some_and(|found| found >= QEMU_MIN);
    let machines = Drivers::built_in(&config.programs(), Accelerator::probe()).probe().await;
    if machines.is_empty() {
        return Finding::problem(
            "qemu",
            format!("{name} {version} has no machine type that is known"),
            "install Debian's qemu-system-x86",
        );
    }
    let machines: Vec<String> = machines.iter().map(|machine| machine.as_str().to_owned()).collect();
    let message = format!("{name} {version} ({})", machines.join(", "));
    if is_known {
        Finding::ok("qemu", message)
    } else {
        let (major, minor) = QEMU_MIN;
        Finding::warning("qemu", message, format!("use {major}.{minor} or later, which is what was tested"))
    }
}

fn walls(config: &Config) -> Finding {
    if config.insecure_without_walls {
        return Finding::problem(
            "walls",
            "VMMs run as root: a guest that takes over its VMM has this host",
            "remove insecure_without_walls from the configuration",
        );
    }
    Finding::ok("walls", "VMMs run behind walls")
}

fn acceleration(config: &Config) -> Finding {
    if let Some(why) = config.accelerator.problem() {
        return Finding::problem(
            "kvm",
            why,
            "load kvm_intel or kvm_amd, and see that /dev/kvm can be opened",
        );
    }
    match config.accelerator.accelerator() {
        Accelerator::Kvm if has_vhost_net() => Finding::ok("kvm", "guests run on KVM"),
        Accelerator::Kvm => Finding::warning(
            "kvm",
            "guests run on KVM, but the kernel does not move the frames of their network cards",
            "load vhost_net, and see that /dev/vhost-net can be opened",
        ),
        Accelerator::Tcg => Finding::warning(
            "kvm",
            "guests run under emulation: slowly, and without the isolation of hardware",
            "load kvm_intel or kvm_amd, and see that /dev/kvm can be opened",
        ),
    }
}

fn kernel(config: &Config) -> Finding {
    let directory = config.kernel_dir();
    // This only looks: the daemon unpacks what boots.
    match Kernel::version(&directory) {
        Ok(version) => Finding::ok("guest kernel", version),
        Err(error) => Finding::problem(
            "guest kernel",
            error.chain(),
            format!("deploy/fetch-kernel {}, or set `kernel_dir`", directory.display()),
        ),
    }
}

fn number(path: &str) -> Option<u64> {
    std::fs::read_to_string(Path::new("/proc/sys").join(path)).ok()?.trim().parse().ok()
}

fn limits() -> Vec<Finding> {
    let mut findings = Vec::new();
    match number("net/netfilter/nf_conntrack_max") {
        Some(entries) if entries < CONNTRACK_MIN => findings.push(Finding::warning(
            "connections",
            format!("the host tracks {entries} connections at most, for itself and all guests"),
            format!("sysctl net.netfilter.nf_conntrack_max={CONNTRACK_MIN} or more"),
        )),
        Some(entries) => findings.push(Finding::ok("connections", format!("{entries} can be tracked"))),
        None => findings.push(Finding::warning(
            "connections",
            "the host does not track connections yet: auto-standby cannot count them",
            "modprobe nf_conntrack; the daemon's firewall loads it at its start",
        )),
    }
    findings
}
