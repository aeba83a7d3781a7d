//! Keeps the logs of a VM bounded: a guest prints as much as it likes on its console, and can make its VMM
//! complain as often.
//!
//! Rotation by rename: what QEMU has open stays whole under the older name until it is told to go on
//! in a new file, so no line is lost or doubled. Woken by a watch on the directory: a silent guest costs
//! nothing.
//! The VMM's own log is what it has for standard error, which it appends to and cannot be told to open
//! anew: that is emptied in place, and its last lines are kept beside it.
//! Assumes: a daemon runs. While none does the log grows to the limit on the VMM's files, the length
//! of its disk, and what is printed beyond is dropped; the next daemon rotates it at once.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Weak;
use std::time::Duration;

use stead_schemas::quantity::Bytes;

use super::Attached;
use super::places::Places;
use crate::host::watch_directories::DirectoryWatches;

/// A VMM that is well says nothing; one line of its complaints is some hundred bytes.
const VMM_LOG_MAX: Bytes = Bytes(1 << 20);
/// Number of bytes that are kept of a VMM's log that is emptied.
const VMM_LOG_KEPT: usize = 64 << 10;
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
        let log = places.vmm_log();
        // A log that cannot be cut is looked at again after the next write.
        drop(tokio::task::spawn_blocking(move || cut_if_due(&log)).await);
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

/// Empties the VMM's log when it is long.
fn cut_if_due(log: &Path) -> io::Result<()> {
    let length = match fs::metadata(log) {
        Ok(meta) if meta.len() > VMM_LOG_MAX.0 => meta.len(),
        _ => return Ok(()),
    };
    let file = File::options().read(true).write(true).open(log)?;
    let mut last = vec![0; VMM_LOG_KEPT];
    file.read_exact_at(&mut last, length - VMM_LOG_KEPT as u64)?;
    let of_line = last.iter().position(|&byte| byte == b'\n').map_or(0, |end| end + 1);
    fs::write(log.with_extension("log.1"), &last[of_line..])?;
    // Whoever writes appends: it goes on at the start.
    file.set_len(0)
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
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.to_string()),
        Err(_) => {
            let is_rotated = places.older_console_log().try_exists().map_err(|error| error.to_string())?;
            if !is_rotated {
                return Ok(true);
            }
            true
        }
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

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_vmms_log_is_emptied_in_place_and_its_last_lines_are_kept() {
        let dir = tempfile::tempdir().expect("scratch");
        let (log, older) = (dir.path().join("vmm.log"), dir.path().join("vmm.log.1"));
        let mut of_vmm = File::options().create(true).append(true).open(&log).expect("made");
        let line = "virtio: bogus descriptor or out of resources\n";
        of_vmm.write_all(line.as_bytes()).expect("written");
        cut_if_due(&log).expect("looked at");
        assert!(!older.exists() && fs::metadata(&log).expect("there").len() > 0, "it is short");
        let many = line.repeat(usize::try_from(VMM_LOG_MAX.0).expect("fits") / line.len() + 1);
        of_vmm.write_all(many.as_bytes()).expect("written");
        cut_if_due(&log).expect("cut");
        of_vmm.write_all(b"later\n").expect("written");
        assert_eq!(fs::read(&log).expect("there"), b"later\n");
        let kept = fs::read_to_string(&older).expect("there");
        assert!(kept.len() > VMM_LOG_KEPT / 2 && kept.lines().all(|kept| line.trim_end() == kept));
    }
}
