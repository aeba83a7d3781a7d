//! Early mounts, the control port, and disks.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::mount::{MountFlags, mount};
use stead_schemas::guest::CONTROL_PORT;

use crate::BootError;

/// Time limit for a device to appear after its driver was loaded. Probing takes milliseconds.
pub(crate) const DEVICE_WAIT: Duration = Duration::from_secs(10);
const DEVICE_POLL: Duration = Duration::from_millis(2);
/// Offset of the serial number in page 80h of a SCSI disk's vital product data. Page number and length come before it.
const SERIAL_OFFSET: usize = 4;
const SERIAL_PAGE: u8 = 0x80;

/// The number by which the kernel knows a device, or a file system without one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct DeviceNumber {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

impl DeviceNumber {
    /// Returns the number that a `stat` shows as one integer.
    pub(crate) fn of(device: u64) -> Self {
        Self { major: rustix::fs::major(device), minor: rustix::fs::minor(device) }
    }

    /// Parses `major:minor`.
    pub(crate) fn parse(text: &str, radix: u32) -> Option<Self> {
        let (major, minor) = text.split_once(':')?;
        let number = |text| u32::from_str_radix(text, radix).ok();
        Some(Self { major: number(major)?, minor: number(minor)? })
    }
}

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

/// Finds a disk by its serial number. Its name depends on the other disks. A disk that was taken out may be listed for a
/// moment, and cannot be opened.
pub(crate) fn disk_of_serial(serial: &str) -> Option<PathBuf> {
    let disks = fs::read_dir("/sys/block").ok()?.flatten();
    let mut found = disks.filter(|disk| serial_below(&disk.path()).as_deref() == Some(serial));
    found.find_map(|disk| {
        let device = Path::new("/dev").join(disk.file_name());
        File::open(&device).is_ok().then_some(device)
    })
}

/// Makes the kernel forget a SCSI disk that is about to be taken out: the next disk of its number is another one.
pub(crate) fn forget_disk(device: &Path) {
    if let Some(name) = device.file_name() {
        let _ = fs::write(Path::new("/sys/block").join(name).join("device/delete"), "1");
    }
}

/// Makes the kernel ask a SCSI disk for its size, which the host may have raised. A saved memory knows the earlier size.
pub(crate) fn update_size(device: &Path) {
    if let Some(name) = device.file_name() {
        let _ = fs::write(Path::new("/sys/block").join(name).join("device/rescan"), "1");
    }
}

/// Makes the kernel search for the SCSI disk of a volume, which it may have forgotten.
pub(crate) fn search_disk(serial: &str) {
    let Some(number) = serial.rsplit('.').next().filter(|number| number.parse::<u32>().is_ok()) else {
        return;
    };
    for controller in fs::read_dir("/sys/class/scsi_host").into_iter().flatten().flatten() {
        let _ = fs::write(controller.path().join("scan"), format!("0 0 {number}"));
    }
}

/// Returns the serial number of the disk with this number.
pub(crate) fn serial_of_disk(disk: DeviceNumber) -> Option<String> {
    serial_below(Path::new(&format!("/sys/dev/block/{}:{}", disk.major, disk.minor)))
}

/// Returns the serial number in a disk's directory of sysfs: that of a virtio disk, or that of a SCSI disk.
fn serial_below(disk: &Path) -> Option<String> {
    match fs::read_to_string(disk.join("serial")) {
        Ok(serial) => Some(serial.trim().to_owned()),
        Err(_) => serial_in_page(&fs::read(disk.join("device/vpd_pg80")).ok()?),
    }
}

/// Returns the serial number in page 80h of a SCSI disk's vital product data.
fn serial_in_page(page: &[u8]) -> Option<String> {
    let (header, number) = page.split_at_checked(SERIAL_OFFSET)?;
    let length = usize::from(u16::from_be_bytes([header[2], header[3]]));
    let number = number.get(..length).filter(|_| header[1] == SERIAL_PAGE)?;
    Some(std::str::from_utf8(number).ok()?.trim_matches([' ', '\0', '\n']).to_owned())
}

/// Waits until a device appears whose driver was loaded.
pub(crate) fn wait_for<T>(what: &'static str, find: impl FnMut() -> Option<T>) -> Result<T, BootError> {
    wait_until(Instant::now() + DEVICE_WAIT, DEVICE_POLL, what, find)
}

/// Waits until a device appears, and queries for it at least once.
pub(crate) fn wait_until<T>(
    deadline: Instant,
    poll: Duration,
    what: &'static str,
    mut find: impl FnMut() -> Option<T>,
) -> Result<T, BootError> {
    loop {
        if let Some(found) = find() {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            return Err(BootError::new("devices", format!("{what} did not appear")));
        }
        std::thread::sleep(poll);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_serial_number_of_a_scsi_disk_is_read_and_another_page_has_none() {
        let page =
            |number: u8, length: u8, text: &str| [&[0, number, 0, length][..], text.as_bytes()].concat();
        assert_eq!(serial_in_page(&page(0x80, 14, "stead.volume.3")).as_deref(), Some("stead.volume.3"));
        assert_eq!(
            serial_in_page(&page(0x80, 16, "  stead.volume.3rest")).as_deref(),
            Some("stead.volume.3")
        );
        assert_eq!(serial_in_page(&page(0x80, 0, "")).as_deref(), Some(""));
        for none in
            [page(0x83, 1, "x"), page(0x80, 5, "four"), vec![0, 0x80, 0], vec![], vec![0, 0x80, 0, 1, 0xff]]
        {
            assert_eq!(serial_in_page(&none), None, "{none:?}");
        }
    }

    #[test]
    fn disks_of_both_kinds_have_a_serial_number() {
        let root = std::env::temp_dir().join(format!("stead-disks-{}", std::process::id()));
        fs::create_dir_all(root.join("sda/device")).expect("made");
        fs::create_dir_all(root.join("vda")).expect("made");
        fs::create_dir_all(root.join("loop0")).expect("made");
        fs::write(root.join("vda/serial"), "stead.root").expect("written");
        fs::write(root.join("sda/device/vpd_pg80"), b"\0\x80\0\x0estead.volume.0").expect("written");
        assert_eq!(serial_below(&root.join("vda")).as_deref(), Some("stead.root"));
        assert_eq!(serial_below(&root.join("sda")).as_deref(), Some("stead.volume.0"));
        assert_eq!(serial_below(&root.join("loop0")), None);
        fs::remove_dir_all(root).expect("removed");
    }

    #[test]
    fn device_numbers_are_read_in_both_forms() {
        let number = |major, minor| Some(DeviceNumber { major, minor });
        assert_eq!(DeviceNumber::parse("8:16", 10), number(8, 16));
        assert_eq!(DeviceNumber::parse("08:1f", 16), number(8, 31));
        for none in ["", "8", ":", "8:x", "8:1:2"] {
            assert_eq!(DeviceNumber::parse(none, 10), None, "{none}");
        }
        assert_eq!(Some(DeviceNumber::of(rustix::fs::makedev(259, 70_000))), number(259, 70_000));
    }
}
