//! The TAPs that VMMs are plugged into, as the kernel tells of them.

use std::fs;
use std::path::Path;

use stead_controllers::host::{HostError, HostErrorKind};
use stead_schemas::names::LinkName;

/// The TAP must be there: QEMU would make one without our mark.
pub(super) fn check_tap(tap: &LinkName) -> Result<(), HostError> {
    if Path::new("/sys/class/net").join(tap.as_str()).exists() {
        return Ok(());
    }
    Err(HostError::new(HostErrorKind::Missing, "use the TAP", tap.as_str()))
}

/// One of the process's descriptors is attached to an interface of this name. A descriptor whose
/// interface was removed names none (linux drivers/net/tun.c, `tun_chr_show_fdinfo`).
pub(super) fn has_tap(pid: u32, tap: &str) -> bool {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fdinfo")) else { return false };
    entries.flatten().any(|entry| {
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        text.lines().any(|line| line.strip_prefix("iff:").is_some_and(|name| name.trim() == tap))
    })
}
