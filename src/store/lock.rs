//! The lock of a data directory for a single daemon: an exclusive flock on a file in it.
//!
//! Guarantees: the kernel frees the lock with the process, however it ends, and with any process that it was
//! about to start; the next daemon waits for that. A second daemon gets an error that names the holder.
//! Never: removes the file, which would let two processes lock two files of one name.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// The lock, held while the value lives.
#[derive(Debug)]
pub struct DirectoryLock {
    file: File,
}

impl Drop for DirectoryLock {
    /// Frees the lock also for a process that is being started, which holds the file from its fork to its exec. If
    /// that fails, the lock is free when the last such process has ended.
    fn drop(&mut self) {
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

/// The reason why the directory could not be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error("{path} is in use by process {holder}", path = path.display())]
    Held { path: PathBuf, holder: String },
    #[error("cannot lock {path}", path = path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// Time for which a process that was being started may keep the lock of a daemon that died in that moment:
/// from its fork to its exec it holds all of the daemon's files.
const REST_OF_DEAD: Duration = Duration::from_secs(10);
const REST_POLL: Duration = Duration::from_millis(5);

impl DirectoryLock {
    pub(super) fn take(directory: &Path) -> Result<Self, LockError> {
        let path = directory.join("lock");
        let io = |source| LockError::Io { path: path.clone(), source };
        let options = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = options.map_err(io)?;
        let deadline = Instant::now() + REST_OF_DEAD;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(Errno::WOULDBLOCK) => {}
                Err(error) => return Err(io(error.into())),
            }
            let mut holder = String::new();
            // A holder that is writing its pid just now stays unnamed.
            let _ = file.rewind().and_then(|()| file.read_to_string(&mut holder));
            if is_dead(&holder) && Instant::now() < deadline {
                std::thread::sleep(REST_POLL);
                continue;
            }
            let holder = if holder.is_empty() { "unknown".to_owned() } else { holder };
            return Err(LockError::Held { path: directory.to_path_buf(), holder });
        }
        file.set_len(0).and_then(|()| file.rewind()).map_err(io)?;
        file.write_all(std::process::id().to_string().as_bytes()).map_err(io)?;
        Ok(Self { file })
    }
}

/// Waits until no process holds the lock of this file, if the file exists. The caller has the directory's lock, so a
/// holder can only be the rest of a daemon that died: a process that it was about to start, which closes its files one
/// after another. Leaves it to the caller's own attempt to fail if the lock does not become free.
pub(super) fn await_rest_of_dead(path: &Path) -> io::Result<()> {
    let file = match OpenOptions::new().read(true).write(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => file?,
    };
    let deadline = Instant::now() + REST_OF_DEAD;
    while Instant::now() < deadline {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(flock(&file, FlockOperation::Unlock)?),
            Err(Errno::WOULDBLOCK) => std::thread::sleep(REST_POLL),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn is_dead(holder: &str) -> bool {
    holder.parse::<u32>().is_ok_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_free_when_it_is_dropped_although_a_child_that_starts_has_its_file() {
        let dir = tempfile::tempdir().expect("scratch");
        let held = DirectoryLock::take(dir.path()).expect("free");
        let childs = held.file.try_clone().expect("the same open file");
        drop(held);
        DirectoryLock::take(dir.path()).expect("free again");
        drop(childs);
    }

    #[test]
    fn a_living_daemon_is_reported_and_the_rest_of_a_dead_daemon_is_waited_for() {
        let dir = tempfile::tempdir().expect("scratch");
        let held = DirectoryLock::take(dir.path()).expect("free");
        let refused = DirectoryLock::take(dir.path()).expect_err("held");
        assert!(refused.to_string().contains(&std::process::id().to_string()), "{refused}");
        let mut dead = std::process::Command::new("/bin/true").spawn().expect("started");
        dead.wait().expect("ended");
        std::fs::write(dir.path().join("lock"), dead.id().to_string()).expect("written");
        waits_for(&dir.path().join("lock"), held, || drop(DirectoryLock::take(dir.path()).expect("free")));
    }

    /// Checks that `next`, which opens the file, waits until `held` is dropped.
    fn waits_for<T>(path: &Path, held: T, next: impl FnOnce() + Send) {
        let path = std::fs::canonicalize(path).expect("there");
        let is_it = |fd: std::fs::DirEntry| std::fs::read_link(fd.path()).is_ok_and(|other| other == path);
        let opened = || {
            let all = std::fs::read_dir("/proc/self/fd").expect("there").flatten();
            all.filter_map(|fd| is_it(fd).then_some(())).count()
        };
        std::thread::scope(|scope| {
            let next = scope.spawn(next);
            while opened() < 2 && !next.is_finished() {
                std::thread::yield_now();
            }
            assert!(!next.is_finished(), "two have it, or it was not waited for");
            drop(held);
            next.join().expect("free by then");
        });
    }

    #[test]
    fn a_database_that_a_dead_daemon_left_locked_is_waited_for() {
        let dir = tempfile::tempdir().expect("scratch");
        let database = dir.path().join("db");
        let open = || drop(super::super::sled::SledKv::open(&database).expect("opened"));
        open();
        let file = database.join("db");
        let held = File::open(&file).expect("there");
        flock(&held, FlockOperation::LockExclusive).expect("locked");
        waits_for(&file, held, open);
    }
}
