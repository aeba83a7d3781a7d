//! The record of one request or tunnel, which becomes an audit line when it ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use jiff::Timestamp;
use stead_schemas::egress::{AuditLine, Decision, Host, Reason, TlsUse};
use stead_schemas::limits::EGRESS_AUDIT_PATH_BYTES_MAX;
use tokio::time::Instant;

use super::AuditLog;

/// Bytes that were transferred.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) up: AtomicU64,
    pub(crate) down: AtomicU64,
}

/// A line that is not complete; it is added to the log when this is dropped, also by a cut.
#[derive(Debug)]
pub(crate) struct Record {
    log: AuditLog,
    began: Instant,
    pub(crate) counts: Arc<Counts>,
    line: AuditLine,
    /// True if the record ends without a line.
    is_discarded: bool,
}

impl Record {
    /// Begins a record of a connection with this number from this port of the guest.
    pub(crate) fn new(log: AuditLog, conn: u64, client_port: u16) -> Self {
        let line = AuditLine {
            time: Timestamp::UNIX_EPOCH,
            conn,
            client_port,
            host: None,
            port: None,
            address: None,
            method: None,
            path: None,
            version: None,
            status: None,
            bytes_up: 0,
            bytes_down: 0,
            ms: 0,
            tls: TlsUse::None,
            decision: Decision::Allowed,
            reason: None,
            credentials: Vec::new(),
            injected: false,
            dropped_before: 0,
        };
        Self { log, began: Instant::now(), counts: Arc::default(), line, is_discarded: false }
    }

    /// Returns the line to be completed.
    pub(crate) fn line(&mut self) -> &mut AuditLine {
        &mut self.line
    }

    /// Notes the destination.
    pub(crate) fn set_destination(&mut self, host: &Host, port: u16) {
        self.line.host = Some(host.clone());
        self.line.port = Some(port);
    }

    /// Notes the path of a request, which must have no query, at most as long as a line may have it.
    pub(crate) fn set_path(&mut self, path: &str) {
        let mut end = path.len().min(EGRESS_AUDIT_PATH_BYTES_MAX);
        while !path.is_char_boundary(end) {
            end -= 1;
        }
        self.line.path = Some(path[..end].to_owned());
    }

    /// Ends the record without a line.
    pub(crate) fn discard(mut self) {
        self.is_discarded = true;
    }

    /// Notes the reason for which the connection or the request failed or was refused.
    pub(crate) fn refuse(&mut self, reason: Reason) {
        self.line.decision = reason.decision();
        self.line.reason = Some(reason);
    }

    /// Notes that an observing policy allowed what would have been refused.
    pub(crate) fn observe(&mut self, reason: Reason) {
        self.line.decision = Decision::Observed;
        self.line.reason = Some(reason);
    }

    /// Notes a reason that is no refusal. The first one stays, unless it only describes the protocol.
    pub(crate) fn note(&mut self, reason: Reason) {
        if self.line.reason.is_none_or(|before| matches!(before, Reason::Opaque | Reason::CredentialNeedsTls))
        {
            self.line.reason = Some(reason);
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if self.is_discarded {
            return;
        }
        self.line.time = Timestamp::now();
        self.line.ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.line.bytes_up = self.counts.up.load(Ordering::Relaxed);
        self.line.bytes_down = self.counts.down.load(Ordering::Relaxed);
        self.log.add(self.line.clone());
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Returns a line without anything that needs a clock.
    pub(in crate::audit) fn line() -> AuditLine {
        let (log, _lines) = AuditLog::new();
        Record::new(log, 1, 2).line().clone()
    }

    #[tokio::test]
    async fn a_record_is_a_line_when_it_is_dropped() {
        let (log, mut lines) = AuditLog::new();
        let mut record = Record::new(log, 7, 4711);
        record.counts.up.fetch_add(5, Ordering::Relaxed);
        record.set_path(&"ä".repeat(EGRESS_AUDIT_PATH_BYTES_MAX));
        record.refuse(Reason::HostNotAllowed);
        record.note(Reason::Idle);
        drop(record);
        let line = lines.next().await.expect("a line");
        assert_eq!((line.conn, line.client_port, line.bytes_up), (7, 4711, 5));
        assert_eq!((line.decision, line.reason), (Decision::Refused, Some(Reason::HostNotAllowed)));
        assert_eq!(line.path.expect("a path").len(), EGRESS_AUDIT_PATH_BYTES_MAX);
        assert!(line.time > Timestamp::UNIX_EPOCH);
    }
}
