//! The log of the daemon's actions for each instance, beside its console log.
//!
//! Guarantees: the log is bounded by rotation like the console log. A line is whole, dated, bounded and without
//! control characters. The log is removed with the instance's records, and lines about an instance that is being
//! deleted do not create them again. A separate thread writes the lines in the order in which they were reported, so
//! no pass waits for a disk. Lines that cannot be written, or that wait behind too many others, are lost.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use stead_controllers::runtime::{Entry, Journal, Outcome, Subject};
use stead_schemas::instance::Instance;
use stead_schemas::limits::{JOURNAL_LINE_CHARS_MAX, JOURNAL_LOG_MAX};
use stead_schemas::meta::Kind;
use stead_schemas::names::Uid;
use stead_schemas::validate::printable;

use super::files::or_is_there;

/// Name of an instance's log, in the directory of its logs.
pub const FILE: &str = "stead.log";
const OLDER_FILE: &str = "stead.log.1";
/// Limit on lines that wait for a slow disk: some seconds of a busy daemon, a few megabytes.
const WAITING_MAX: usize = 10_000;

/// The writer of the instances' logs.
#[derive(Debug)]
pub struct Journals(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Directory with a subdirectory for each instance.
    logs: PathBuf,
    state: Mutex<State>,
    /// Notification that there is work, or that all work is done.
    moved: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Result of the last pass over each object, so that it is written once. An object has one entry, from its first
    /// report until it is gone.
    ends: BTreeMap<Uid, String>,
    /// Instances that are being deleted. No directory is created for them, whatever is still to be written.
    leaving: BTreeSet<Uid>,
    waiting: VecDeque<Work>,
    lines: usize,
    lost: u64,
    is_writing: bool,
    is_ending: bool,
}

#[derive(Debug)]
enum Work {
    Line {
        instance: Uid,
        line: String,
        may_create: bool,
    },
    /// The instance is gone with all earlier lines. There is at most one of these entries per deletion.
    Forget(Uid),
}

impl Journals {
    /// Begins to write below a directory. Writes the waiting lines and stops when the value is dropped.
    ///
    /// # Errors
    /// Returns an error when the thread cannot be started.
    pub fn new(logs: PathBuf) -> io::Result<Self> {
        let shared = Arc::new(Shared { logs, state: Mutex::default(), moved: Condvar::new() });
        let for_thread = shared.clone();
        std::thread::Builder::new().name("journal".to_owned()).spawn(move || for_thread.write_all())?;
        Ok(Self(shared))
    }

    /// Writes a line about an instance that comes from no pass.
    pub fn note(&self, instance: &Uid, text: &str) {
        self.0.lock().push(instance, &format!("guest: {text}"), false);
        self.0.moved.notify_all();
    }

    /// Waits until all reported lines are written, or until the time limit.
    pub fn flush(&self, at_most: Duration) {
        let deadline = Instant::now() + at_most;
        let mut state = self.0.lock();
        while state.is_writing || !state.waiting.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.0.moved.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Journals {
    fn drop(&mut self) {
        self.0.lock().is_ending = true;
        self.0.moved.notify_all();
    }
}

impl State {
    fn push(&mut self, instance: &Uid, text: &str, may_create: bool) {
        if self.lines >= WAITING_MAX {
            self.lost += 1;
            return;
        }
        let line = format!("{:.3} {}\n", Timestamp::now(), printable(text, JOURNAL_LINE_CHARS_MAX));
        self.lines += 1;
        self.waiting.push_back(Work::Line { instance: instance.clone(), line, may_create });
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_all(&self) {
        loop {
            let mut state = self.lock();
            state.is_writing = false;
            self.moved.notify_all();
            while state.waiting.is_empty() && !state.is_ending {
                state = self.moved.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            let Some(work) = state.waiting.pop_front() else { return };
            let lost = std::mem::take(&mut state.lost);
            state.is_writing = true;
            let (instance, line, may_create) = match work {
                Work::Line { instance, line, may_create } => {
                    state.lines -= 1;
                    let may_create = may_create && !state.leaving.contains(&instance);
                    (instance, line, may_create)
                }
                Work::Forget(instance) => {
                    state.leaving.remove(&instance);
                    continue;
                }
            };
            drop(state);
            if lost > 0 {
                tracing::warn!(lost, "lines of instances' logs were lost: the disk is slow");
            }
            match self.write(&instance, &line, may_create) {
                Ok(()) => {}
                // The instance is gone, and its log with it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => tracing::warn!(%instance, %error, "a line of the instance's log was lost"),
            }
        }
    }

    fn write(&self, instance: &Uid, line: &str, may_create: bool) -> io::Result<()> {
        let directory = self.logs.join(instance.as_str());
        let path = directory.join(FILE);
        let file = match File::options().append(true).open(&path) {
            Ok(file) if file.metadata()?.len() < JOURNAL_LOG_MAX.0 || !may_create => file,
            Ok(_) => {
                fs::rename(&path, directory.join(OLDER_FILE))?;
                create(&path)?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound && may_create => {
                or_is_there(
                    &directory,
                    fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory),
                )?;
                // The instance may have been deleted meanwhile, and its records removed before this created them
                // again.
                if self.lock().leaving.contains(instance) {
                    return fs::remove_dir_all(&directory);
                }
                create(&path)?
            }
            Err(error) => return Err(error),
        };
        (&file).write_all(line.as_bytes())
    }
}

fn create(path: &Path) -> io::Result<File> {
    File::options().append(true).create(true).mode(0o600).open(path)
}

impl Journal for Journals {
    fn report(&self, subject: Subject<'_>, entry: Entry<'_>) {
        let is_instance = subject.kind == Instance::NAME;
        let owner = subject.owner.filter(|owner| owner.kind == Instance::NAME).map(|owner| &owner.uid);
        let Some(instance) = owner.or(is_instance.then_some(subject.uid)) else { return };
        let mut state = self.0.lock();
        let is_leaving = is_instance && !subject.is_desired;
        if is_leaving {
            state.leaving.insert(instance.clone());
        } else if is_instance {
            state.leaving.remove(instance);
        }
        let mut is_gone = false;
        let text = match entry {
            Entry::Acting(action) => action.to_owned(),
            Entry::Note(note) => note.to_owned(),
            Entry::Ended(outcome) => {
                let text = outcome_text(outcome, subject.is_desired);
                is_gone = !subject.is_desired && *outcome == Outcome::Converged;
                let before = if is_gone {
                    state.ends.remove(subject.uid)
                } else {
                    state.ends.insert(subject.uid.clone(), text.clone())
                };
                if before.as_ref() == Some(&text) && !is_gone {
                    return;
                }
                text
            }
        };
        // A directory is created only by passes of the instance itself while it is in the desired state. Lines of
        // other objects create none.
        state.push(instance, &format!("{}: {text}", subject.kind), is_instance && subject.is_desired);
        if is_leaving && is_gone {
            state.waiting.push_back(Work::Forget(instance.clone()));
        }
        drop(state);
        self.0.moved.notify_all();
    }
}

fn outcome_text(outcome: &Outcome, is_desired: bool) -> String {
    match outcome {
        Outcome::Converged if is_desired => "as specified".to_owned(),
        Outcome::Converged => "gone".to_owned(),
        Outcome::Acting => "more steps to take".to_owned(),
        Outcome::Recording(record) => format!("{}, {:?}", record.what, record.reason),
        Outcome::Waiting(wait) => format!("waits, {:?}: {}", wait.reason, wait.message),
        Outcome::Refused(refusal) => format!("refused, {:?}: {}", refusal.reason, refusal.message),
        Outcome::Failed { kind, message, attempt } => {
            format!("failed, {kind:?}, attempt {attempt}: {message}")
        }
    }
}

#[cfg(test)]
mod tests {
    use stead_controllers::runtime::Wait;
    use stead_schemas::condition::Reason;
    use stead_schemas::disk::Disk;
    use stead_schemas::meta::OwnerRef;

    use super::*;

    fn uid(first: char) -> Uid {
        format!("{first}{:023}", 0).parse().expect("a letter and digits")
    }

    struct Fixture {
        journals: Journals,
        logs: tempfile::TempDir,
    }

    impl Fixture {
        fn new() -> Self {
            let logs = tempfile::tempdir().expect("scratch");
            Self { journals: Journals::new(logs.path().to_owned()).expect("a thread"), logs }
        }

        fn report(&self, is_desired: bool, entry: Entry<'_>) {
            let subject = Subject { kind: Instance::NAME, uid: &uid('a'), owner: None, is_desired };
            self.journals.report(subject, entry);
            self.journals.flush(Duration::from_secs(60));
        }

        fn report_disk(&self, entry: Entry<'_>) {
            let owner = OwnerRef { kind: Instance::NAME.to_owned(), uid: uid('a') };
            let uid = uid('d');
            let subject = Subject { kind: Disk::NAME, uid: &uid, owner: Some(&owner), is_desired: true };
            self.journals.report(subject, entry);
            self.journals.flush(Duration::from_secs(60));
        }

        fn file(&self, name: &str) -> PathBuf {
            self.logs.path().join(uid('a').as_str()).join(name)
        }

        /// Returns the lines without their times.
        fn lines(&self) -> Vec<String> {
            let text = fs::read_to_string(self.file(FILE)).unwrap_or_default();
            let undated = |line: &str| {
                let (time, rest) = line.split_once(' ').expect("dated");
                assert!(time.parse::<Timestamp>().is_ok(), "{line}");
                rest.to_owned()
            };
            text.lines().map(undated).collect()
        }
    }

    fn waits() -> Outcome {
        let message = "the image\nis pulled".to_owned();
        Outcome::Waiting(Wait { reason: Reason::WaitingForImage, message, until: None })
    }

    #[test]
    fn steps_and_ends_are_reported_of_the_instance_and_its_objects() {
        let fixture = Fixture::new();
        fixture.report(true, Entry::Ended(&waits()));
        // The same result is not written again.
        fixture.report(true, Entry::Ended(&waits()));
        fixture.report_disk(Entry::Acting("Create"));
        fixture.report(true, Entry::Acting("Launch"));
        fixture.report(true, Entry::Note("Running after Created"));
        fixture.report(true, Entry::Ended(&Outcome::Converged));
        let expected = [
            "instance: waits, WaitingForImage: the image\u{fffd}is pulled",
            "disk: Create",
            "instance: Launch",
            "instance: Running after Created",
            "instance: as specified",
        ];
        assert_eq!(fixture.lines(), expected);
    }

    #[test]
    fn nothing_brings_removed_records_back() {
        let fixture = Fixture::new();
        fixture.report_disk(Entry::Acting("Create"));
        fixture.report(false, Entry::Acting("DiscardRecords"));
        assert!(!fixture.file("").exists(), "neither makes a directory");
        fixture.report(true, Entry::Acting("Launch"));
        fixture.report(false, Entry::Acting("Kill"));
        assert_eq!(fixture.lines(), ["instance: Launch", "instance: Kill"]);
        fs::remove_dir_all(fixture.file("")).expect("removed");
        fixture.report(false, Entry::Ended(&Outcome::Converged));
        fixture.report_disk(Entry::Acting("Remove"));
        assert!(!fixture.file("").exists());
    }

    #[test]
    fn the_log_is_bounded_in_lines_and_in_length() {
        let fixture = Fixture::new();
        let long = "x".repeat(3 * JOURNAL_LINE_CHARS_MAX);
        let count = usize::try_from(JOURNAL_LOG_MAX.0).expect("fits") / JOURNAL_LINE_CHARS_MAX;
        for _ in 0..3 * count {
            fixture.report(true, Entry::Note(&long));
        }
        let longest = u64::try_from(JOURNAL_LINE_CHARS_MAX).expect("fits") + 64;
        for name in [FILE, OLDER_FILE] {
            let length = fs::metadata(fixture.file(name)).expect("there").len();
            assert!(length > 0 && length < JOURNAL_LOG_MAX.0 + longest, "{name} has {length} bytes");
        }
        assert!(fixture.lines().iter().all(|line| line.chars().count() <= JOURNAL_LINE_CHARS_MAX + 32));
    }

    #[test]
    fn what_waits_when_an_instance_is_deleted_does_not_bring_its_records_back() {
        let fixture = Fixture::new();
        // The disk is slow: the writer waits for the reader of a pipe.
        let slow = fixture.logs.path().join(uid('s').as_str());
        fs::create_dir_all(&slow).expect("made");
        rustix::fs::mknodat(rustix::fs::CWD, slow.join(FILE), rustix::fs::FileType::Fifo, 0o600.into(), 0)
            .expect("made");
        let report = |first, is_desired, entry: Entry<'_>| {
            let uid = uid(first);
            fixture
                .journals
                .report(Subject { kind: Instance::NAME, uid: &uid, owner: None, is_desired }, entry);
        };
        report('s', true, Entry::Acting("Launch"));
        for at in 0..2 * WAITING_MAX {
            report('a', true, Entry::Note(&at.to_string()));
        }
        assert!(fixture.journals.0.lock().waiting.len() <= WAITING_MAX, "what waits is bounded");
        report('a', false, Entry::Acting("DiscardRecords"));
        report('a', false, Entry::Ended(&Outcome::Converged));
        let mut read = File::open(slow.join(FILE)).expect("opened");
        io::Read::read(&mut read, &mut [0; 256]).expect("read");
        fixture.journals.flush(Duration::from_secs(60));
        assert!(!fixture.file("").exists());
        assert!(fixture.journals.0.lock().leaving.is_empty());
        // A later object of that name has its own log.
        report('a', true, Entry::Acting("Launch"));
        fixture.journals.flush(Duration::from_secs(60));
        assert_eq!(fixture.lines(), ["instance: Launch"]);
    }
}
