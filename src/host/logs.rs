//! Lines of a log that is rotated while it is read: the last ones, and new ones.
//!
//! The supported rotation: the writer renames its file to `NAME.1`, continues to write to it, and closes it when it
//! opens a new `NAME`. So when there is a new file, the old one, kept open here, is read to its end first, and no
//! line is lost or doubled. A file that became shorter was truncated and is read from its start.
//! A reader that falls behind by more than the kept files loses the removed lines, and gets a line that reports this.
//!
//! Guarantees: a reader holds one batch at a time, whatever the log contains and however many lines are requested.
//! The work is linear in the bytes that are read. Files are read by threads that may block.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::watch_directories::{DirectoryWatch, DirectoryWatches};

/// Limit on the bytes of each of the two files in which lines are searched from the end.
const TAIL_BYTES_MAX: u64 = 4 << 20;
/// Limit on the length of a line, in bytes. A longer one comes in pieces.
const LINE_BYTES_MAX: usize = 64 << 10;
/// Size of one read, in bytes. A batch of empty lines, the largest possible, then takes a few megabytes.
const READ_BYTES: usize = 64 << 10;
/// Line that is returned where lines are missing.
const GAP: &str = "[stead] lines were let go before they were read";

/// A reader of a log, which follows the log if asked to.
#[derive(Debug)]
pub struct LogLines {
    /// Reader of the files, absent while a thread uses it.
    reader: Option<Reader>,
    watch: Option<DirectoryWatch>,
}

/// The files and the position in them.
#[derive(Debug)]
struct Reader {
    path: PathBuf,
    current: Option<File>,
    position: u64,
    /// Bytes of an unfinished line.
    rest: Vec<u8>,
    /// Number of bytes still to be read of a log that is not followed. Lines written meanwhile are not read.
    left: Option<u64>,
}

impl LogLines {
    /// Opens a log. Only the last `count` of its existing lines are returned. The log is followed if `watches` is
    /// given.
    ///
    /// # Errors
    /// Returns an error when there is no such log, or it cannot be watched.
    pub async fn open(path: PathBuf, count: usize, watches: Option<&DirectoryWatches>) -> io::Result<Self> {
        let directory = path.parent().unwrap_or(Path::new("."));
        // The watch begins before the first read, so that lines written between the two are noticed.
        let watch = watches.map(|watches| watches.watch(directory)).transpose()?;
        let follows = watch.is_some();
        let reader = tokio::task::spawn_blocking(move || Reader::open(path, count, follows));
        Ok(Self { reader: Some(reader.await.map_err(io::Error::other)??), watch })
    }

    /// Returns the next lines, or `None` at the end. A followed log ends when it is removed.
    ///
    /// # Errors
    /// Returns an error when the log cannot be read any more, or an earlier call was cancelled.
    pub async fn next(&mut self) -> io::Result<Option<Vec<String>>> {
        let mut is_over = self.watch.is_none();
        loop {
            let mut reader = self.reader.take().ok_or_else(|| io::Error::other("a read was cut short"))?;
            let read = move || {
                let lines = reader.read_on();
                let is_gone = reader.is_gone();
                (reader, lines, is_gone)
            };
            let (reader, lines, is_gone) =
                tokio::task::spawn_blocking(read).await.map_err(io::Error::other)?;
            self.reader = Some(reader);
            let lines = lines?;
            if !lines.is_empty() {
                return Ok(Some(lines));
            }
            match &mut self.watch {
                Some(watch) if !is_over && !is_gone => is_over = !watch.changed().await,
                _ => return Ok(None),
            }
        }
    }
}

impl Reader {
    fn open(path: PathBuf, count: usize, follows: bool) -> io::Result<Self> {
        let newest = match File::open(&path) {
            Ok(file) => Some(file),
            // This is between a rename and the creation of the new file.
            Err(error) if error.kind() == io::ErrorKind::NotFound && older(&path).exists() => None,
            Err(error) => return Err(error),
        };
        let mut files: Vec<File> = newest.into_iter().collect();
        if let Ok(before) = File::open(older(&path)) {
            // The open file was renamed just now. It is not read twice.
            if files.first().map(identity).transpose()? != Some(identity(&before)?) {
                files.push(before);
            }
        }
        let lengths = files.iter().map(length).collect::<io::Result<Vec<_>>>()?;
        let (at, position) = tail(&files, &lengths, count, follows)?;
        let behind: u64 = lengths.iter().take(at + 1).sum();
        let left = (!follows).then_some(if count == 0 { 0 } else { behind.saturating_sub(position) });
        let current = files.into_iter().nth(at);
        Ok(Self { path, current, position, rest: Vec::new(), left })
    }

    /// Reads the following lines, across a rotation too. Returns at least one line, unless there is none.
    fn read_on(&mut self) -> io::Result<Vec<String>> {
        let mut lines = Vec::new();
        loop {
            // The successor is searched before the read, so that the last lines of a rotated file are read as well.
            let next = self.successor()?;
            let count = self.read_some(&mut lines)?;
            self.take_lines(&mut lines);
            if !lines.is_empty() {
                return Ok(lines);
            }
            match next {
                _ if count > 0 => {}
                Some((file, is_gap)) if self.left != Some(0) => {
                    (self.current, self.position) = (Some(file), 0);
                    if is_gap {
                        lines.push(GAP.to_owned());
                    }
                }
                _ => {
                    if self.left.is_some() && !self.rest.is_empty() {
                        lines.push(text(&std::mem::take(&mut self.rest)));
                    }
                    return Ok(lines);
                }
            }
        }
    }

    /// Reads once. Returns the number of bytes.
    fn read_some(&mut self, lines: &mut Vec<String>) -> io::Result<usize> {
        let Some(file) = &self.current else { return Ok(0) };
        if length(file)? < self.position {
            self.position = 0;
            lines.push(GAP.to_owned());
        }
        let room =
            self.left.map_or(READ_BYTES, |left| usize::try_from(left).unwrap_or(READ_BYTES).min(READ_BYTES));
        let start = self.rest.len();
        self.rest.resize(start + room, 0);
        let count = file.read_at(&mut self.rest[start..], self.position);
        self.rest.truncate(start + count.as_ref().copied().unwrap_or(0));
        let count = count?;
        self.position += count as u64;
        self.left = self.left.map(|left| left.saturating_sub(count as u64));
        Ok(count)
    }

    /// Returns `true` if the file was removed and not replaced.
    fn is_gone(&self) -> bool {
        let is_unnamed = |file: &File| file.metadata().is_ok_and(|meta| meta.nlink() == 0);
        let has_name = self.path.exists() || older(&self.path).exists();
        self.current.as_ref().is_none_or(is_unnamed) && !has_name
    }

    /// Returns the file after the open one, if it exists by now, and `true` if a file between them is gone.
    fn successor(&self) -> io::Result<Option<(File, bool)>> {
        let Ok(newest) = File::open(&self.path) else { return Ok(None) };
        let Some(current) = &self.current else { return Ok(Some((newest, false))) };
        let (own, newest_identity) = (identity(current)?, identity(&newest)?);
        if own == newest_identity {
            return Ok(None);
        }
        match File::open(older(&self.path)) {
            Ok(before) if identity(&before)? == own => Ok(Some((newest, false))),
            // There were two rotations meanwhile: the file before the newest comes first.
            Ok(before) if identity(&before)? != newest_identity => Ok(Some((before, true))),
            _ => Ok(Some((newest, true))),
        }
    }

    /// Takes every line that is complete, or as long as a line may be.
    fn take_lines(&mut self, lines: &mut Vec<String>) {
        let mut taken = 0;
        loop {
            let rest = &self.rest[taken..];
            let end = rest.iter().take(LINE_BYTES_MAX).position(|&byte| byte == b'\n').map(|at| at + 1);
            let length = end.or((rest.len() >= LINE_BYTES_MAX).then_some(LINE_BYTES_MAX));
            let Some(length) = length else { break };
            lines.push(text(&rest[..length]));
            taken += length;
        }
        self.rest.drain(..taken);
    }
}

/// Returns the start of the last lines: the index of the file, the newest first, and the offset in it in bytes.
fn tail(files: &[File], lengths: &[u64], count: usize, follows: bool) -> io::Result<(usize, u64)> {
    // An unfinished line counts as a line, unless its end is still awaited.
    let is_cut = !follows && !ends_a_line(files, lengths)?;
    let mut before = if is_cut { count.saturating_sub(1) } else { count };
    let mut start = (0, 0);
    for (at, (file, &length)) in files.iter().zip(lengths).enumerate() {
        let floor = length.saturating_sub(TAIL_BYTES_MAX);
        let mut lowest = floor;
        let is_found = each_line_end(file, floor, length, |end| {
            lowest = end;
            before = before.checked_sub(1).ok_or(())?;
            Ok(())
        })?;
        start = (at, lowest);
        if is_found || floor > 0 {
            return Ok(start);
        }
        start = (at, 0);
    }
    Ok(start)
}

fn ends_a_line(files: &[File], lengths: &[u64]) -> io::Result<bool> {
    let Some((file, &length)) = files.iter().zip(lengths).find(|(_, length)| **length > 0) else {
        return Ok(true);
    };
    let mut last = [0];
    file.read_exact_at(&mut last, length - 1)?;
    Ok(last == *b"\n")
}

/// Calls `found` with the offset behind each line's end, the last one first, until it returns `true`. Returns `true`
/// if it did.
fn each_line_end(
    file: &File,
    floor: u64,
    length: u64,
    mut found: impl FnMut(u64) -> Result<(), ()>,
) -> io::Result<bool> {
    let mut block = vec![0; READ_BYTES];
    let mut end = length;
    while end > floor {
        let start = end.saturating_sub(READ_BYTES as u64).max(floor);
        let block = &mut block[..usize::try_from(end - start).unwrap_or(READ_BYTES)];
        file.read_exact_at(block, start)?;
        for (at, _) in block.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n') {
            if found(start + at as u64 + 1).is_err() {
                return Ok(true);
            }
        }
        end = start;
    }
    Ok(false)
}

fn identity(file: &File) -> io::Result<(u64, u64)> {
    file.metadata().map(|meta| (meta.dev(), meta.ino()))
}

fn length(file: &File) -> io::Result<u64> {
    file.metadata().map(|meta| meta.len())
}

fn older(path: &Path) -> PathBuf {
    path.with_extension("log.1")
}

/// Returns a line for display: without its end, and with invalid UTF-8 replaced.
fn text(line: &[u8]) -> String {
    String::from_utf8_lossy(line).trim_end_matches(['\n', '\r']).to_owned()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::{Duration, Instant};

    use super::*;

    async fn all(lines: &mut LogLines) -> Vec<String> {
        let mut out = Vec::new();
        while let Some(batch) = lines.next().await.expect("read") {
            out.extend(batch);
        }
        out
    }

    #[tokio::test]
    async fn the_last_lines_reach_over_a_rotation() {
        let dir = tempfile::tempdir().expect("scratch");
        let log = dir.path().join("app.log");
        assert!(LogLines::open(log.clone(), 1, None).await.is_err());
        fs::write(dir.path().join("app.log.1"), "one\r\ntwo").expect("written");
        fs::write(&log, " goes on\nthree\n").expect("written");
        let read =
            async |count| all(&mut LogLines::open(log.clone(), count, None).await.expect("there")).await;
        assert_eq!(read(2).await, ["two goes on", "three"]);
        assert_eq!(read(9).await, ["one", "two goes on", "three"]);
    }

    #[tokio::test]
    async fn a_follower_sees_every_line_once_over_rotations_at_any_offset() {
        let dir = tempfile::tempdir().expect("scratch");
        let log = dir.path().join("app.log");
        fs::write(&log, "before\n").expect("written");
        let mut lines =
            LogLines::open(log.clone(), 1, Some(&DirectoryWatches::default())).await.expect("there");
        assert_eq!(lines.next().await.expect("read"), Some(vec!["before".to_owned()]));
        let read = Arc::new(AtomicUsize::new(0));
        let for_writer = read.clone();
        let writer = tokio::task::spawn_blocking(move || {
            let mut file = File::options().append(true).open(&log).expect("there");
            for number in 0..2000 {
                let line = format!("line {number}\n");
                let (head, tail) = line.split_at(number % line.len());
                file.write_all(head.as_bytes()).expect("written");
                if number % 300 == 299 {
                    // A reader may fall behind by one file, not by two. It has reached this one by now.
                    let deadline = Instant::now() + Duration::from_secs(30);
                    while for_writer.load(Ordering::Relaxed) + 298 < number {
                        assert!(Instant::now() < deadline, "nobody reads");
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    // The console's log writer does the same: the open file continues under its older name.
                    fs::rename(&log, older(&log)).expect("renamed");
                    file.write_all(tail.as_bytes()).expect("written");
                    file = File::options().create(true).append(true).open(&log).expect("made");
                } else {
                    file.write_all(tail.as_bytes()).expect("written");
                }
            }
        });
        let mut seen = Vec::new();
        while seen.len() < 2000 {
            seen.extend(lines.next().await.expect("read").expect("it goes on"));
            read.store(seen.len(), Ordering::Relaxed);
        }
        writer.await.expect("written");
        let expected: Vec<String> = (0..2000).map(|number| format!("line {number}")).collect();
        assert_eq!(seen, expected);
        drop(dir);
        assert_eq!(lines.next().await.expect("ended"), None);
    }

    #[tokio::test]
    async fn a_line_without_an_end_comes_in_pieces() {
        let dir = tempfile::tempdir().expect("scratch");
        let log = dir.path().join("app.log");
        fs::write(&log, vec![b'x'; 3 * LINE_BYTES_MAX + 5]).expect("written");
        let pieces = all(&mut LogLines::open(log, 9, None).await.expect("there")).await;
        assert_eq!(
            pieces.iter().map(String::len).collect::<Vec<_>>(),
            [LINE_BYTES_MAX, LINE_BYTES_MAX, LINE_BYTES_MAX, 5]
        );
    }

    #[tokio::test]
    async fn none_of_the_last_lines_is_nothing_and_followed_only_what_is_new() {
        let dir = tempfile::tempdir().expect("scratch");
        let log = dir.path().join("app.log");
        fs::write(&log, "before\nhalf").expect("written");
        assert!(all(&mut LogLines::open(log.clone(), 0, None).await.expect("there")).await.is_empty());
        let watches = DirectoryWatches::default();
        let mut lines = LogLines::open(log.clone(), 0, Some(&watches)).await.expect("there");
        File::options().append(true).open(&log).expect("there").write_all(b" done\nnew\n").expect("written");
        let mut seen = Vec::new();
        while seen.len() < 2 {
            seen.extend(lines.next().await.expect("read").expect("it goes on"));
        }
        assert_eq!(seen, ["half done", "new"]);
    }

    #[tokio::test]
    async fn a_log_of_line_ends_is_handed_out_in_bounded_batches() {
        let dir = tempfile::tempdir().expect("scratch");
        let log = dir.path().join("app.log");
        for name in ["app.log", "app.log.1"] {
            fs::write(dir.path().join(name), vec![b'\n'; 8 << 20]).expect("written");
        }
        let mut lines = LogLines::open(log, 100_000, None).await.expect("there");
        let mut count = 0;
        while let Some(batch) = lines.next().await.expect("read") {
            assert!(batch.len() <= READ_BYTES);
            count += batch.len();
        }
        assert_eq!(count, 100_000);
    }

    #[tokio::test]
    async fn a_log_that_was_emptied_in_place_is_read_from_its_start() {
        let dir = tempfile::tempdir().expect("scratch");
        let log = dir.path().join("vmm.log");
        fs::write(&log, "one\ntwo\n").expect("written");
        let watches = DirectoryWatches::default();
        let mut lines = LogLines::open(log.clone(), 1, Some(&watches)).await.expect("there");
        assert_eq!(lines.next().await.expect("read"), Some(vec!["two".to_owned()]));
        let file = File::options().append(true).open(&log).expect("there");
        file.set_len(0).expect("emptied");
        (&file).write_all(b"3\n").expect("written");
        let mut seen = Vec::new();
        while seen.last().is_none_or(|line| line != "3") {
            seen.extend(lines.next().await.expect("read").expect("it goes on"));
        }
        assert_eq!(seen, [GAP, "3"]);
    }

    proptest::proptest! {
        #[test]
        fn the_last_lines_are_those_of_the_whole_text(
            before in "[a\n]{0,40}", after in "[a\n]{0,40}", count in 0usize..20,
        ) {
            let dir = tempfile::tempdir().expect("scratch");
            let log = dir.path().join("app.log");
            fs::write(dir.path().join("app.log.1"), &before).expect("written");
            fs::write(&log, &after).expect("written");
            let mut reader = Reader::open(log, count, false).expect("there");
            let mut seen = Vec::new();
            loop {
                match reader.read_on().expect("read") {
                    lines if lines.is_empty() => break,
                    lines => seen.extend(lines),
                }
            }
            let whole = before + &after;
            let all: Vec<&str> = whole.lines().collect();
            proptest::prop_assert_eq!(seen, &all[all.len().saturating_sub(count)..]);
        }
    }
}
