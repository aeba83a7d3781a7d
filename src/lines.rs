//! Lines that are written by a separate thread: the sender of a line never waits for its reader.
//!
//! Guarantees: memory is bounded; a line that finds no room is left out and counted, and the count is
//! reported.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use tracing_subscriber::fmt::MakeWriter;

/// Largest number of lines that wait to be written; a line is a few hundred bytes.
const WAITING_MAX: usize = 4096;
/// Longest line, in bytes; longer lines are cut, because a person reads them.
const LINE_BYTES_MAX: usize = 64 << 10;

/// Time between two polls of whether there is room again.
const FLUSH_POLL_INTERVAL: Duration = Duration::from_millis(5);

enum Word {
    Line(Vec<u8>),
    /// A request for an answer once everything before it is written.
    Flush(SyncSender<()>),
}

/// The sending end; clones share the thread.
#[derive(Clone)]
pub(crate) struct Lines {
    words: SyncSender<Word>,
    left_out: Arc<AtomicU64>,
}

impl std::fmt::Debug for Lines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lines").field("left_out", &self.left_out).finish_non_exhaustive()
    }
}

/// The receiving end.
pub(crate) trait Sink: Send + 'static {
    fn write(&mut self, line: &[u8]);
    /// Returns the line that reports how many lines were left out.
    fn missing(count: u64) -> Vec<u8>;
}

impl Lines {
    /// Starts a thread of this name, which ends with the last clone.
    ///
    /// # Errors
    /// Fails when the system cannot start a thread.
    pub(crate) fn new(name: &str, sink: impl Sink) -> io::Result<Self> {
        let (words, waiting) = sync_channel(WAITING_MAX);
        let left_out = Arc::<AtomicU64>::default();
        let for_thread = left_out.clone();
        std::thread::Builder::new().name(name.to_owned()).spawn(move || take(&waiting, &for_thread, sink))?;
        Ok(Self { words, left_out })
    }

    /// Queues a line, with its end, or leaves it out.
    pub(crate) fn push(&self, mut line: Vec<u8>) {
        if line.len() > LINE_BYTES_MAX {
            line.truncate(LINE_BYTES_MAX);
            line.push(b'\n');
        }
        if self.words.try_send(Word::Line(line)).is_err() {
            self.left_out.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits until all lines so far are written, but no longer than `at_most`. Blocks.
    pub(crate) fn flush(&self, at_most: Duration) {
        let deadline = Instant::now() + at_most;
        let (done, is_done) = sync_channel(1);
        let mut word = Word::Flush(done);
        while let Err(TrySendError::Full(back)) = self.words.try_send(word) {
            if Instant::now() >= deadline {
                return;
            }
            std::thread::sleep(FLUSH_POLL_INTERVAL);
            word = back;
        }
        let _ = is_done.recv_timeout(deadline.saturating_duration_since(Instant::now()));
    }
}

fn take<Target: Sink>(waiting: &Receiver<Word>, left_out: &AtomicU64, mut sink: Target) {
    while let Ok(word) = waiting.recv() {
        match word {
            Word::Line(line) => sink.write(&line),
            Word::Flush(done) => drop(done.try_send(())),
        }
        match left_out.swap(0, Ordering::Relaxed) {
            0 => {}
            count => sink.write(&Target::missing(count)),
        }
    }
}

/// The standard error of this process.
#[derive(Debug)]
pub(crate) struct StandardError;

impl Sink for StandardError {
    fn write(&mut self, line: &[u8]) {
        // A failure cannot be reported anywhere.
        let _ = io::Write::write_all(&mut io::stderr(), line);
    }

    fn missing(count: u64) -> Vec<u8> {
        format!("stead: {count} lines of this log were left out: they were not read in time\n").into_bytes()
    }
}

/// An event of the log, which is written as a whole.
#[derive(Debug)]
pub(crate) struct Event<'a> {
    lines: &'a Lines,
    bytes: Vec<u8>,
}

impl io::Write for Event<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Event<'_> {
    fn drop(&mut self) {
        if !self.bytes.is_empty() {
            self.lines.push(std::mem::take(&mut self.bytes));
        }
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Event<'a>;

    fn make_writer(&'a self) -> Event<'a> {
        Event { lines: self, bytes: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, mpsc};

    use super::*;

    /// A sink that writes nothing until it is allowed to.
    struct Stuck {
        is_let: Receiver<()>,
        written: Arc<Mutex<Vec<Vec<u8>>>>,
    }

    impl Sink for Stuck {
        fn write(&mut self, line: &[u8]) {
            // The end of the other side allows all further writes.
            let _ = self.is_let.recv();
            self.written.lock().expect("not poisoned").push(line.to_vec());
        }

        fn missing(count: u64) -> Vec<u8> {
            format!("{count} missing").into_bytes()
        }
    }

    #[test]
    fn who_speaks_never_waits_and_what_was_left_out_is_counted() {
        let (let_go, is_let) = mpsc::channel();
        let written = Arc::<Mutex<Vec<Vec<u8>>>>::default();
        let lines = Lines::new("stuck", Stuck { is_let, written: written.clone() }).expect("a thread");
        // The call returns although nothing is written.
        let waiting = WAITING_MAX + 100;
        (0..waiting).for_each(|number| lines.push(number.to_string().into_bytes()));
        lines.flush(Duration::ZERO);
        drop(let_go);
        lines.flush(Duration::from_secs(60));
        let written = written.lock().expect("not poisoned");
        let missing: Vec<String> = written
            .iter()
            .filter_map(|line| String::from_utf8_lossy(line).strip_suffix(" missing").map(ToOwned::to_owned))
            .collect();
        let count: usize = missing.iter().map(|count| count.parse::<usize>().expect("a number")).sum();
        // A line may be in progress while the others wait.
        assert!((99..=100).contains(&count), "{missing:?}");
        assert_eq!(written.len() - missing.len() + count, waiting);
    }
}
