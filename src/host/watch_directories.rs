//! Notifications that a file in a directory was written: one inotify instance for the whole daemon.
//!
//! By default a host allows a user 128 instances and some ten thousand watches: one instance for each VM and for each
//! reader of a log would exceed that.
//! They are level-triggered: a notification is only a reason to read again. Notifications are coalesced, so that
//! continuous writes cost a bounded number of them.

use std::collections::BTreeMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::process::register;

/// Pause after notifications, so that a writer's output is read in batches and not byte by byte. A console's line
/// takes a millisecond to be written.
const SETTLE: Duration = Duration::from_millis(1);
/// Pause after notifications while files are written continuously.
const SETTLE_BUSY: Duration = Duration::from_millis(10);
/// Backlog at which the longer pauses are used: the time by which they would lag behind the notifications so far.
const BURST: Duration = Duration::from_secs(1);

/// The watches of the daemon. Clones share them. No descriptor is opened before the first watch.
#[derive(Debug, Clone, Default)]
pub struct DirectoryWatches(Arc<Mutex<Option<Queue>>>);

#[derive(Debug)]
struct Queue {
    inotify: Arc<AsyncFd<OwnedFd>>,
    directories: Arc<Mutex<Directories>>,
    task: JoinHandle<()>,
}

/// Senders of notifications by watched directory. A dropped sender means that its directory is gone.
type Directories = BTreeMap<i32, watch::Sender<()>>;

impl Drop for Queue {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A watch on one directory. It ends when it is dropped.
#[derive(Debug)]
pub struct DirectoryWatch {
    watches: DirectoryWatches,
    descriptor: i32,
    changes: Option<watch::Receiver<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl DirectoryWatches {
    /// Watches a directory: writes to its files, names that appear or disappear, and its own removal, which the
    /// kernel reports only when no file of it is open.
    ///
    /// # Errors
    /// Returns an error when the directory does not exist, or the host allows no more watches.
    pub fn watch(&self, directory: &Path) -> io::Result<DirectoryWatch> {
        let mut queue = lock(&self.0);
        if queue.as_ref().is_none_or(|queue| queue.task.is_finished()) {
            *queue = Some(Queue::open()?);
        }
        let Some(queue) = queue.as_ref() else { return Err(io::ErrorKind::NotFound.into()) };
        let changes = WatchFlags::MODIFY | WatchFlags::CREATE | WatchFlags::MOVE | WatchFlags::DELETE;
        let flags = changes | WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF | WatchFlags::ONLYDIR;
        // The lock is held, so no notification is delivered between the two steps.
        let mut directories = lock(&queue.directories);
        let descriptor = inotify::add_watch(queue.inotify.get_ref(), directory, flags)?;
        let sender = directories.entry(descriptor).or_insert_with(|| watch::channel(()).0);
        Ok(DirectoryWatch { watches: self.clone(), descriptor, changes: Some(sender.subscribe()) })
    }
}

impl Queue {
    fn open() -> io::Result<Self> {
        let inotify: OwnedFd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let inotify = Arc::new(register(inotify)?);
        let directories = Arc::<Mutex<Directories>>::default();
        let task = tokio::spawn(hand_out(inotify.clone(), directories.clone()));
        Ok(Self { inotify, directories, task })
    }
}

async fn hand_out(queue: Arc<AsyncFd<OwnedFd>>, directories: Arc<Mutex<Directories>>) {
    // This is the time at which all notifications so far would have been delivered with the longer pauses.
    let mut paid_until = Instant::now();
    loop {
        let Ok(mut ready) = queue.readable().await else { return };
        let now = Instant::now();
        paid_until = paid_until.max(now) + SETTLE_BUSY;
        let is_busy = paid_until.duration_since(now) > BURST;
        tokio::time::sleep(if is_busy { SETTLE_BUSY } else { SETTLE }).await;
        take_events(queue.get_ref(), &directories);
        ready.clear_ready();
    }
}

/// Takes the queued notifications. If the queue has lost some, notifies all watches.
fn take_events(queue: &OwnedFd, directories: &Mutex<Directories>) {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = Reader::new(queue, &mut buffer);
    let mut directories = lock(directories);
    while let Ok(notice) = reader.next() {
        if notice.events().contains(ReadFlags::QUEUE_OVERFLOW) {
            for sender in directories.values() {
                sender.send_replace(());
            }
        } else if notice.events().intersects(ReadFlags::IGNORED | ReadFlags::DELETE_SELF) {
            directories.remove(&notice.wd());
        } else if let Some(sender) = directories.get(&notice.wd()) {
            sender.send_replace(());
        }
    }
}

impl DirectoryWatch {
    /// Returns some time after a change since the last call, or `false` when the directory is gone. Cancel safe.
    pub async fn changed(&mut self) -> bool {
        match &mut self.changes {
            Some(changes) => changes.changed().await.is_ok(),
            None => false,
        }
    }
}

impl Drop for DirectoryWatch {
    fn drop(&mut self) {
        drop(self.changes.take());
        let queue = lock(&self.watches.0);
        let Some(queue) = queue.as_ref() else { return };
        let mut directories = lock(&queue.directories);
        if directories.get(&self.descriptor).is_some_and(|sender| sender.receiver_count() == 0) {
            directories.remove(&self.descriptor);
            // The watch of a directory that was removed just now is gone already.
            let _ = inotify::remove_watch(queue.inotify.get_ref(), self.descriptor);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn instances() -> usize {
        let links = fs::read_dir("/proc/self/fd").expect("there").flatten();
        links.filter(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.ends_with("anon_inode:inotify"))).count()
    }

    #[tokio::test]
    async fn many_watches_share_an_instance_and_each_is_notified_of_its_own_directory() {
        let (watches, scratch) = (DirectoryWatches::default(), tempfile::tempdir().expect("scratch"));
        let directories: Vec<_> = (0..300).map(|at| scratch.path().join(at.to_string())).collect();
        directories.iter().for_each(|directory| fs::create_dir(directory).expect("made"));
        let watch = |directory: &std::path::PathBuf| watches.watch(directory).expect("watched");
        let mut held: Vec<_> =
            directories.iter().flat_map(|directory| [watch(directory), watch(directory)]).collect();
        // Other tests of this program may have some instances of their own, but none has hundreds.
        assert!(instances() < 100, "{} instances for {} watches", instances(), held.len());
        fs::write(directories[7].join("log"), "a line\n").expect("written");
        for watch in &mut held[14..16] {
            assert!(watch.changed().await);
        }
        assert!(
            held.iter_mut().all(|watch| !watch.changes.as_ref().expect("held").has_changed().expect("there"))
        );
        // Dropping one watch does not affect the other watch of its directory.
        drop(held.remove(14));
        fs::write(directories[7].join("log"), "another\n").expect("written");
        assert!(held[14].changed().await);
        fs::remove_dir_all(&directories[7]).expect("removed");
        while held[14].changed().await {}
        held.clear();
        let queue = lock(&watches.0);
        assert!(lock(&queue.as_ref().expect("opened").directories).is_empty());
        drop(queue);
        assert!(watches.watch(&directories[7]).is_err(), "it is not there");
    }
}
