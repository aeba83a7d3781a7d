//! Composes a volume while the program runs: in a mount namespace of its own, which no process of the guest sees.
//!
//! The kernel moves a detached tree into any mount namespace of the same user namespace, so the tree can leave the one
//! in which it was composed.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::thread;

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use stead_schemas::guest::VolumeMount;

use super::mount::{self, Devices};
use crate::BootError;

/// A directory that every root has, and that nothing needs while a volume is composed.
const SCRATCH: &str = "/sys";

/// Mounts the file systems of a volume in a thread with a mount namespace of its own. It ends with the thread.
pub(super) fn compose(devices: &Devices, volume: &VolumeMount) -> Result<OwnedFd, BootError> {
    let failed = |what: &str| BootError::new("volumes", what);
    let work = || {
        own_namespace().map_err(|error| failed(&format!("scratch directory: {error}")))?;
        mount::compose(Path::new(SCRATCH), devices, volume)
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("volume".to_owned()).spawn_scoped(scope, work);
        let thread = thread.map_err(|error| failed(&error.to_string()))?;
        thread.join().unwrap_or_else(|_| Err(failed("its thread failed")))
    })
}

/// Gives this thread a mount namespace of its own with a scratch directory.
#[expect(unsafe_code, reason = "there is no other way to a namespace of a thread")]
pub(crate) fn own_namespace() -> rustix::io::Result<()> {
    // SAFETY: the thread goes on sharing its descriptors with the others.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    mount("volume", SCRATCH, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, Some(c"mode=0700"))
}
