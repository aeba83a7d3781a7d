//! The program's root: the image as the read-only lower layer, the instance's ext4 disk as the upper layer.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_move, unmount,
};
use stead_schemas::guest::{Config, KERNEL_FILES_DISK, NetworkConfig, OVERLAY_DISK, ROOT_DISK};

use crate::BootError;
use crate::devices::{disk_of_serial, wait_for};
use crate::grow::mount_writable;
use crate::inside;

const NEW_ROOT: &str = "/newroot";

fn failed<'a, E: std::fmt::Display>(what: &'a str) -> impl FnOnce(E) -> BootError + 'a {
    move |error| BootError::new("root", format!("{what}: {error}"))
}

/// Mounts image and overlay, and the file systems that a Linux program expects.
pub(crate) fn mount_root() -> Result<(), BootError> {
    for dir in ["/lower", "/upper", NEW_ROOT] {
        fs::create_dir_all(dir).map_err(failed(dir))?;
    }
    let image = wait_for("the image's disk", || disk_of_serial(ROOT_DISK))?;
    let overlay = wait_for("the overlay's disk", || disk_of_serial(OVERLAY_DISK))?;
    mount_image(&image)?;
    mount_writable(&overlay, Path::new("/upper")).map_err(failed("overlay disk"))?;
    for dir in ["/upper/upper", "/upper/work"] {
        fs::create_dir_all(dir).map_err(failed(dir))?;
    }
    fs::set_permissions("/upper/upper", fs::Permissions::from_mode(0o755)).map_err(failed("overlay disk"))?;
    let options = match mount_kernel_files()? {
        // The kernel's files are a layer below the image: they are not copied, and the image's own files hide them.
        true => c"lowerdir=/lower:/kernel-files,upperdir=/upper/upper,workdir=/upper/work",
        false => c"lowerdir=/lower,upperdir=/upper/upper,workdir=/upper/work",
    };
    mount("overlay", NEW_ROOT, "overlay", MountFlags::empty(), Some(options)).map_err(failed("overlay"))?;
    mount_kernel_file_systems()
}

/// Mounts the kernel's files. Returns `false` if the kernel command line, set by the host, names none.
fn mount_kernel_files() -> Result<bool, BootError> {
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    if !line.split_whitespace().any(|word| word == KERNEL_FILES_DISK) {
        return Ok(false);
    }
    fs::create_dir_all("/kernel-files").map_err(failed("kernel files"))?;
    let device = wait_for("the disk of kernel files", || disk_of_serial(KERNEL_FILES_DISK))?;
    mount(device.as_path(), "/kernel-files", "squashfs", MountFlags::RDONLY, None)
        .map_err(failed("kernel files"))?;
    Ok(true)
}

/// Mounts the image. Both formats are accepted, and the format is found by trying.
fn mount_image(device: &Path) -> Result<(), BootError> {
    let mut last = None;
    for kind in ["squashfs", "erofs"] {
        match mount(device, "/lower", kind, MountFlags::RDONLY, None) {
            Ok(()) => return Ok(()),
            Err(error) => last = Some(error),
        }
    }
    Err(BootError::new("root", format!("image disk: {}", last.map_or_else(String::new, |e| e.to_string()))))
}

fn mount_kernel_file_systems() -> Result<(), BootError> {
    let strict = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    // Links of the image are followed as its programs will follow them: they may be absolute, and may be dangling.
    let at = |dir: &str| inside::resolve(Path::new(NEW_ROOT), dir).map_err(failed("a link of the image"));
    for dir in ["/proc", "/sys", "/dev", "/run", "/tmp", "/etc"] {
        fs::create_dir_all(at(dir)?).map_err(failed(dir))?;
    }
    let mounts = [
        ("proc", "/proc", "proc", strict, None),
        ("sys", "/sys", "sysfs", strict, None),
        ("dev", "/dev", "devtmpfs", MountFlags::NOSUID, None),
        (
            "devpts",
            "/dev/pts",
            "devpts",
            MountFlags::NOSUID | MountFlags::NOEXEC,
            Some(c"mode=0620,ptmxmode=0666,gid=5"),
        ),
        ("shm", "/dev/shm", "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, Some(c"mode=1777")),
        ("mqueue", "/dev/mqueue", "mqueue", strict, None),
        ("run", "/run", "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, Some(c"mode=0755")),
        ("cgroup", "/sys/fs/cgroup", "cgroup2", strict, None),
    ];
    for (source, dir, kind, flags, options) in mounts {
        let target = at(dir)?;
        let _ = fs::create_dir_all(&target);
        match mount(source, &target, kind, flags, options) {
            Ok(()) => {}
            // Some kernels lack these two; programs that need them report it themselves.
            Err(_) if matches!(kind, "mqueue" | "cgroup2") => {}
            Err(error) => return Err(failed(dir)(error)),
        }
    }
    for (link, target) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")]
    {
        let _ = std::os::unix::fs::symlink(target, at("/dev")?.join(link));
    }
    Ok(())
}

/// Writes the names of a guest whose new root is not the root yet.
pub(crate) fn write_first_names(config: &Config) -> Result<(), BootError> {
    write_names(NEW_ROOT, &config.hostname, config.network.as_ref())
}

/// Writes resolv.conf, hosts and hostname, as container runtimes do.
pub(crate) fn write_names(
    root: &str,
    hostname: &str,
    network: Option<&NetworkConfig>,
) -> Result<(), BootError> {
    let mut hosts = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    let mut resolv = String::new();
    if let Some(network) = network {
        hosts.push_str(&format!("{}\t{hostname}\n", network.address));
        network.dns.iter().for_each(|server| resolv.push_str(&format!("nameserver {server}\n")));
        for (word, all) in [("search", &network.resolver.search), ("options", &network.resolver.options)] {
            if !all.is_empty() {
                resolv.push_str(&format!("{word} {}\n", all.join(" ")));
            }
        }
        write(root, "/etc/resolv.conf", &resolv)?;
    } else {
        hosts.push_str(&format!("127.0.1.1\t{hostname}\n"));
    }
    write(root, "/etc/hosts", &hosts)?;
    write(root, "/etc/hostname", &format!("{hostname}\n"))
}

/// Replaces a file below a root. A symbolic link of the image in its place is not followed, and a link on the way to
/// it does not lead out of the root.
fn write(root: &str, path: &str, text: &str) -> Result<(), BootError> {
    let root = if root.is_empty() { "/" } else { root };
    let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
    let directory = inside::resolve(Path::new(root), directory).map_err(failed(path))?;
    let path = directory.join(name);
    let _ = fs::remove_file(&path);
    fs::write(&path, text).map_err(failed(name))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).map_err(failed(name))
}

/// Makes the new root the root and frees the memory that the initrd held.
pub(crate) fn switch() -> Result<(), BootError> {
    for dir in ["/dev", "/sys", "/proc"] {
        unmount(dir, UnmountFlags::DETACH).map_err(failed(dir))?;
    }
    let _ = fs::remove_file("/init");
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .or(Ok(()))
        .map_err(|error: rustix::io::Errno| BootError::new("root", format!("propagation: {error}")))?;
    std::env::set_current_dir(NEW_ROOT).map_err(failed("change directory"))?;
    mount_move(".", "/").map_err(failed("move"))?;
    rustix::process::chroot(".").map_err(failed("change root"))?;
    std::env::set_current_dir("/").map_err(failed("change directory"))
}

/// Writes everything to the disk before power-off. The disk is clean if no process holds it.
pub(crate) fn settle() {
    use rustix::mount::mount_remount;
    let _ = mount_remount("/", MountFlags::RDONLY, "");
    rustix::fs::sync();
}
