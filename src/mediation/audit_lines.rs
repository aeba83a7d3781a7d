//! Lines of an audit log: the last ones, and new ones.
//!
//! A log has two files that are filled alternately: a full one is followed by the other, which is emptied first. So a
//! file that became shorter begins anew, and its new lines come after those of the other file.
//! Guarantees: a reader holds one batch at a time. Files are read by threads that may block.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

use stead_schemas::names::Uid;

use super::AuditFiles;
use crate::host::watch_directories::{DirectoryWatch, DirectoryWatches};

/// Largest part of a file that is read at once, in bytes.
const READ_BYTES: usize = 64 << 10;
/// Largest line, in bytes: a path of 1 KiB, each of its bytes as an escape, and some names of hosts and credentials.
const LINE_BYTES_MAX: usize = 64 << 10;

/// A reader of a log, which follows the log if it was opened so.
#[derive(Debug)]
pub struct AuditLines {
    /// Reader of the files, absent while a thread uses it.
    reader: Option<Reader>,
    watch: Option<DirectoryWatch>,
}

/// A file of the log, and the position in it.
#[derive(Debug)]
struct Part {
    file: File,
    position: u64,
    /// Bytes of an unfinished line.
    rest: Vec<u8>,
}

#[derive(Debug)]
struct Reader {
    logs: AuditFiles,
    owner: Uid,
    /// The files, the one that was filled first in front.
    parts: Vec<Part>,
    /// Number of lines that are left out, because only the last ones were asked for.
    skipped: usize,
}

impl AuditLines {
    /// Opens the log of an owner. Only the last `count` of its lines are returned. The log is followed if `watches` is
    /// given.
    ///
    /// # Errors
    /// Returns an error when there is no such log, or it cannot be read or watched.
    pub async fn open(
        logs: AuditFiles,
        owner: Uid,
        count: usize,
        watches: Option<&DirectoryWatches>,
    ) -> io::Result<Self> {
        // The watch begins before the first read, so that lines written between the two are noticed.
        let watch = watches.map(|watches| watches.watch(logs.directory())).transpose()?;
        let reader = tokio::task::spawn_blocking(move || Reader::open(logs, owner, count));
        Ok(Self { reader: Some(reader.await.map_err(io::Error::other)??), watch })
    }

    /// Returns the next lines, or `None` at the end. A followed log ends when it is removed.
    ///
    /// # Errors
    /// Returns an error when the log cannot be read any more, or an earlier call was cancelled.
    pub async fn next(&mut self) -> io::Result<Option<Vec<String>>> {
        loop {
            let mut reader = self.reader.take().ok_or_else(|| io::Error::other("a read was cut short"))?;
            let read = move || {
                let lines = reader.read_on();
                (lines, reader)
            };
            let (lines, reader) = tokio::task::spawn_blocking(read).await.map_err(io::Error::other)?;
            let exists = reader.logs.exists(&reader.owner)?;
            self.reader = Some(reader);
            let lines = lines?;
            if !lines.is_empty() {
                return Ok(Some(lines));
            }
            match &mut self.watch {
                Some(watch) if exists => {
                    if !watch.changed().await {
                        return Ok(None);
                    }
                }
                _ => return Ok(None),
            }
        }
    }
}

impl Reader {
    fn open(logs: AuditFiles, owner: Uid, count: usize) -> io::Result<Self> {
        if !logs.exists(&owner)? {
            return Err(io::ErrorKind::NotFound.into());
        }
        let parts = |reader: &AuditFiles| -> io::Result<Vec<Part>> {
            let files = reader.read(&owner)?.into_iter();
            Ok(files.map(|file| Part { file, position: 0, rest: Vec::new() }).collect())
        };
        // The lines are counted first: a log is small, and most of its readers want all of it.
        let mut counting =
            Self { parts: parts(&logs)?, logs: logs.clone(), owner: owner.clone(), skipped: 0 };
        let mut all = 0;
        loop {
            match counting.read_on()?.len() {
                0 => break,
                lines => all += lines,
            }
        }
        let parts = parts(&logs)?;
        Ok(Self { parts, logs, owner, skipped: usize::saturating_sub(all, count) })
    }

    /// Reads the following lines. Returns at least one, unless there is none.
    fn read_on(&mut self) -> io::Result<Vec<String>> {
        loop {
            let mut lines = self.read_some()?;
            let is_end = lines.is_empty();
            let left_out = self.skipped.min(lines.len());
            self.skipped -= left_out;
            lines.drain(..left_out);
            if is_end || !lines.is_empty() {
                return Ok(lines);
            }
        }
    }

    fn read_some(&mut self) -> io::Result<Vec<String>> {
        let lines = self.read_parts()?;
        if lines.is_empty() && self.reorder()? { self.read_parts() } else { Ok(lines) }
    }

    /// Reads from the first file that has more.
    fn read_parts(&mut self) -> io::Result<Vec<String>> {
        for part in &mut self.parts {
            let lines = part.read()?;
            if !lines.is_empty() {
                return Ok(lines);
            }
        }
        Ok(Vec::new())
    }

    /// Puts a file that was emptied since behind the other, because it is the newer one now, and adds one that had no line
    /// before. Returns whether there was any.
    fn reorder(&mut self) -> io::Result<bool> {
        let mut is_changed = false;
        for at in (0..self.parts.len()).rev() {
            if self.parts[at].file.metadata()?.len() < self.parts[at].position {
                let mut part = self.parts.remove(at);
                (part.position, part.rest) = (0, Vec::new());
                self.parts.push(part);
                is_changed = true;
            }
        }
        Ok(self.parts.len() < 2 && self.find_new()? || is_changed)
    }

    /// Adds files that got their first line. Returns whether there were any.
    fn find_new(&mut self) -> io::Result<bool> {
        let mut is_found = false;
        for file in self.logs.read(&self.owner)? {
            let inode = file.metadata()?.ino();
            let mut known = Vec::new();
            for part in &self.parts {
                known.push(part.file.metadata()?.ino());
            }
            if !known.contains(&inode) {
                self.parts.push(Part { file, position: 0, rest: Vec::new() });
                is_found = true;
            }
        }
        Ok(is_found)
    }
}

impl Part {
    fn read(&mut self) -> io::Result<Vec<String>> {
        let mut bytes = vec![0; READ_BYTES];
        loop {
            let count = self.file.read_at(&mut bytes, self.position)?;
            if count == 0 {
                return Ok(Vec::new());
            }
            self.position += u64::try_from(count).unwrap_or(u64::MAX);
            self.rest.extend_from_slice(&bytes[..count]);
            if let Some(end) = self.rest.iter().rposition(|&byte| byte == b'\n') {
                let whole: Vec<u8> = self.rest.drain(..=end).collect();
                let lines = whole.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
                return Ok(lines.map(|line| String::from_utf8_lossy(line).into_owned()).collect());
            }
            if self.rest.len() > LINE_BYTES_MAX {
                self.rest.clear();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, SeekFrom, Write};

    use super::*;

    fn owner() -> Uid {
        format!("p{:023}", 0).parse().expect("a uid")
    }

    async fn next(lines: &mut AuditLines) -> Vec<String> {
        lines.next().await.expect("read").unwrap_or_default()
    }

    #[tokio::test]
    async fn the_last_lines_come_in_order_and_new_ones_follow_across_the_files() {
        let scratch = tempfile::tempdir().expect("scratch");
        let logs = AuditFiles::new(scratch.path());
        let watches = DirectoryWatches::default();
        let open = |count, follows: bool| {
            AuditLines::open(logs.clone(), owner(), count, follows.then_some(&watches))
        };
        assert!(open(1, false).await.is_err(), "there is no log");
        let [mut one, mut other] = logs.open(&owner()).expect("opened");
        one.write_all(b"1\n2\n").expect("written");
        assert_eq!(next(&mut open(9, false).await.expect("there")).await, ["1", "2"]);
        let mut lines = open(1, true).await.expect("there");
        assert_eq!(next(&mut lines).await, ["2"]);
        one.write_all(b"3\n").expect("written");
        assert_eq!(next(&mut lines).await, ["3"]);
        // The first file is full, and the other one is filled.
        one.write_all(b"4\n").expect("written");
        other.write_all(b"5\n").expect("written");
        assert_eq!(next(&mut lines).await, ["4"]);
        assert_eq!(next(&mut lines).await, ["5"]);
        // The first one is emptied and filled again.
        one.set_len(0).expect("emptied");
        one.seek(SeekFrom::Start(0)).expect("at the start");
        one.write_all(b"6\n").expect("written");
        assert_eq!(next(&mut lines).await, ["6"]);
        let mut again = open(2, false).await.expect("there");
        assert_eq!([next(&mut again).await, next(&mut again).await].concat(), ["5", "6"]);
        assert!(next(&mut again).await.is_empty());
        logs.remove(&owner()).expect("removed");
        assert_eq!(lines.next().await.expect("read"), None);
    }
}
