//! Early mounts, kernel modules, and the control port.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::mount::{MountFlags, mount};
use rustix::system::finit_module;
use stead_schemas::guest::CONTROL_PORT;

use crate::BootError;

/// Time limit for a device to appear after its driver was loaded. Probing takes milliseconds.
const DEVICE_WAIT: Duration = Duration::from_secs(10);
const DEVICE_POLL: Duration = Duration::from_millis(2);

/// Mounts the file systems that the initial root needs: `/dev`, `/proc`, `/sys`.
pub(crate) fn mount_early() -> Result<(), BootError> {
    for (source, target, kind) in
        [("dev", "/dev", "devtmpfs"), ("proc", "/proc", "proc"), ("sys", "/sys", "sysfs")]
    {
        fs::create_dir_all(target).map_err(|error| BootError::new("mounts", format!("{target}: {error}")))?;
        match mount(source, target, kind, MountFlags::empty(), None) {
            // The kernel may have mounted /dev by itself.
            Ok(()) | Err(rustix::io::Errno::BUSY) => {}
            Err(error) => return Err(BootError::new("mounts", format!("{target}: {error}"))),
        }
    }
    Ok(())
}

/// Names the program that loads modules on the kernel's request, if it is not at its usual path.
pub(crate) fn name_module_loader() {
    let programs = ["/sbin/modprobe", "/usr/sbin/modprobe", "/bin/modprobe", "/usr/bin/modprobe"];
    if let Some(program) = programs.iter().find(|program| Path::new(program).exists()) {
        let _ = fs::write("/proc/sys/kernel/modprobe", program);
    }
}

/// Loads the modules that the initrd brought, in the order of its list.
pub(crate) fn load_modules() -> Result<(), BootError> {
    let list = fs::read_to_string("/modules/order").unwrap_or_default();
    for name in list.lines() {
        let file = File::open(Path::new("/modules").join(name))
            .map_err(|error| BootError::new("modules", format!("{name}: {error}")))?;
        match finit_module(&file, c"", 0) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(BootError::new("modules", format!("{name}: {error}"))),
        }
    }
    // The modes are those of an ordinary host: the kernel decides what a program may do with the devices.
    for device in ["/dev/net/tun", "/dev/fuse"] {
        let _ = fs::set_permissions(device, fs::Permissions::from_mode(0o666));
    }
    // The module files only occupy memory from here on.
    let _ = fs::remove_dir_all("/modules");
    Ok(())
}

/// Opens the control port by its name.
pub(crate) fn control_port() -> Result<File, BootError> {
    let path = wait_for("the control port", find_control_port)?;
    let mut options = OpenOptions::new();
    std::os::unix::fs::OpenOptionsExt::custom_flags(
        &mut options,
        i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0),
    );
    options
        .read(true)
        .write(true)
        .open(&path)
        .map_err(|error| BootError::new("control port", format!("{}: {error}", path.display())))
}

fn find_control_port() -> Option<PathBuf> {
    for port in fs::read_dir("/sys/class/virtio-ports").ok()?.flatten() {
        let name = fs::read_to_string(port.path().join("name")).unwrap_or_default();
        let device = Path::new("/dev").join(port.file_name());
        if name.trim() == CONTROL_PORT && device.exists() {
            return Some(device);
        }
    }
    None
}

/// Finds a disk by its serial number. Its name depends on the other disks.
pub(crate) fn disk_of_serial(serial: &str) -> Option<PathBuf> {
    let mut disks = fs::read_dir("/sys/block").ok()?.flatten();
    let is_it = |disk: &fs::DirEntry| {
        fs::read_to_string(disk.path().join("serial")).is_ok_and(|found| found.trim() == serial)
    };
    let found = disks.find(is_it)?;
    Some(Path::new("/dev").join(found.file_name())).filter(|device| device.exists())
}

/// Waits until a device appears.
pub(crate) fn wait_for<T>(what: &'static str, mut find: impl FnMut() -> Option<T>) -> Result<T, BootError> {
    let deadline = Instant::now() + DEVICE_WAIT;
    loop {
        if let Some(found) = find() {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            return Err(BootError::new("devices", format!("{what} did not appear")));
        }
        std::thread::sleep(DEVICE_POLL);
    }
}
