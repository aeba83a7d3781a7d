//! The TAPs that VMMs are connected to, as the kernel reports them.

use std::fs;
use std::io;
use std::path::Path;

use stead_controllers::host::{HostError, HostErrorKind};
use stead_schemas::names::LinkName;

use crate::host::process::of_process;

/// Checks that the TAP exists: a VMM would create one without our mark.
pub(crate) fn check_tap(tap: &LinkName) -> Result<(), HostError> {
    match Path::new("/sys/class/net").join(tap.as_str()).try_exists() {
        Ok(true) => Ok(()),
        Ok(false) => Err(HostError::new(HostErrorKind::Missing, "use the TAP", tap.as_str())),
        Err(error) => Err(HostError::io("use the TAP", tap.as_str(), error)),
    }
}

/// Returns whether a descriptor of the process is attached to an interface of this name. A descriptor whose
/// interface was removed names none (linux drivers/net/tun.c, `tun_chr_show_fdinfo`).
///
/// # Errors
/// When a descriptor cannot be read: a card that is connected must not be connected again for that.
pub(crate) fn has_tap(pid: u32, tap: &str) -> io::Result<bool> {
    let Some(entries) = of_process(fs::read_dir(format!("/proc/{pid}/fdinfo")))? else { return Ok(false) };
    for entry in entries {
        // A descriptor that was closed meanwhile has no text.
        let text = of_process(fs::read_to_string(entry?.path()))?.unwrap_or_default();
        if text.lines().any(|line| line.strip_prefix("iff:").is_some_and(|name| name.trim() == tap)) {
            return Ok(true);
        }
    }
    Ok(false)
}
