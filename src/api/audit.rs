//! The audit log: who requested which change, from where, and with what result; one JSON object a line.
//!
//! Guarantees: the log is kept in `DATA/audit/audit.log`, readable only by its owner, with a bounded number
//! of files before it; no request waits for it; lines that could not be kept are counted in it; a client
//! that leaves before its response is in it. Requests that were refused before anything was done, such as
//! requests without a token, are in `DATA/audit/refused.log`: a flood there does not push out the record of
//! what was done.
//! Never: contains a body, a token or a header.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::json;
use stead_schemas::limits::{AUDIT_FILES_MAX, AUDIT_LOG_MAX, MESSAGE_CHARS_MAX};
use stead_schemas::validate::printable;

use super::auth::Bearer;
use super::client::Client;
use crate::lines::{Lines, Sink};

/// Time for writing the last lines when the daemon ends.
const FLUSH_MAX: Duration = Duration::from_secs(1);

/// Status of a request whose client left before it was answered.
const CLIENT_LEFT: u16 = 499;
/// Status of a request whose handler panicked.
const FAILED: u16 = 500;

/// The log; clones write to the same one.
#[derive(Debug, Clone, Default)]
pub struct Audit(Option<Logs>);

/// The two logs.
#[derive(Debug, Clone)]
struct Logs {
    admitted: Lines,
    refused: Lines,
}

/// A request in progress, which is recorded when this is dropped at the latest.
#[derive(Debug)]
pub(super) struct Record<'a> {
    audit: &'a Audit,
    pub(super) entry: Entry,
    began: Instant,
    /// True if the request was passed to its handler.
    pub(super) is_admitted: bool,
    status: Option<u16>,
}

impl<'a> Record<'a> {
    pub(super) fn new(audit: &'a Audit, entry: Entry) -> Self {
        Self { audit, entry, began: Instant::now(), is_admitted: false, status: None }
    }

    /// Records the request with the status of its response.
    pub(super) fn end(mut self, status: StatusCode) {
        self.status = Some(status.as_u16());
    }
}

impl Drop for Record<'_> {
    fn drop(&mut self) {
        let unanswered = if std::thread::panicking() { FAILED } else { CLIENT_LEFT };
        self.entry.status = self.status.unwrap_or(unanswered);
        self.entry.millis = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.audit.report(&self.entry, self.is_admitted);
    }
}

/// A line of the log: one request.
#[derive(Debug, Serialize)]
pub(super) struct Entry {
    time: jiff::Timestamp,
    /// Subject of the token, or `uid:` and the number of a user who needs none; absent, like the token's id, when the
    /// token was not valid.
    #[serde(skip_serializing_if = "Option::is_none")]
    subject: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<String>,
    /// Address of the client; `null` for a process of this host that used a Unix socket.
    client: Option<IpAddr>,
    /// User and process of such a client, as the kernel reports them.
    #[serde(skip_serializing_if = "Option::is_none")]
    uid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<i32>,
    verb: String,
    route: String,
    /// The path and query of the request, with the ids or names of objects.
    object: String,
    /// The name in the request's body, of the object to be created.
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    status: u16,
    millis: u64,
}

fn cut(text: &str) -> String {
    printable(text, MESSAGE_CHARS_MAX)
}

impl Entry {
    pub(super) fn new(client: Option<&Client>, verb: &str, route: &str, object: &str) -> Self {
        let (client, uid, pid) = match client {
            Some(Client::Network(address)) => (Some(*address), None, None),
            Some(Client::Local(peer)) => (None, Some(peer.uid), peer.pid),
            None => (None, None, None),
        };
        Self {
            time: jiff::Timestamp::now(),
            subject: None,
            token: None,
            client,
            uid,
            pid,
            verb: verb.to_owned(),
            route: route.to_owned(),
            object: cut(object),
            name: None,
            status: 0,
            millis: 0,
        }
    }

    pub(super) fn by(&mut self, bearer: &Bearer) {
        self.subject = Some(cut(&bearer.subject));
        self.token = bearer.token.as_deref().map(cut);
    }

    pub(super) fn of(&mut self, body: &[u8]) {
        #[derive(Deserialize)]
        struct Named {
            name: Option<String>,
        }
        self.name =
            serde_json::from_slice::<Named>(body).ok().and_then(|body| body.name).map(|name| cut(&name));
    }
}

impl Audit {
    /// Continues the log of a data directory.
    ///
    /// # Errors
    /// Fails when the log cannot be opened: a daemon that cannot record who did what does not start.
    pub fn open(directory: &Path) -> io::Result<Self> {
        let directory = directory.join("audit");
        crate::store::private_directory(&directory)?;
        let log = |name: &str| {
            let path = directory.join(format!("{name}.log"));
            let file = append(&path)?;
            let size = file.metadata()?.len();
            Lines::new(name, Files { path, file: Some(file), size })
        };
        Ok(Self(Some(Logs { admitted: log("audit")?, refused: log("refused")? })))
    }

    fn report(&self, entry: &Entry, is_admitted: bool) {
        let Some(logs) = &self.0 else { return };
        if let Ok(mut line) = serde_json::to_vec(entry) {
            line.push(b'\n');
            let log = if is_admitted { &logs.admitted } else { &logs.refused };
            log.push(line);
        }
    }

    /// Waits until the lines so far are written. Blocks briefly.
    pub fn flush(&self) {
        if let Some(logs) = &self.0 {
            logs.admitted.flush(FLUSH_MAX);
            logs.refused.flush(FLUSH_MAX);
        }
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

/// The file that is written to, and the older ones: `audit.log.1` is the newest of those.
struct Files {
    path: PathBuf,
    /// The open file; absent after a failure, and the next line tries again.
    file: Option<File>,
    size: u64,
}

impl Files {
    fn try_write(&mut self, line: &[u8]) -> io::Result<()> {
        if self.size >= AUDIT_LOG_MAX.0 {
            self.rotate()?;
        }
        if self.file.is_none() {
            let file = append(&self.path)?;
            self.size = file.metadata()?.len();
            self.file = Some(file);
        }
        if let Some(file) = &mut self.file {
            file.write_all(line)?;
        }
        self.size += line.len() as u64;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        self.file = None;
        let older = |number: u32| {
            let mut path = self.path.clone().into_os_string();
            path.push(format!(".{number}"));
            PathBuf::from(path)
        };
        for number in (1..AUDIT_FILES_MAX).rev() {
            let from = if number == 1 { self.path.clone() } else { older(number - 1) };
            match fs::rename(from, older(number)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

impl Sink for Files {
    fn write(&mut self, line: &[u8]) {
        if let Err(error) = self.try_write(line) {
            self.file = None;
            tracing::error!(%error, "a line of the audit log is lost");
        }
    }

    fn missing(count: u64) -> Vec<u8> {
        format!("{}\n", json!({"time": jiff::Timestamp::now(), "left_out": count})).into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_log_is_bounded_and_its_owners_only() {
        let scratch = tempfile::tempdir().expect("scratch");
        drop(Audit::open(scratch.path()).expect("opened"));
        let path = scratch.path().join("audit/audit.log");
        let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(&scratch.path().join("audit"))), (0o600, 0o700));
        let mut files = Files { path: path.clone(), file: None, size: 0 };
        let line = vec![b'x'; usize::try_from(AUDIT_LOG_MAX.0).expect("small")];
        for _ in 0..AUDIT_FILES_MAX + 3 {
            files.try_write(&line).expect("written");
        }
        let is_of_log = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().starts_with("audit.log");
        let all = fs::read_dir(scratch.path().join("audit")).expect("there").flatten();
        let count = all.filter(is_of_log).count();
        assert_eq!(count, AUDIT_FILES_MAX as usize);
        assert_eq!(mode(&path.with_file_name("audit.log.1")), 0o600);
    }
}
