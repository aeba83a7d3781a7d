//! Keeps the logs of a VM bounded: a guest can print without end on its console, and make its VMM
//! complain as often.
//!
//! The console's log is rotated by a rename: the file that the VMM has open stays whole under its older
//! name until the VMM opens a new one, so no line is lost or doubled. A watch on the directory notifies of
//! writes, so a silent guest costs nothing.
//! The VMM's own log is its standard error, which it appends to and cannot open anew. That file is emptied
//! in place, and its last lines are kept beside it. A console on the standard output is kept alike.
//! Assumes: a daemon runs. While none does, the log grows to the limit on the VMM's files, the length
//! of its disk, and what is printed beyond is dropped; the next daemon rotates the log at once.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Weak;
use std::time::Duration;

use stead_schemas::quantity::Bytes;

use super::attached::Attached;
use super::record::VmPaths;
use crate::host::watch_directories::DirectoryWatches;

/// Length in bytes at which a VMM's log is emptied. A VMM without problems writes nothing; one line is some
/// hundred bytes.
const VMM_LOG_MAX: Bytes = Bytes(1 << 20);
/// Number of bytes that are kept of a log that is emptied.
const KEPT_BYTES: u64 = 64 << 10;
/// Delay between two checks while a guest prints; it writes a few megabytes in that time at most.
const CHECK_INTERVAL: Duration = Duration::from_millis(100);
/// Delay after a rotation that failed: the VMM is busy, or has ended and this task with it.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// Rotates the log whenever it has reached its limit, as long as the VM is attached.
pub(super) async fn keep_bounded(
    paths: VmPaths,
    max: Bytes,
    watches: DirectoryWatches,
    attached: Weak<Attached>,
) {
    let mut watch = None;
    loop {
        // Before the check: a write between the two is noticed.
        if watch.is_none() {
            watch = watches.watch(paths.logs()).ok();
        }
        let log = paths.vmm_log();
        // A log that cannot be cut is checked again after the next write.
        drop(tokio::task::spawn_blocking(move || cut_if_due(&log, VMM_LOG_MAX)).await);
        let is_bounded = rotate_if_due(&paths, max, &attached).await;
        match is_bounded {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => {
                tracing::warn!(log = %paths.console_log().display(), error, "the console's log was not rotated");
                tokio::time::sleep(RETRY_INTERVAL).await;
                continue;
            }
        }
        let is_watched = match &mut watch {
            Some(watch) => watch.changed().await,
            None => false,
        };
        if is_watched {
            tokio::time::sleep(CHECK_INTERVAL).await;
        } else {
            // The directory is not there: a start in progress makes it, and a deletion ends this task. Or
            // the host allows no more watches.
            watch = None;
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    }
}

/// Empties a log that is longer than this, and keeps its last lines beside it.
fn cut_if_due(log: &Path, max: Bytes) -> io::Result<()> {
    let length = match fs::metadata(log) {
        Ok(meta) if meta.len() > max.0 => meta.len(),
        _ => return Ok(()),
    };
    let file = File::options().read(true).write(true).open(log)?;
    let kept = length.min(KEPT_BYTES);
    let mut last = vec![0; usize::try_from(kept).map_err(io::Error::other)?];
    file.read_exact_at(&mut last, length - kept)?;
    let line_start = last.iter().position(|&byte| byte == b'\n').map_or(0, |end| end + 1);
    fs::write(log.with_extension("log.1"), &last[line_start..])?;
    // The writer appends, so it continues at the start.
    file.set_len(0)
}

/// Rotates the console's log if it is long. Returns false when the VM is no longer attached.
async fn rotate_if_due(paths: &VmPaths, max: Bytes, attached: &Weak<Attached>) -> Result<bool, String> {
    let Some(attached) = attached.upgrade() else { return Ok(false) };
    let log = paths.console_log();
    if !attached.choice.driver.reopens_console() {
        let cut = tokio::task::spawn_blocking(move || cut_if_due(&log, max)).await;
        return cut.map_err(|error| error.to_string())?.map(|()| true).map_err(|error| error.to_string());
    }
    // A log that is missing although its VM lives is that of an earlier rotation that ended half way, which
    // is only finished. Nothing is renamed then: the VMM may create the file at any moment, and an empty file
    // would replace the older log.
    let is_half_done = match fs::metadata(&log) {
        Ok(meta) if meta.len() < max.0 => return Ok(true),
        Ok(_) => false,
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.to_string()),
        Err(_) => {
            let is_rotated = paths.older_console_log().try_exists().map_err(|error| error.to_string())?;
            if !is_rotated {
                return Ok(true);
            }
            true
        }
    };
    let session = attached.session.lock().await;
    let Some(session) = session.as_ref() else { return Err("no connection".to_owned()) };
    if !is_half_done {
        match fs::rename(&log, paths.older_console_log()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.to_string()),
            _ => {}
        }
    }
    session.reopen_console(&log).await?;
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
        let mut vmm = File::options().create(true).append(true).open(&log).expect("made");
        let line = "virtio: bogus descriptor or out of resources\n";
        vmm.write_all(line.as_bytes()).expect("written");
        cut_if_due(&log, VMM_LOG_MAX).expect("checked");
        assert!(!older.exists() && fs::metadata(&log).expect("there").len() > 0, "it is short");
        let many = line.repeat(usize::try_from(VMM_LOG_MAX.0).expect("fits") / line.len() + 1);
        vmm.write_all(many.as_bytes()).expect("written");
        cut_if_due(&log, VMM_LOG_MAX).expect("cut");
        vmm.write_all(b"later\n").expect("written");
        assert_eq!(fs::read(&log).expect("there"), b"later\n");
        let kept = fs::read_to_string(&older).expect("there");
        assert!(kept.len() as u64 > KEPT_BYTES / 2 && kept.lines().all(|kept| line.trim_end() == kept));
    }
}
