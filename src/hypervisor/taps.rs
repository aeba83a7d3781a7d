//! The TAPs that VMMs are connected to, as the kernel reports them.
//!
//! A descriptor outlives the TAP that it was attached to, and can be attached to another TAP from any process that
//! has a duplicate of it. So a VMM whose TAP was removed is connected to a new one without taking part in that.

use std::fs;
use std::io;
use std::os::fd::RawFd;
use std::path::Path;

use stead_controllers::host::{HostError, HostErrorKind};
use stead_schemas::limits::CARD_QUEUES_MAX;
use stead_schemas::names::LinkName;

use crate::host::process::{Pidfd, of_process};
use crate::host::tap::{Frames, attach_again, attach_queue};

/// Checks that the TAP exists: a VMM would create one without our mark.
pub(crate) fn check_tap(tap: &LinkName) -> Result<(), HostError> {
    match Path::new("/sys/class/net").join(tap.as_str()).try_exists() {
        Ok(true) => Ok(()),
        Ok(false) => Err(HostError::new(HostErrorKind::Missing, "use the TAP", tap.as_str())),
        Err(error) => Err(HostError::io("use the TAP", tap.as_str(), error)),
    }
}

/// Returns whether the process is connected to an interface of this name, and none of its descriptors of TAPs lost
/// its interface.
///
/// # Errors
/// When a descriptor cannot be read: a card that is connected must not be connected again for that.
pub(crate) fn has_tap(pid: u32, tap: &str) -> io::Result<bool> {
    let all = attachments(pid)?;
    Ok(all.iter().any(|(_, interface)| interface == tap) && all.iter().all(|(_, name)| !name.is_empty()))
}

/// Attaches the descriptors of a process that lost their interface to the TAP of this name, whose frames have this form
/// from then on. A process that duplicated its descriptor has the same file under both numbers, which is attached once.
/// A queue that the guest did not use is attached as well. Waits for the kernel's configuration lock.
///
/// # Errors
/// Returns an error when the TAP is in use, or the descriptors of the process are out of reach.
pub(crate) fn attach_lost(pid: u32, process: &Pidfd, tap: &LinkName, frames: Frames) -> io::Result<()> {
    for _ in 0..CARD_QUEUES_MAX {
        let all = attachments(pid)?;
        let Some((number, _)) = all.iter().find(|(_, interface)| interface.is_empty()) else { break };
        let descriptor = process.descriptor(*number)?;
        // The first queue sets the form of the frames.
        if all.iter().any(|(_, interface)| interface == tap.as_str()) {
            attach_queue(descriptor, tap)?;
        } else {
            attach_again(descriptor, tap, frames)?;
        }
    }
    Ok(())
}

/// Lists the descriptors of a process that are or were attached to an interface, with its name. The name is empty
/// if the interface was removed (linux drivers/net/tun.c, `tun_chr_show_fdinfo`).
fn attachments(pid: u32) -> io::Result<Vec<(RawFd, String)>> {
    let mut all = Vec::new();
    let Some(entries) = of_process(fs::read_dir(format!("/proc/{pid}/fdinfo")))? else { return Ok(all) };
    for entry in entries {
        let entry = entry?;
        // A descriptor that was closed meanwhile has no text.
        let text = of_process(fs::read_to_string(entry.path()))?.unwrap_or_default();
        let interface = text.lines().find_map(|line| line.strip_prefix("iff:"));
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        if let (Some(interface), Some(number)) = (interface, number) {
            all.push((number, interface.trim().to_owned()));
        }
    }
    Ok(all)
}
