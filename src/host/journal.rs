//! The log that each instance has of what the daemon does for it, beside its console's.
//!
//! Guarantees: bounded by rotation as the console's log is; a line is whole, dated, bounded and
//! without control characters; it goes with the instance's records, and nothing told of one that is
//! being deleted brings them back. What cannot be written is lost, and no pass waits for it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use jiff::Timestamp;
use stead_controllers::runtime::{Entry, Journal, Outcome, Subject};
use stead_schemas::instance::Instance;
use stead_schemas::limits::{JOURNAL_LINE_CHARS_MAX, JOURNAL_LOG_MAX};
use stead_schemas::meta::Kind;
use stead_schemas::names::Uid;
use stead_schemas::validate::printable;

/// Of an instance's log, in the directory of its logs.
pub const FILE: &str = "stead.log";
const OLDER_FILE: &str = "stead.log.1";

/// Writes them; one line at a time.
#[derive(Debug)]
pub struct Journals {
    /// Has a directory for each instance.
    logs: PathBuf,
    /// How the last pass over an object ended, so that it is said once. One text for each object
    /// that was told of, until it is gone.
    ends: Mutex<BTreeMap<Uid, String>>,
}

impl Journals {
    #[must_use]
    pub fn new(logs: PathBuf) -> Self {
        Self { logs, ends: Mutex::default() }
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
                fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
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
    fn tell(&self, subject: Subject<'_>, entry: Entry<'_>) {
        let is_instance = subject.kind == Instance::NAME;
        let owner = subject.owner.filter(|owner| owner.kind == Instance::NAME).map(|owner| &owner.uid);
        let Some(instance) = owner.or(is_instance.then_some(subject.uid)) else { return };
        let mut ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        let text = match entry {
            Entry::Acting(action) => action.to_owned(),
            Entry::Remark(remark) => remark.to_owned(),
            Entry::Ended(outcome) => {
                let text = told(outcome, subject.is_wished);
                let is_gone = !subject.is_wished && *outcome == Outcome::Converged;
                let before = if is_gone { None } else { ends.insert(subject.uid.clone(), text.clone()) };
                if before.as_ref() == Some(&text) {
                    return;
                }
                if is_gone {
                    ends.remove(subject.uid);
                }
                text
            }
        };
        let now = Timestamp::now();
        let line = format!("{now:.3} {}: {}\n", subject.kind, printable(&text, JOURNAL_LINE_CHARS_MAX));
        // Only of what shall be there, by its own passes, which come one after the other: no line
        // makes a directory after it was removed.
        if let Err(error) = self.write(instance, &line, is_instance && subject.is_wished) {
            tracing::debug!(%instance, %error, "a line of the instance's log was lost");
        }
    }
}

fn told(outcome: &Outcome, is_wished: bool) -> String {
    match outcome {
        Outcome::Converged if is_wished => "as wished".to_owned(),
        Outcome::Converged => "gone".to_owned(),
        Outcome::Acting => "more steps to take".to_owned(),
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

    struct Place {
        journals: Journals,
        logs: tempfile::TempDir,
    }

    impl Place {
        fn new() -> Self {
            let logs = tempfile::tempdir().expect("scratch");
            Self { journals: Journals::new(logs.path().to_owned()), logs }
        }

        fn tell(&self, is_wished: bool, entry: Entry<'_>) {
            let subject = Subject { kind: Instance::NAME, uid: &uid('a'), owner: None, is_wished };
            self.journals.tell(subject, entry);
        }

        fn tell_of_disk(&self, entry: Entry<'_>) {
            let owner = OwnerRef { kind: Instance::NAME.to_owned(), uid: uid('a') };
            let uid = uid('d');
            let subject = Subject { kind: Disk::NAME, uid: &uid, owner: Some(&owner), is_wished: true };
            self.journals.tell(subject, entry);
        }

        fn file(&self, name: &str) -> PathBuf {
            self.logs.path().join(uid('a').as_str()).join(name)
        }

        /// Without the times.
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
    fn steps_and_ends_are_told_of_the_instance_and_of_what_it_owns() {
        let place = Place::new();
        place.tell(true, Entry::Ended(&waits()));
        // The same again is not.
        place.tell(true, Entry::Ended(&waits()));
        place.tell_of_disk(Entry::Acting("Create"));
        place.tell(true, Entry::Acting("Launch"));
        place.tell(true, Entry::Remark("Running after Created"));
        place.tell(true, Entry::Ended(&Outcome::Converged));
        let expected = [
            "instance: waits, WaitingForImage: the image\u{fffd}is pulled",
            "disk: Create",
            "instance: Launch",
            "instance: Running after Created",
            "instance: as wished",
        ];
        assert_eq!(place.lines(), expected);
    }

    #[test]
    fn nothing_brings_removed_records_back() {
        let place = Place::new();
        place.tell_of_disk(Entry::Acting("Create"));
        place.tell(false, Entry::Acting("DiscardRecords"));
        assert!(!place.file("").exists(), "neither makes a directory");
        place.tell(true, Entry::Acting("Launch"));
        place.tell(false, Entry::Acting("Kill"));
        assert_eq!(place.lines(), ["instance: Launch", "instance: Kill"]);
        fs::remove_dir_all(place.file("")).expect("removed");
        place.tell(false, Entry::Ended(&Outcome::Converged));
        place.tell_of_disk(Entry::Acting("Remove"));
        assert!(!place.file("").exists());
    }

    #[test]
    fn the_log_is_bounded_in_lines_and_in_length() {
        let place = Place::new();
        let long = "x".repeat(3 * JOURNAL_LINE_CHARS_MAX);
        let count = usize::try_from(JOURNAL_LOG_MAX.0).expect("fits") / JOURNAL_LINE_CHARS_MAX;
        for _ in 0..3 * count {
            place.tell(true, Entry::Remark(&long));
        }
        let longest = u64::try_from(JOURNAL_LINE_CHARS_MAX).expect("fits") + 64;
        for name in [FILE, OLDER_FILE] {
            let length = fs::metadata(place.file(name)).expect("there").len();
            assert!(length > 0 && length < JOURNAL_LOG_MAX.0 + longest, "{name} has {length} bytes");
        }
        assert!(place.lines().iter().all(|line| line.chars().count() <= JOURNAL_LINE_CHARS_MAX + 32));
    }
}
