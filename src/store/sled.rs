//! `Kv` on sled 0.34: the one file that knows the product.
//!
//! All calls run on one thread of its own, as sled blocks. A commit is: reserve room in the file,
//! apply the batch, flush, fdatasync; only then it is answered.
//!
//! Why not flush alone: sled's flush ends in sync_file_range, which writes pages back but neither
//! the file's size nor the disk's cache (its issues 1351 and 1452).
//! Why reserve: a sled that met a full disk is poisoned, and its flush may wait for ever, even the
//! one at closing. So room for the batch is taken with fallocate first, beyond the file's end and
//! without changing its size; if there is none, the batch is refused and sled never learns of it.
//!
//! Guarantees: an answered commit is on stable media; a full disk refuses new objects without harm,
//! deletions and statuses live on a reserve, and all works again when there is room; a sled that failed all the same is closed and opened anew.
//! Never: answers a commit that it only believes to be safe.
//! Cancel/crash: a dropped commit is still carried out; a crash leaves whole batches only.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, mpsc};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use futures::future::BoxFuture;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use stead_controllers::store::{Batch, Kv, KvError};
use tokio::sync::oneshot;
use tracing::warn;

use super::reserve::{Reserve, WITHIN_BYTES, free_bytes};
use super::sled_start::{START_BYTES, free_held_blocks, remove_unfinished, sync_settings};

/// Room kept beyond the end of the file before every commit: sled writes whole segments of
/// 512 KiB, and one batch can touch a few of them.
const ROOM_BYTES: u64 = 4 << 20;
/// A batch is written as pages that hold more than itself: old neighbours are rewritten.
const ROOM_PER_BATCH_BYTE: u64 = 4;
/// The store holds every object itself and reads sled at start only; the default is 1 GiB.
const CACHE_BYTES: u64 = 32 << 20;
/// Time after which a commit is given up, so that its callers are answered. The disk may still carry it out.
const COMMIT_DEADLINE: Duration = Duration::from_secs(60);
/// Time after which a commit that is not answered makes the store unhealthy; a busy disk takes up to a few seconds.
const STALL_AFTER: Duration = Duration::from_secs(10);

/// For a database that failed to close.
const CLOSE_DEADLINE: Duration = Duration::from_secs(5);

/// The database in a directory of its own.
#[derive(Debug)]
pub(crate) struct SledKv {
    /// Taken at drop, which ends the thread.
    requests: Option<mpsc::Sender<Request>>,
    thread: Option<thread::JoinHandle<()>>,
    /// When the commit that the thread works on was sent. It stays set for as long as the disk stalls, and
    /// nothing else is sent meanwhile: the store has one writer.
    working_since: Arc<Mutex<Option<Instant>>>,
    commit_deadline: Duration,
    reserve: Reserve,
    /// Read once at open, given to the first `load`.
    loaded: Mutex<Vec<(Vec<u8>, Vec<u8>)>>,
}

struct Request {
    batch: Batch,
    reply: oneshot::Sender<Result<(), KvError>>,
}

impl SledKv {
    /// Opens or creates the database; returns when its files are durable.
    pub(crate) fn open(directory: &Path) -> Result<Self, KvError> {
        Self::open_with_deadline(directory, COMMIT_DEADLINE)
    }

    pub(super) fn open_with_deadline(directory: &Path, commit_deadline: Duration) -> Result<Self, KvError> {
        super::private_directory(directory).map_err(|error| from_io(&error))?;
        let reserve = Reserve::open(directory).map_err(|error| from_io(&error))?;
        let database = Database::open(directory, &reserve)?;
        let mut pairs = Vec::new();
        for pair in database.db.iter() {
            let (key, value) = pair.map_err(|error| from_sled(&error))?;
            pairs.push((key.to_vec(), value.to_vec()));
        }
        let (requests, queue) = mpsc::channel();
        let working_since = Arc::new(Mutex::new(None));
        let server = Server {
            directory: directory.to_path_buf(),
            reserve: reserve.clone(),
            database: Some(database),
            working_since: working_since.clone(),
        };
        let thread = thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || server.serve(&queue))
            .map_err(|error| KvError::Io(format!("cannot start the store's thread: {error}")))?;
        Ok(Self {
            requests: Some(requests),
            thread: Some(thread),
            working_since,
            commit_deadline,
            reserve,
            loaded: Mutex::new(pairs),
        })
    }

    fn working_since(&self) -> MutexGuard<'_, Option<Instant>> {
        self.working_since.lock().expect("nothing panics while it is held")
    }
}

impl Drop for SledKv {
    /// Waits for the thread, so that the directory can be opened again at once; not for a stalled disk.
    fn drop(&mut self) {
        self.requests = None;
        let is_stalled = self.health().is_err();
        if let Some(thread) = self.thread.take().filter(|_| !is_stalled) {
            let _ = thread.join(); // Its panic was reported when it happened.
        }
    }
}

impl Kv for SledKv {
    fn load(&self, visit: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), KvError> {
        let pairs = std::mem::take(&mut *self.loaded.lock().expect("nothing panics while it is held"));
        for (key, value) in &pairs {
            visit(key, value);
        }
        Ok(())
    }

    fn allows_growth(&self) -> bool {
        self.reserve.allows_growth()
    }

    fn health(&self) -> Result<(), KvError> {
        if self.thread.as_ref().is_none_or(thread::JoinHandle::is_finished) {
            return Err(KvError::Io("the store's thread ended".to_owned()));
        }
        match *self.working_since() {
            Some(since) if since.elapsed() >= STALL_AFTER.min(self.commit_deadline) => {
                let seconds = since.elapsed().as_secs();
                Err(KvError::Io(format!("the disk has not answered a write for {seconds} s")))
            }
            _ => Ok(()),
        }
    }

    fn commit(&self, batch: Batch) -> BoxFuture<'_, Result<(), KvError>> {
        let (reply, answer) = oneshot::channel();
        Box::pin(async move {
            let gone = || KvError::Io("the store's thread ended".to_owned());
            if let Some(since) = *self.working_since() {
                let seconds = since.elapsed().as_secs();
                return Err(KvError::Io(format!("the disk has not answered a write for {seconds} s")));
            }
            let requests = self.requests.as_ref().ok_or_else(gone)?;
            *self.working_since() = Some(Instant::now());
            requests.send(Request { batch, reply }).map_err(|_| gone())?;
            match tokio::time::timeout(self.commit_deadline, answer).await {
                Ok(answer) => answer.map_err(|_| gone())?,
                Err(_) => Err(KvError::Io(format!("no answer within {:?}", self.commit_deadline))),
            }
        })
    }
}

/// The thread that calls sled.
struct Server {
    directory: PathBuf,
    reserve: Reserve,
    /// `None` after a failure; the next commit opens it anew.
    database: Option<Database>,
    working_since: Arc<Mutex<Option<Instant>>>,
}

impl Server {
    /// Serves requests until every sender is gone.
    fn serve(mut self, queue: &mpsc::Receiver<Request>) {
        while let Ok(Request { batch, reply }) = queue.recv() {
            let result = commit(&self.directory, &self.reserve, &mut self.database, batch);
            *self.working_since.lock().expect("nothing panics while it is held") = None;
            // The caller has gone if the disk took longer than the deadline.
            let _ = reply.send(result);
        }
        if let Some(open) = self.database {
            open.close();
        }
    }
}

fn commit(
    directory: &Path,
    reserve: &Reserve,
    database: &mut Option<Database>,
    batch: Batch,
) -> Result<(), KvError> {
    let mut open = match database.take() {
        Some(open) => open,
        None => Database::open(directory, reserve)?,
    };
    match open.commit(batch) {
        Ok(()) => {
            *database = Some(open);
            Ok(())
        }
        Err(Failure::Refused(error)) => {
            *database = Some(open);
            Err(error)
        }
        Err(Failure::Broken(error)) => {
            // Closed here, opened by the next commit: what it finds on disk is the truth.
            warn!(%error, "the database failed and will be opened anew");
            close_aside(open);
            Err(error)
        }
    }
}

/// Closes a database that failed. Its closing flush may wait for ever for a write that will never
/// come, so it has a thread of its own. While that hangs sled keeps its file locked, opening anew
/// fails with that reason, and only a restart helps.
fn close_aside(open: Database) {
    let (closed, wait) = mpsc::channel();
    let closing = thread::Builder::new().name("store-close".to_owned()).spawn(move || {
        drop(open);
        let _ = closed.send(()); // Nobody waits beyond the deadline.
    });
    if closing.is_err() || wait.recv_timeout(CLOSE_DEADLINE).is_err() {
        warn!("the failed database does not close; writes fail until the daemon is restarted");
    }
}

/// How a commit failed.
enum Failure {
    /// Before sled was asked for anything.
    Refused(KvError),
    /// Within sled or its files.
    Broken(KvError),
}

struct Database {
    db: sled::Db,
    room: Room,
    blobs: Blobs,
}

impl Database {
    fn open(directory: &Path, reserve: &Reserve) -> Result<Self, KvError> {
        let io = |error: io::Error| from_io(&error);
        remove_unfinished(directory).map_err(io)?;
        reserve.make_free(START_BYTES).map_err(io)?;
        free_held_blocks(directory).map_err(io)?;
        let config = sled::Config::new()
            .path(directory)
            .cache_capacity(CACHE_BYTES)
            // Nothing is acknowledged before its flush, so there is nothing to flush later.
            .flush_every_ms(None);
        let db = config.open().map_err(|error| from_sled(&error))?;
        db.flush().map_err(|error| from_sled(&error))?;
        let file = OpenOptions::new().write(true).open(directory.join("db")).map_err(io)?;
        file.sync_all().map_err(io)?;
        sync_settings(directory).map_err(io)?;
        sync_directory(directory).map_err(io)?;
        if let Some(parent) = directory.parent() {
            sync_directory(parent).map_err(io)?;
        }
        let blobs = Blobs::new(directory.join("blobs"));
        let mut room = Room::new(file, reserve.clone());
        room.hold_reserve().map_err(io)?;
        Ok(Self { db, room, blobs })
    }

    /// sled may cut its file at its end: what lay beyond is taken again before others do.
    fn close(self) {
        let Self { db, mut room, .. } = self;
        drop(db);
        room.hold_or_warn();
    }

    fn commit(&mut self, batch: Batch) -> Result<(), Failure> {
        self.take_room(&batch).map_err(|error| Failure::Refused(from_io(&error)))?;
        let mut writes = sled::Batch::default();
        for (key, value) in batch.writes {
            match value {
                Some(value) => writes.insert(key.into_bytes(), value),
                None => writes.remove(key.into_bytes()),
            }
        }
        let sled = |error: sled::Error| Failure::Broken(from_sled(&error));
        let io = |error: io::Error| Failure::Broken(from_io(&error));
        self.db.apply_batch(writes).map_err(sled)?;
        self.db.flush().map_err(sled)?;
        self.room.file.sync_data().map_err(io)?;
        self.blobs.sync().map_err(io)?;
        // Stored it is already, whatever becomes of the reserve.
        self.room.hold_or_warn();
        Ok(())
    }

    /// Takes the blocks that the batch may need, so that sled does not meet a full disk.
    fn take_room(&mut self, batch: &Batch) -> io::Result<()> {
        let bytes: usize =
            batch.writes.iter().map(|(key, value)| key.len() + value.as_ref().map_or(0, Vec::len)).sum();
        let bytes = u64::try_from(bytes).expect("a batch in memory has a length of 64 bits");
        let need = ROOM_BYTES / 2 + bytes * ROOM_PER_BATCH_BYTE;
        self.room.reserve.make_free(need)?;
        match self.room.hold(need + WITHIN_BYTES, ROOM_BYTES) {
            Err(error) if is_full(&error) => self.room.hold(need, 0),
            held => held,
        }
    }
}

/// Blocks of sled's own file beyond its end.
struct Room {
    /// It is never replaced, only grown and cut.
    file: File,
    /// The blocks are ours up to here.
    held_to: u64,
    length: u64,
    reserve: Reserve,
}

impl Room {
    fn new(file: File, reserve: Reserve) -> Self {
        Self { file, held_to: 0, length: 0, reserve }
    }

    /// Has what it may have of its reserve. sled cuts its file, and what lay beyond the end with it.
    fn hold_reserve(&mut self) -> io::Result<()> {
        match self.hold(ROOM_BYTES / 2 + WITHIN_BYTES, 0) {
            Err(error) if !is_full(&error) => return Err(error),
            _ => self.reserve.held_within(self.held_to.saturating_sub(self.length)),
        }
        self.reserve.refill()
    }

    /// One that cannot be had now is had later.
    fn hold_or_warn(&mut self) {
        if let Err(error) = self.hold_reserve() {
            warn!(%error, "the reserve for a full disk cannot be kept");
        }
    }

    /// Holds so many blocks beyond the file's end; when some are missing, so many more.
    fn hold(&mut self, room: u64, more: u64) -> io::Result<()> {
        let seen = self.file.metadata()?;
        let length = seen.len();
        // A cut may be hidden by what was appended since; blocks tell.
        self.held_to = self.held_to.min(seen.blocks() * 512);
        self.length = length;
        if length + room <= self.held_to {
            return Ok(());
        }
        match fallocate(&self.file, FallocateFlags::KEEP_SIZE, length, room + more) {
            Ok(()) => {
                self.held_to = length + room + more;
                Ok(())
            }
            // A file system without reservations: that there was room is nearly as good.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) if free_bytes(&self.file)? >= room => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Err(io::ErrorKind::StorageFull.into()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Values too large for a segment live in files of their own, which sled does not sync at all.
struct Blobs {
    directory: PathBuf,
    /// Of the directory, when it was last synced: it moves with every file that appears or goes.
    changed: Option<SystemTime>,
    synced: Vec<OsString>,
}

impl Blobs {
    fn new(directory: PathBuf) -> Self {
        Self { directory, changed: None, synced: Vec::new() }
    }

    fn sync(&mut self) -> io::Result<()> {
        let changed = match fs::metadata(&self.directory) {
            Ok(metadata) => metadata.modified()?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        // A time stamp is as coarse as the kernel's tick: a change within the same tick as the last
        // look is not seen by it, so a fresh one is never trusted.
        let is_settled =
            SystemTime::now().duration_since(changed).is_ok_and(|age| age > Duration::from_millis(100));
        if self.changed == Some(changed) && is_settled {
            return Ok(());
        }
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            let name = entry.file_name();
            if !self.synced.contains(&name) {
                match File::open(entry.path()) {
                    Ok(file) => file.sync_data()?,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue, // sled removed it.
                    Err(error) => return Err(error),
                }
            }
            names.push(name);
        }
        if names != self.synced {
            sync_directory(&self.directory)?;
        }
        (self.synced, self.changed) = (names, Some(changed));
        Ok(())
    }
}

pub(super) fn sync_directory(path: &Path) -> io::Result<()> {
    // The parent of a relative one-part path is the empty path.
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    File::open(path)?.sync_all()
}

fn from_io(error: &io::Error) -> KvError {
    if is_full(error) { KvError::Full(error.to_string()) } else { KvError::Io(error.to_string()) }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn from_sled(error: &sled::Error) -> KvError {
    match error {
        sled::Error::Io(error) => from_io(error),
        sled::Error::Corruption { .. } => KvError::Corrupt(error.to_string()),
        sled::Error::CollectionNotFound(_) | sled::Error::Unsupported(_) | sled::Error::ReportableBug(_) => {
            KvError::Io(error.to_string())
        }
    }
}
