//! Unmounts volumes, without force, and finds out whether their disks are free after that.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

use super::Mounted;
use super::holders::{self, Used};
use super::mountinfo::{self, Mount};
use crate::devices::{DeviceNumber, forget_disk};

/// Time for which a disk may be in use after its volume was unmounted: the kernel finishes some work later.
const FREE_WAIT: Duration = Duration::from_millis(250);
const FREE_POLL: Duration = Duration::from_millis(5);

/// Unmounts a volume. An error says in words why it is still in use.
pub(super) fn unmount_one(mounted: &Mounted, find: &dyn Fn(&str) -> Option<PathBuf>) -> Result<(), String> {
    let mounts = mountinfo::own().map_err(|error| format!("the mounts cannot be read: {error}"))?;
    let disks: Vec<PathBuf> = mounted.serials().filter_map(find).collect();
    match mountinfo::visible(&mounts, &mounted.at).filter(|top| mounted.is_it(top)) {
        Some(own) => detach(mounted, own, &mounts, &disks)?,
        None if mounts.iter().any(|mount| mounted.is_it(mount)) => {
            return Err("another file system is mounted over it".to_owned());
        }
        // It was unmounted in the guest.
        None => {}
    }
    for disk in &disks {
        if is_in_use(disk).map_err(|error| format!("its disk: {error}"))? {
            return Err(holders::users_of_disk(&used(mounted, None, &disks)));
        }
    }
    disks.iter().for_each(|disk| forget_disk(disk));
    Ok(())
}

impl Mounted {
    /// Returns the serial numbers of its disks.
    fn serials(&self) -> impl Iterator<Item = &str> {
        [Some(self.volume.disk.as_str()), self.volume.upper.as_deref()].into_iter().flatten()
    }

    /// Returns whether this mount is that of the volume.
    pub(super) fn is_it(&self, mount: &Mount) -> bool {
        mount.at == self.at && mount.device == self.device
    }
}

fn detach(mounted: &Mounted, own: &Mount, mounts: &[Mount], disks: &[PathBuf]) -> Result<(), String> {
    match unmount(&mounted.at, UnmountFlags::NOFOLLOW) {
        // It was unmounted in the guest meanwhile.
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(Errno::BUSY) => match mountinfo::inner(mounts, own) {
            Some(inner) => Err(format!("{} is mounted inside it", inner.at.display())),
            None => Err(holders::users(&used(mounted, Some(own.id), disks))),
        },
        Err(error) => Err(io::Error::from(error).to_string()),
    }
}

fn used(mounted: &Mounted, mount: Option<u64>, disks: &[PathBuf]) -> Used {
    let number = |disk: &PathBuf| std::fs::metadata(disk).ok().map(|disk| DeviceNumber::of(disk.rdev()));
    Used { devices: disks.iter().filter_map(number).chain([mounted.device]).collect(), mount }
}

/// Returns whether a disk stays in use. A mounted disk cannot be opened exclusively, wherever it is mounted.
fn is_in_use(disk: &Path) -> io::Result<bool> {
    let deadline = Instant::now() + FREE_WAIT;
    let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::NONBLOCK | OFlags::CLOEXEC;
    loop {
        match openat(CWD, disk, flags, Mode::empty()) {
            Ok(_) => return Ok(false),
            Err(Errno::BUSY) if Instant::now() >= deadline => return Ok(true),
            Err(Errno::BUSY) => std::thread::sleep(FREE_POLL),
            // The host took it out already.
            Err(Errno::NOENT | Errno::NXIO | Errno::NODEV | Errno::NOMEDIUM) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
    }
}
