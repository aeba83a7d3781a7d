//! `Kv` on sled 0.34; this is the only file that knows the product.
//!
//! All calls run on one separate thread, because sled blocks. A commit reserves room in the file, applies
//! the batch, flushes and calls fdatasync; only then it is answered.
//!
//! A flush alone is not enough: sled's flush ends in sync_file_range, which writes pages back but neither
//! the file's size nor the disk's cache (its issues 1351 and 1452). Room is reserved because a sled that met
//! a full disk is poisoned, and its flush may wait for ever, even the flush at closing. So room for the
//! batch is allocated with fallocate first, beyond the file's end and without changing its size; if there is
//! none, the batch is refused before sled is called.
//!
//! Guarantees: an answered commit is on stable media; a full disk refuses new objects without harm,
//! deletions and statuses live on a reserve, and everything works again when there is room; a sled that
//! failed nevertheless is closed and opened anew.
//! Never: answers a commit whose durability is not certain.
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

use super::closing::{close_aside, contained};
use super::lock::await_rest_of_dead;
use super::reserve::{Reserve, WITHIN_BYTES, free_bytes};
use super::sled_start::{START_BYTES, free_held_blocks, remove_unfinished, sync_settings};
use super::sync::sync_directory;

/// Room that is reserved beyond the end of the file before every commit, in bytes: sled writes whole
/// segments of 512 KiB, and one batch can touch a few of them.
const ROOM_BYTES: u64 = 4 << 20;
/// Room to reserve for each byte of a batch, in bytes: a batch is written as pages that contain old
/// neighbours too.
const ROOM_PER_BATCH_BYTE: u64 = 4;
/// Size of sled's cache, in bytes: the store holds every object itself, and reads sled only at start. The
/// default is 1 GiB.
const CACHE_BYTES: u64 = 32 << 20;
/// Time after which a commit is given up, so that its callers get a response. The disk may still carry it
/// out.
const COMMIT_DEADLINE: Duration = Duration::from_secs(60);
/// Time after which an unanswered commit makes the store unhealthy; a busy disk takes up to a few seconds.
const STALL_AFTER: Duration = Duration::from_secs(10);

/// Time for closing a database that failed.
const CLOSE_DEADLINE: Duration = Duration::from_secs(5);

/// The database, in a directory of its own.
#[derive(Debug)]
pub(crate) struct SledKv {
    /// Sender of requests; taken at drop, which ends the thread.
    requests: Option<mpsc::Sender<Request>>,
    thread: Option<thread::JoinHandle<()>>,
    /// Time at which the commit that the thread works on was sent. It stays set for as long as the disk
    /// stalls, and no other commit is sent meanwhile: the store has one writer.
    working_since: Arc<Mutex<Option<Instant>>>,
    commit_deadline: Duration,
    reserve: Reserve,
    /// The records that were read at open; given to the first `load`.
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
    /// Waits for the thread, so that the directory can be opened again at once; does not wait for a stalled
    /// disk.
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
    /// The open database; `None` after a failure, and the next commit opens it again.
    database: Option<Database>,
    working_since: Arc<Mutex<Option<Instant>>>,
}

impl Server {
    /// Serves requests until every sender is gone.
    fn serve(mut self, queue: &mpsc::Receiver<Request>) {
        while let Ok(Request { batch, reply }) = queue.recv() {
            let result = commit(&self.directory, &self.reserve, &mut self.database, batch);
            *self.working_since.lock().expect("nothing panics while it is held") = None;
            // The caller is gone if the disk took longer than the deadline.
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
    match contained(|| open.commit(batch)).unwrap_or_else(|| Err(Failure::Broken(panicked()))) {
        Ok(()) => {
            *database = Some(open);
            Ok(())
        }
        Err(Failure::Refused(error)) => {
            *database = Some(open);
            Err(error)
        }
        Err(Failure::Broken(error)) => {
            // The database is closed here and opened by the next commit: the contents of the disk are
            // authoritative.
            warn!(%error, "the database failed and will be opened anew");
            close_aside(open, CLOSE_DEADLINE);
            Err(error)
        }
    }
}

fn panicked() -> KvError {
    KvError::Io("the database panicked".to_owned())
}

/// The way in which a commit failed.
enum Failure {
    /// The commit was refused before sled was called.
    Refused(KvError),
    /// The commit failed within sled or its files.
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
            // A commit is acknowledged only after its flush, so there is nothing to flush later.
            .flush_every_ms(None);
        // Where sled keeps its data and its lock.
        await_rest_of_dead(&directory.join("db")).map_err(io)?;
        let opened = contained(|| config.open()).ok_or_else(panicked)?;
        let db = opened.map_err(|error| from_sled(&error))?;
        match Self::make_durable(&db, directory, reserve) {
            Ok(room) => Ok(Self { db, room, blobs: Blobs::new(directory.join("blobs")) }),
            Err(error) => {
                close_aside(db, CLOSE_DEADLINE);
                Err(error)
            }
        }
    }

    /// Puts what opening has written on disk, and reserves room.
    fn make_durable(db: &sled::Db, directory: &Path, reserve: &Reserve) -> Result<Room, KvError> {
        let io = |error: io::Error| from_io(&error);
        db.flush().map_err(|error| from_sled(&error))?;
        let file = OpenOptions::new().write(true).open(directory.join("db")).map_err(io)?;
        file.sync_all().map_err(io)?;
        sync_settings(directory).map_err(io)?;
        sync_directory(directory).map_err(io)?;
        if let Some(parent) = directory.parent() {
            sync_directory(parent).map_err(io)?;
        }
        let mut room = Room::new(file, reserve.clone());
        room.hold_reserve().map_err(io)?;
        Ok(room)
    }

    /// Closes sled, which may cut its file at its end; the blocks beyond are allocated again before other
    /// programs take them.
    fn close(self) {
        let Self { db, mut room, .. } = self;
        // Nothing else is waiting, and who opens it next needs its lock.
        close_aside(db, Duration::MAX);
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
        // The batch is stored already, whatever happens to the reserve.
        self.room.hold_or_warn();
        Ok(())
    }

    /// Allocates the blocks that the batch may need, so that sled does not meet a full disk.
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

/// The blocks of sled's own file beyond its end.
struct Room {
    /// The database's file; it is never replaced, only grown and cut.
    file: File,
    /// Offset up to which the blocks belong to us, in bytes.
    held_to: u64,
    length: u64,
    reserve: Reserve,
}

impl Room {
    fn new(file: File, reserve: Reserve) -> Self {
        Self { file, held_to: 0, length: 0, reserve }
    }

    /// Allocates as much of the reserve as possible. When sled cuts its file, the blocks beyond the end are
    /// lost.
    fn hold_reserve(&mut self) -> io::Result<()> {
        match self.hold(ROOM_BYTES / 2 + WITHIN_BYTES, 0) {
            Err(error) if !is_full(&error) => return Err(error),
            _ => self.reserve.held_within(self.held_to.saturating_sub(self.length)),
        }
        self.reserve.refill()
    }

    /// Allocates the reserve; logs a failure, since a later commit tries again.
    fn hold_or_warn(&mut self) {
        if let Err(error) = self.hold_reserve() {
            warn!(%error, "the reserve for a full disk cannot be kept");
        }
    }

    /// Holds `room` bytes beyond the file's end; when some are missing, allocates `more` bytes in addition.
    fn hold(&mut self, room: u64, more: u64) -> io::Result<()> {
        let seen = self.file.metadata()?;
        let length = seen.len();
        // A cut may be hidden by data that was appended since; the number of blocks shows it.
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
            // The file system has no reservations; it is nearly as good that there was room.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) if free_bytes(&self.file)? >= room => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Err(io::ErrorKind::StorageFull.into()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Values too large for a segment, which live in files of their own that sled does not sync at all.
struct Blobs {
    directory: PathBuf,
    /// Modification time of the directory when it was last synced: it changes with every file that appears
    /// or disappears.
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
        // A time stamp is as coarse as the kernel's tick: it does not show a change within the same tick as
        // the last check, so a fresh time stamp is never trusted.
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
