//! The file of each log of an instance, and its lines in the form that the API returns.

use std::io;
use std::path::Path;

use futures::StreamExt;
use stead_schemas::names::Uid;

use crate::api::{LogError, LogStream};
use crate::host::journal;
use crate::host::logs::LogLines;
use crate::host::watch_directories::DirectoryWatches;
use crate::hypervisor::Hypervisors;
use crate::mediation::{AuditFiles, AuditLines};

/// Opens a log; the log is watched only when it is followed.
pub(crate) async fn open(
    data_dir: &Path,
    watches: &DirectoryWatches,
    instance: &Uid,
    source: &str,
    tail: usize,
    follows: bool,
) -> Result<LogStream, LogError> {
    if source == "egress" {
        return audit(data_dir, watches, instance, tail, follows).await;
    }
    let console = Hypervisors::console_log(data_dir, instance);
    let path = match source {
        "app" => console,
        "vmm" => console.with_file_name("vmm.log"),
        "stead" => console.with_file_name(journal::FILE),
        _ => return Err(LogError::Missing),
    };
    let opened = LogLines::open(path, tail, follows.then_some(watches)).await;
    let lines = opened.map_err(unopened)?;
    let batches = futures::stream::unfold(lines, |mut lines| async move {
        // A log that can no longer be read has ended.
        let batch = lines.next().await.ok().flatten()?;
        Some((batch, lines))
    });
    Ok(batches.boxed())
}

fn unopened(error: io::Error) -> LogError {
    match error.kind() {
        io::ErrorKind::NotFound => LogError::Missing,
        _ => LogError::Busy(error.to_string()),
    }
}

/// Opens the audit log of a policy of mediated egress.
async fn audit(
    data_dir: &Path,
    watches: &DirectoryWatches,
    owner: &Uid,
    tail: usize,
    follows: bool,
) -> Result<LogStream, LogError> {
    let logs = AuditFiles::new(data_dir);
    let opened = AuditLines::open(logs, owner.clone(), tail, follows.then_some(watches)).await;
    let batches = futures::stream::unfold(opened.map_err(unopened)?, |mut lines| async move {
        let batch = lines.next().await.ok().flatten()?;
        Some((batch, lines))
    });
    Ok(batches.boxed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_log_that_is_there_and_cannot_be_read_is_busy_and_not_missing() {
        let data = tempfile::tempdir().expect("scratch");
        let instance: Uid = format!("t{:023}", 0).parse().expect("valid");
        let watches = DirectoryWatches::default();
        let open = async || open(data.path(), &watches, &instance, "app", 1, true).await.err();
        assert_eq!(open().await, Some(LogError::Missing));
        let console = Hypervisors::console_log(data.path(), &instance);
        std::fs::create_dir_all(console.parent().expect("a directory")).expect("made");
        std::fs::write(&console, "a line\n").expect("written");
        assert_eq!(open().await, None);
        std::fs::remove_file(&console).expect("removed");
        std::fs::create_dir(&console).expect("made");
        assert!(matches!(open().await, Some(LogError::Busy(_))));
    }
}
