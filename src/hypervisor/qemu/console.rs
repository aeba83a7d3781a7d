//! Keeps the console's log bounded: a guest prints as much as it likes.
//!
//! Rotation by rename: what QEMU has open stays whole under the older name until it is told to go on
//! in a new file, so no line is lost or doubled. Woken by a watch on the directory: a silent guest costs
//! nothing.
//! Assumes: a daemon runs. While none does the log grows to the limit on the VMM's files, the length
//! of its disk, and what is printed beyond is dropped; the next daemon rotates it at once.

use std::fs;
use std::io;
use std::sync::Weak;
use std::time::Duration;

use stead_schemas::quantity::Bytes;

use super::Attached;
use super::places::Places;
use crate::host::watch_directories::DirectoryWatches;

/// Between two looks while a guest prints; it writes a few megabytes in it at most.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// After a rotation that failed: QEMU is busy, or gone and this task with it.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// Rotates the log whenever it has reached its limit, as long as the VM is attached.
pub(super) async fn keep_bounded(
    places: Places,
    max: Bytes,
    watches: DirectoryWatches,
    attached: Weak<Attached>,
) {
    let mut watch = None;
    loop {
        // Before the look: what is written between the two is noticed.
        if watch.is_none() {
            watch = watches.watch(&places.logs).ok();
        }
        let is_bounded = rotate_if_due(&places, max, &attached).await;
        match is_bounded {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => {
                tracing::warn!(log = %places.console_log().display(), error, "the console's log was not rotated");
                tokio::time::sleep(RETRY_INTERVAL).await;
                continue;
            }
        }
        let is_watched = match &mut watch {
            Some(watch) => watch.changed().await,
            None => false,
        };
        if is_watched {
            tokio::time::sleep(LOOK_INTERVAL).await;
        } else {
            // The directory is not there: a start under way makes it, a deletion ends this task. Or the
            // host allows no more watches.
            watch = None;
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    }
}

/// `false` when the VM is no longer attached.
async fn rotate_if_due(places: &Places, max: Bytes, attached: &Weak<Attached>) -> Result<bool, String> {
    let Some(attached) = attached.upgrade() else { return Ok(false) };
    let log = places.console_log();
    // Not there although its VM lives: an earlier rotation ended half way, and is only finished.
    // Nothing is renamed then: QEMU may make the file late, at any moment, and an empty one would
    // replace the older log.
    let is_half_done = match fs::metadata(&log) {
        Ok(meta) if meta.len() < max.0 => return Ok(true),
        Ok(_) => false,
        Err(_) if !places.older_console_log().exists() => return Ok(true),
        Err(_) => true,
    };
    let monitor = attached.monitor.lock().await;
    let Some(monitor) = monitor.as_ref() else { return Err("no connection".to_owned()) };
    if !is_half_done {
        match fs::rename(&log, places.older_console_log()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.to_string()),
            _ => {}
        }
    }
    monitor.reopen_console(&log).await?;
    Ok(true)
}
