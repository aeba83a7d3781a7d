//! Transfers of blobs to the disk: one at a time for a source's blob, into a private file. The blob gets its name
//! only when it is on disk.
//!
//! Guarantees: the digest is calculated from the file as it is read back, after the last write, with no writer left.
//! Two sources never write to one file. The data of an interrupted transfer is kept for the same source.
//! Blocking threads do the writing, hashing and syncing, never the async workers.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use futures::StreamExt;
use sha2::{Digest as _, Sha256};
use stead_controllers::host::{HostError, HostErrorKind};
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};
use tokio::time::Instant;

use super::blocking;
use super::holds::Hold;
use super::layout::{Layout, Source};
use super::manifest::{Blob, digest_from};
use super::session::{Incoming, Session};
use super::transport::Failed;
use crate::host::files::make_directory;

/// Number of bytes gathered before a blocking thread writes them.
const BATCH_BYTES: usize = 1 << 20;
/// Time window in which a transfer must bring a minimum of data. An ordinary registry brings a thousand times as
/// much. A slower one would keep a permit that others wait for.
const RATE_WINDOW: Duration = Duration::from_secs(60);
const WINDOW_BYTES_MIN: u64 = 1 << 20;

/// The transfers of this daemon: one for each file.
#[derive(Default)]
pub(super) struct Transfers {
    files: Mutex<BTreeMap<PathBuf, Weak<AsyncMutex<()>>>>,
}

impl Transfers {
    async fn alone(&self, path: &PathBuf) -> OwnedMutexGuard<()> {
        let lock = {
            let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
            files.retain(|_, lock| lock.strong_count() > 0);
            let known = files.get(path).and_then(Weak::upgrade);
            known.unwrap_or_else(|| {
                let lock = Arc::new(AsyncMutex::new(()));
                files.insert(path.clone(), Arc::downgrade(&lock));
                lock
            })
        };
        lock.lock_owned().await
    }

    /// Fetches one blob, from the point at which an earlier attempt of the same source ended.
    pub(super) async fn fetch(
        &self,
        session: &Session,
        source: &Source,
        blob: &Blob,
        layout: &Layout,
    ) -> Result<(), HostError> {
        let path = layout.partial(&blob.digest, source);
        let alone = self.alone(&path).await;
        let opened = {
            let (layout, blob) = (layout.clone(), blob.clone());
            in_background(session, move || Partial::open(layout, blob, path, alone)).await?
        };
        let Some(mut partial) = opened else { return Ok(()) };
        if partial.length < blob.size.0 {
            let incoming = session.open_blob(&blob.digest, partial.length).await?;
            partial = receive(session, incoming, partial).await?;
        }
        in_background(session, move || partial.finish()).await
    }
}

/// Writes the received data. `partial` belongs to the writing thread during each write.
async fn receive(session: &Session, incoming: Incoming, mut partial: Partial) -> Result<Partial, HostError> {
    let Incoming { response, host, start } = incoming;
    partial.length = start;
    let mut pace = Pace::new(Instant::now());
    let mut stream = response.bytes_stream();
    loop {
        let mut batch = Vec::new();
        let mut end = None;
        while batch.len() < BATCH_BYTES && end.is_none() {
            match tokio::time::timeout_at(pace.window_end, stream.next()).await {
                Ok(Some(Ok(chunk))) => {
                    batch.extend_from_slice(&chunk);
                    pace.received(chunk.len());
                }
                Ok(Some(Err(error))) => end = Some(Err(Failed::of_transfer(&host, &error))),
                Ok(None) => end = Some(Ok(())),
                Err(_) => {}
            }
            if !pace.is_kept(Instant::now()) {
                let words = format!("{host} sends less than {} KiB in a minute", WINDOW_BYTES_MIN >> 10);
                end = Some(Err(Failed::new(HostErrorKind::Transient, words)));
            }
        }
        // The data of an interrupted transfer is kept for the next attempt.
        partial = in_background(session, move || partial.write(&batch)).await?;
        match end {
            Some(Ok(())) => return Ok(partial),
            Some(Err(failed)) => return Err(session.failed(failed)),
            None => {}
        }
    }
}

async fn in_background<T: Send + 'static>(
    session: &Session,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, HostError> {
    let done = blocking("pull", move || Ok(work())).await?;
    done.map_err(|error| session.error(HostError::kind_of_io(&error)).because(error))
}

/// The speed of a transfer, window by window.
pub(super) struct Pace {
    window_end: Instant,
    received: u64,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self { window_end: now + RATE_WINDOW, received: 0 }
    }

    pub(super) fn received(&mut self, bytes: usize) {
        self.received += bytes as u64;
    }

    /// Returns `true` if the last window brought enough. Begins the next window when one is over.
    pub(super) fn is_kept(&mut self, now: Instant) -> bool {
        if now < self.window_end {
            return true;
        }
        let is_enough = self.received >= WINDOW_BYTES_MIN;
        *self = Self::new(now);
        is_enough
    }
}

/// A partial blob, with the exclusive right to write to its file.
struct Partial {
    file: File,
    /// Number of valid bytes in the file.
    length: u64,
    blob: Blob,
    path: PathBuf,
    layout: Layout,
    _alone: OwnedMutexGuard<()>,
    /// Hold that keeps the blob until the job's manifest is found to list it.
    _hold: Hold,
}

impl Partial {
    /// Opens the partial blob. Returns `None` if the blob is complete, from this source or another.
    fn open(
        layout: Layout,
        blob: Blob,
        path: PathBuf,
        alone: OwnedMutexGuard<()>,
    ) -> io::Result<Option<Self>> {
        let hold = layout.hold(&blob.digest);
        if layout.blob(&blob.digest).try_exists()? {
            return Ok(None);
        }
        make_directory(path.parent().unwrap_or(&path))?;
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&path)?;
        let length = file.metadata()?.len();
        if length > blob.size.0 {
            file.set_len(0)?;
        }
        let length = file.metadata()?.len();
        layout.need_room(blob.size.0.saturating_sub(length))?;
        Ok(Some(Self { file, length, blob, path, layout, _alone: alone, _hold: hold }))
    }

    fn write(mut self, bytes: &[u8]) -> io::Result<Self> {
        if self.length.saturating_add(bytes.len() as u64) > self.blob.size.0 {
            fs::remove_file(&self.path)?;
            return Err(refused("the blob is larger than its manifest says"));
        }
        self.layout.need_room(bytes.len() as u64)?;
        self.file.seek(SeekFrom::Start(self.length))?;
        self.file.write_all(bytes)?;
        self.length += bytes.len() as u64;
        Ok(self)
    }

    /// Gives the blob its name if it has the digest that the name promises.
    fn finish(self) -> io::Result<()> {
        if self.length < self.blob.size.0 {
            self.file.set_len(self.length)?;
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the transfer ended early"));
        }
        self.file.set_len(self.length)?;
        self.file.sync_all()?;
        drop(self.file);
        if hash_file(&self.path)? != self.blob.digest {
            fs::remove_file(&self.path)?;
            return Err(refused("the blob does not have the digest it is named by"));
        }
        fs::rename(&self.path, self.layout.blob(&self.blob.digest))?;
        self.layout.sync_blobs()
    }
}

fn refused(words: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, words)
}

/// Calculates the digest of a file as it is on disk.
pub(super) fn hash_file(path: &std::path::Path) -> io::Result<stead_schemas::names::Digest> {
    let (mut file, mut hash) = (File::open(path)?, Sha256::new());
    let mut buffer = vec![0u8; 256 << 10];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(digest_from(hash));
        }
        hash.update(&buffer[..count]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transfer_has_to_bring_a_minimum_in_every_window() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        assert!(pace.is_kept(start + RATE_WINDOW / 2), "the window is not over");
        pace.received(usize::try_from(WINDOW_BYTES_MIN).expect("small"));
        assert!(pace.is_kept(start + RATE_WINDOW));
        assert!(!pace.is_kept(start + RATE_WINDOW * 2), "the next window begins with nothing");
    }
}
