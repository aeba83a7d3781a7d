//! Lines of a log that is rotated while it is read: the last ones, and those to come.
//!
//! The rotation this knows: the writer's file is renamed to `NAME.1`, goes on under that name, and
//! ends when the writer opens a new `NAME`. So once a new file is there the old one, kept open here,
//! is read to its end first, and no line is lost or doubled. A file that became shorter was emptied, and
//! is read from its start.
//! A reader that falls behind by more than what is kept loses what was let go, and is told so.
//!
//! Guarantees: a reader holds a batch at a time, whatever is in the log and however many lines are asked
//! for; the work is linear in the bytes that are read; files are read by threads that may wait.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::watch_directories::{DirectoryWatch, DirectoryWatches};

/// How far back lines are looked for in each of the two files.
const TAIL_BYTES_MAX: u64 = 4 << 20;
/// A longer line comes in pieces.
const LINE_BYTES_MAX: usize = 64 << 10;
/// Size of one read, in bytes. With it a batch of empty lines, the most that it can hold, is a few
/// megabytes.
const READ_BYTES: usize = 64 << 10;
/// What is said where lines are missing.
const GAP: &str = "[stead] lines were let go before they were read";

/// Reads a log, and follows it if asked to.
#[derive(Debug)]
pub struct LogLines {
    /// Away while a thread reads.
    reader: Option<Reader>,
    watch: Option<DirectoryWatch>,
}

/// The files and the place in them.
#[derive(Debug)]
struct Reader {
    path: PathBuf,
    current: Option<File>,
    position: u64,
    /// An unfinished line.
    rest: Vec<u8>,
    /// Bytes still to be read of a log that is not followed: what is written meanwhile is not read.
    left: Option<u64>,
}

impl LogLines {
    /// Opens a log; only its last `count` lines are given of what is there already. It is followed when
    /// there is something to watch it with.
    ///
    /// # Errors
    /// When there is no such log, or it cannot be watched.
    pub async fn open(path: PathBuf, count: usize, watches: Option<&DirectoryWatches>) -> io::Result<Self> {
        let directory = path.parent().unwrap_or(Path::new("."));
        // Before the first read: what is written between the two is noticed.
        let watch = watches.map(|watches| watches.watch(directory)).transpose()?;
        let follows = watch.is_some();
        let reader = tokio::task::spawn_blocking(move || Reader::open(path, count, follows));
        Ok(Self { reader: Some(reader.await.map_err(io::Error::other)??), watch })
    }

    /// The next lines; `None` at the end, which a followed log has when it is removed.
    ///
    /// # Errors
    /// When the log cannot be read any more, or an earlier call was cut short.
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
            // Between a rename and the new file.
            Err(error) if error.kind() == io::ErrorKind::NotFound && older(&path).exists() => None,
            Err(error) => return Err(error),
        };
        let mut files: Vec<File> = newest.into_iter().collect();
        if let Ok(before) = File::open(older(&path)) {
            // The one that is open was renamed just now: it is not read twice.
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

    /// What follows, over a rotation too: at least a line, unless there is none.
    fn read_on(&mut self) -> io::Result<Vec<String>> {
        let mut lines = Vec::new();
        loop {
            // Before the read: what a rotated file still got is then read as well.
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

    /// Reads once; the number of bytes.
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

    /// Removed, and no other has taken its place.
    fn is_gone(&self) -> bool {
        let is_unnamed = |file: &File| file.metadata().is_ok_and(|meta| meta.nlink() == 0);
        let has_name = self.path.exists() || older(&self.path).exists();
        self.current.as_ref().is_none_or(is_unnamed) && !has_name
    }

    /// The file after the open one, if there is one by now; and whether one between them is gone.
    fn successor(&self) -> io::Result<Option<(File, bool)>> {
        let Ok(newest) = File::open(&self.path) else { return Ok(None) };
        let Some(current) = &self.current else { return Ok(Some((newest, false))) };
        let (own, newest_identity) = (identity(current)?, identity(&newest)?);
        if own == newest_identity {
            return Ok(None);
        }
        match File::open(older(&self.path)) {
            Ok(before) if identity(&before)? == own => Ok(Some((newest, false))),
            // Two rotations since: the one before the newest comes first.
            Ok(before) if identity(&before)? != newest_identity => Ok(Some((before, true))),
            _ => Ok(Some((newest, true))),
        }
    }

    /// Takes every line that is whole, or as long as one may be.
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

/// Where the last lines begin: in which of the files, the newest first, and at which byte of it.
fn tail(files: &[File], lengths: &[u64], count: usize, follows: bool) -> io::Result<(usize, u64)> {
    // An unfinished line is one of the lines, unless its end is still waited for.
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

/// Calls `found` with the byte behind every line's end, the last one first, until it says that it has
/// enough; whether it did.
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

/// A line for people: without its end, and with what is no UTF-8 replaced.
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
    async fn a_follower_sees_every_line_once_over_rotations_at_any_place() {
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
                    // A reader may fall behind by one file, not by two: it is in this one by now.
                    let deadline = Instant::now() + Duration::from_secs(30);
                    while for_writer.load(Ordering::Relaxed) + 298 < number {
                        assert!(Instant::now() < deadline, "nobody reads");
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    // As the console's keeper does it: the open file goes on under its older name.
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
