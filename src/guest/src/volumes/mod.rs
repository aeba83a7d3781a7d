//! Volumes: file systems on their own disks, mounted in the program's root at boot and while the program runs.
//!
//! ```text
//! boot:    disks -> composed in the initial root -> switch of the root -> moved to their paths
//! request: difference -> unmounted, inner paths first -> disks free -> composed out of sight -> moved to their paths
//! ```
//! Guarantees: no volume is reported as unmounted while its disk is in use anywhere in the guest. What does not succeed
//! is reported with its reason, and tried again.
//! Never: forces a volume from the processes that use it.

mod difference;
mod follow;
mod holders;
mod mount;
mod mountinfo;
mod recognise;
pub(crate) mod scratch;
#[cfg(test)]
mod tests;
mod unmount;

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::mount::{MountFlags, mount_remount};
use stead_schemas::guest::VolumeMount;

use crate::devices::DeviceNumber;

pub(crate) use self::follow::start;
pub(crate) use self::mount::{mount_all, mount_trees};
pub(crate) use self::recognise::find_mounted;

/// A volume that is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mounted {
    volume: VolumeMount,
    /// The path with all links resolved.
    at: PathBuf,
    /// Number of the mounted file system.
    device: DeviceNumber,
}

/// The mounted volumes, in the order in which they were mounted.
#[derive(Debug, Default)]
struct Registry(Mutex<Vec<Mounted>>);

/// The mounted volumes of this guest.
static MOUNTED: Registry = Registry(Mutex::new(Vec::new()));

impl Registry {
    fn lock(&self) -> MutexGuard<'_, Vec<Mounted>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, mounted: Mounted) {
        self.lock().push(mounted);
    }

    fn remove(&self, mounted: &Mounted) {
        self.lock().retain(|one| one != mounted);
    }

    fn rename(&self, mounted: &Mounted, volume: &VolumeMount) {
        for one in self.lock().iter_mut().filter(|one| *one == mounted) {
            one.volume = volume.clone();
        }
    }

    fn all(&self) -> Vec<Mounted> {
        self.lock().clone()
    }

    /// Returns the mounted volumes, those of a list first and in its order.
    fn volumes(&self, list: &[VolumeMount]) -> Vec<VolumeMount> {
        let mut volumes: Vec<_> = self.lock().iter().map(|one| one.volume.clone()).collect();
        volumes.sort_by_key(|volume| list.iter().position(|one| one == volume).unwrap_or(list.len()));
        volumes
    }
}

/// Remounts the volumes read-only before power-off: they are clean unless a process holds them.
pub(crate) fn settle() {
    for mounted in MOUNTED.all().iter().rev() {
        let _ = mount_remount(&mounted.at, MountFlags::RDONLY, "");
    }
}
