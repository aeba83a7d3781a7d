//! The audit log of an instance: a bounded queue of lines, and the records that fill it.
//!
//! Guarantees: no connection waits for the log; a line that finds the queue full is dropped and counted; the
//! next line that is written has the count.

mod files;
mod record;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use stead_schemas::egress::AuditLine;
use stead_schemas::limits::EGRESS_AUDIT_QUEUE_MAX;
use tokio::sync::mpsc;

pub use files::LogFiles;
pub(crate) use record::{Counts, Record};

/// Number of lines that are written together: one write for all that waited.
const BATCH: usize = 256;

/// The end of an audit log that takes lines; clones share the queue.
#[derive(Debug, Clone)]
pub struct AuditLog {
    lines: mpsc::Sender<AuditLine>,
    dropped: Arc<AtomicU64>,
}

/// The end of an audit log that has the lines.
#[derive(Debug)]
pub struct AuditLines {
    lines: mpsc::Receiver<AuditLine>,
    dropped: Arc<AtomicU64>,
}

impl AuditLog {
    /// Creates both ends.
    #[must_use]
    pub fn new() -> (Self, AuditLines) {
        let (sender, receiver) = mpsc::channel(EGRESS_AUDIT_QUEUE_MAX);
        let dropped = Arc::<AtomicU64>::default();
        (Self { lines: sender, dropped: dropped.clone() }, AuditLines { lines: receiver, dropped })
    }

    /// Creates a log that a task writes to the files, until all clones of the log are dropped.
    #[must_use]
    pub fn to_files(files: LogFiles) -> Self {
        let (log, lines) = Self::new();
        tokio::spawn(lines.write(files));
        log
    }

    /// Takes a line, or drops and counts it when too many wait.
    pub(crate) fn add(&self, line: AuditLine) {
        if self.lines.try_send(line).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl AuditLines {
    /// Returns the next line, or `None` when all clones of the log are dropped and no line is left.
    pub async fn next(&mut self) -> Option<AuditLine> {
        let mut line = self.lines.recv().await?;
        line.dropped_before = self.dropped.swap(0, Ordering::Relaxed);
        Some(line)
    }

    /// Writes lines to the files until all clones of the log are dropped.
    async fn write(mut self, mut files: LogFiles) {
        let mut batch = Vec::new();
        while self.lines.recv_many(&mut batch, BATCH).await > 0 {
            let mut lines = std::mem::take(&mut batch);
            if let Some(first) = lines.first_mut() {
                first.dropped_before = self.dropped.swap(0, Ordering::Relaxed);
            }
            let written = tokio::task::spawn_blocking(move || {
                let result = files.append(&lines);
                (files, result)
            });
            let Ok((back, result)) = written.await else { return };
            files = back;
            if let Err(error) = result {
                tracing::warn!(%error, "cannot write an audit log");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::record::tests::line;
    use super::*;

    #[tokio::test]
    async fn lines_reach_the_files() {
        let (one, other) = (tempfile::tempfile().expect("a file"), tempfile::tempfile().expect("a file"));
        let reader = one.try_clone().expect("cloned");
        let log = AuditLog::to_files(LogFiles::new(one, other).expect("opened"));
        for conn in 0..500 {
            log.add(AuditLine { conn, ..line() });
        }
        let mut text = String::new();
        while text.lines().count() < 500 {
            tokio::task::yield_now().await;
            text.clear();
            let length = reader.metadata().expect("known").len();
            let mut bytes = vec![0; usize::try_from(length).expect("small")];
            reader.read_exact_at(&mut bytes, 0).expect("read");
            text.push_str(std::str::from_utf8(&bytes).expect("text"));
        }
        let numbers: Vec<u64> =
            text.lines().map(|line| serde_json::from_str::<AuditLine>(line).expect("a line").conn).collect();
        assert_eq!(numbers, (0..500).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn lines_beyond_the_queue_are_dropped_and_counted() {
        let (log, mut lines) = AuditLog::new();
        for _ in 0..EGRESS_AUDIT_QUEUE_MAX + 3 {
            log.add(line());
        }
        assert_eq!(lines.next().await.map(|line| line.dropped_before), Some(3));
        log.add(line());
        drop(log);
        let mut count = 0;
        while let Some(line) = lines.next().await {
            assert_eq!(line.dropped_before, 0);
            count += 1;
        }
        assert_eq!(count, EGRESS_AUDIT_QUEUE_MAX);
    }
}
