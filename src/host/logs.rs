//! Lines of a log that is rotated while it is read: the last ones, and those to come.
//!
//! The rotation this knows: the writer's file is renamed to `NAME.1`, goes on under that name, and
//! ends when the writer opens a new `NAME`. So once a new file is there the old one, kept open here,
//! is read to its end first, and no line is lost or doubled.
//! A reader that falls behind by more than what is kept loses what was let go, and is told so.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::unix::AsyncFd;

use super::process::register;

/// How far back lines are looked for in each of the two files.
const TAIL_BYTES_MAX: u64 = 4 << 20;
/// A longer line comes in pieces.
const LINE_BYTES_MAX: usize = 64 << 10;
/// Of one batch: what a reader holds at a time.
const BATCH_BYTES: usize = 256 << 10;
/// After a change, so that a writer is read in batches and not byte by byte: a console's line takes a
/// millisecond to be written.
const SETTLE: Duration = Duration::from_millis(1);
/// Likewise, of one that goes on and on: it is read less often.
const SETTLE_BUSY: Duration = Duration::from_millis(10);
/// What may be read at the shorter pauses, in the time that it would take at the longer ones.
const BURST: Duration = Duration::from_secs(1);

/// Reads a log, and follows it if asked to.
#[derive(Debug)]
pub struct LogLines {
    path: PathBuf,
    current: Option<File>,
    /// An unfinished line.
    rest: Vec<u8>,
    /// The last lines, until they were handed out.
    tail: Option<VecDeque<String>>,
    watch: Option<AsyncFd<OwnedFd>>,
    /// When all reads so far would be done at the longer pauses.
    paid_until: Instant,
    follows: bool,
}

impl LogLines {
    /// Opens a log; only its last `count` lines are given of what is there already.
    ///
    /// # Errors
    /// When there is no such log.
    pub fn open(path: PathBuf, count: usize, follows: bool) -> io::Result<Self> {
        let watch = if follows { Some(watch(&path)?) } else { None };
        let current = match File::open(&path) {
            Ok(file) => Some(file),
            // Between a rename and the new file.
            Err(error) if error.kind() == io::ErrorKind::NotFound && older(&path).exists() => None,
            Err(error) => return Err(error),
        };
        let paid_until = Instant::now();
        let mut lines = Self { path, current, rest: Vec::new(), tail: None, watch, paid_until, follows };
        lines.read_tail(count)?;
        Ok(lines)
    }

    /// The next lines; `None` at the end, which a followed log has when its directory is removed.
    ///
    /// # Errors
    /// When the log cannot be read any more.
    pub async fn next(&mut self) -> io::Result<Option<Vec<String>>> {
        if let Some(tail) = self.tail.take() {
            return Ok(Some(tail.into()));
        }
        if !self.follows {
            return Ok((!self.rest.is_empty()).then(|| vec![text(&std::mem::take(&mut self.rest))]));
        }
        loop {
            let lines = self.read_on()?;
            if !lines.is_empty() {
                return Ok(Some(lines));
            }
            if self.path.parent().is_none_or(|directory| !directory.exists()) {
                return Ok(None);
            }
            self.wait().await?;
        }
    }

    fn read_tail(&mut self, count: usize) -> io::Result<()> {
        let mut bytes = Vec::new();
        let identity = |file: &File| file.metadata().map(|meta| (meta.dev(), meta.ino()));
        let own = self.current.as_ref().map(identity).transpose()?;
        if let Ok(mut file) = File::open(older(&self.path)) {
            // The one that is open was renamed just now: it is not read twice.
            if Some(identity(&file)?) != own {
                read_end(&mut file, &mut bytes)?;
                if self.current.is_none() {
                    self.current = Some(file);
                }
            }
        }
        if let Some(file) = self.current.as_mut().filter(|_| own.is_some()) {
            read_end(file, &mut bytes)?;
        }
        let mut lines = VecDeque::new();
        self.rest = bytes;
        while let Some(line) = self.take_line() {
            if lines.len() == count {
                lines.pop_front();
            }
            lines.push_back(line);
        }
        if !self.follows && !self.rest.is_empty() {
            if lines.len() == count {
                lines.pop_front();
            }
            lines.push_back(text(&std::mem::take(&mut self.rest)));
        }
        self.tail = Some(lines);
        Ok(())
    }

    /// What was written since, over a rotation too.
    fn read_on(&mut self) -> io::Result<Vec<String>> {
        let mut lines = Vec::new();
        loop {
            // Before the read: what a rotated file still got is then read as well.
            let next = self.successor()?;
            let is_drained = match &mut self.current {
                Some(file) => read_some(file, &mut self.rest)? == 0,
                None => true,
            };
            while let Some(line) = self.take_line() {
                lines.push(line);
            }
            if lines.iter().map(String::len).sum::<usize>() >= BATCH_BYTES {
                return Ok(lines);
            }
            match (is_drained, next) {
                (false, _) => {}
                (true, Some((file, is_gap))) => {
                    self.current = Some(file);
                    if is_gap {
                        lines.push("[stead] lines were let go before they were read".to_owned());
                    }
                }
                (true, None) => return Ok(lines),
            }
        }
    }

    /// The file after the open one, if there is one by now; and whether one between them is gone.
    fn successor(&self) -> io::Result<Option<(File, bool)>> {
        let Ok(newest) = File::open(&self.path) else { return Ok(None) };
        let Some(current) = &self.current else { return Ok(Some((newest, false))) };
        let identity = |file: &File| file.metadata().map(|meta| (meta.dev(), meta.ino()));
        let (own, of_newest) = (identity(current)?, identity(&newest)?);
        if own == of_newest {
            return Ok(None);
        }
        match File::open(older(&self.path)) {
            Ok(before) if identity(&before)? == own => Ok(Some((newest, false))),
            // Two rotations since: the one before the newest comes first.
            Ok(before) if identity(&before)? != of_newest => Ok(Some((before, true))),
            _ => Ok(Some((newest, true))),
        }
    }

    fn take_line(&mut self) -> Option<String> {
        let end = self.rest.iter().take(LINE_BYTES_MAX).position(|&byte| byte == b'\n');
        let length = end.map(|at| at + 1).or((self.rest.len() >= LINE_BYTES_MAX).then_some(LINE_BYTES_MAX))?;
        let line: Vec<u8> = self.rest.drain(..length).collect();
        Some(text(&line))
    }

    async fn wait(&mut self) -> io::Result<()> {
        let Some(watch) = &self.watch else { return Ok(()) };
        let mut ready = watch.readable().await?;
        let now = Instant::now();
        self.paid_until = self.paid_until.max(now) + SETTLE_BUSY;
        let is_busy = self.paid_until.duration_since(now) > BURST;
        tokio::time::sleep(if is_busy { SETTLE_BUSY } else { SETTLE }).await;
        // What happened is seen by looking; the notices are only taken away.
        let mut buffer = [0u8; 4096];
        while rustix::io::read(watch.get_ref(), &mut buffer).is_ok() {}
        ready.clear_ready();
        Ok(())
    }
}

fn older(path: &Path) -> PathBuf {
    path.with_extension("log.1")
}

fn watch(path: &Path) -> io::Result<AsyncFd<OwnedFd>> {
    let queue: OwnedFd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    let directory = path.parent().unwrap_or(Path::new("."));
    let changes = WatchFlags::MODIFY | WatchFlags::CREATE | WatchFlags::MOVE | WatchFlags::DELETE_SELF;
    inotify::add_watch(&queue, directory, changes)?;
    register(queue)
}

/// A line for people: without its end, and with what is no UTF-8 replaced.
fn text(line: &[u8]) -> String {
    String::from_utf8_lossy(line).trim_end_matches(['\n', '\r']).to_owned()
}

fn read_end(file: &mut File, bytes: &mut Vec<u8>) -> io::Result<()> {
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES_MAX)))?;
    file.take(2 * TAIL_BYTES_MAX).read_to_end(bytes)?;
    Ok(())
}

fn read_some(file: &mut File, bytes: &mut Vec<u8>) -> io::Result<usize> {
    let limit = u64::try_from(LINE_BYTES_MAX).unwrap_or(u64::MAX);
    file.take(limit).read_to_end(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

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
        assert!(LogLines::open(log.clone(), 1, false).is_err());
        fs::write(dir.path().join("app.log.1"), "one\r\ntwo").expect("written");
        fs::write(&log, " goes on\nthree\n").expect("written");
        let read = async |count| all(&mut LogLines::open(log.clone(), count, false).expect("there")).await;
        assert_eq!(read(2).await, ["two goes on", "three"]);
        assert_eq!(read(9).await, ["one", "two goes on", "three"]);
    }

    #[tokio::test]
    async fn a_follower_sees_every_line_once_over_rotations_at_any_place() {
        let dir = tempfile::tempdir().expect("scratch");
        let log = dir.path().join("app.log");
        fs::write(&log, "before\n").expect("written");
        let mut lines = LogLines::open(log.clone(), 1, true).expect("there");
        assert_eq!(lines.next().await.expect("read"), Some(vec!["before".to_owned()]));
        let read = Arc::new(AtomicUsize::new(0));
        let of_writer = read.clone();
        let writer = tokio::task::spawn_blocking(move || {
            let mut file = File::options().append(true).open(&log).expect("there");
            for number in 0..2000 {
                let line = format!("line {number}\n");
                let (head, tail) = line.split_at(number % line.len());
                file.write_all(head.as_bytes()).expect("written");
                if number % 300 == 299 {
                    // A reader may fall behind by one file, not by two: it is in this one by now.
                    let deadline = Instant::now() + Duration::from_secs(30);
                    while of_writer.load(Ordering::Relaxed) + 298 < number {
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
        let pieces = all(&mut LogLines::open(log, 9, false).expect("there")).await;
        assert_eq!(
            pieces.iter().map(String::len).collect::<Vec<_>>(),
            [LINE_BYTES_MAX, LINE_BYTES_MAX, LINE_BYTES_MAX, 5]
        );
    }
}
