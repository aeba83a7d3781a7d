//! Uploads of archives by clients: bounded in size, disk space, pace and number.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use stead_controllers::host::{HostError, HostErrorKind};
use tempfile::NamedTempFile;
use tokio::io::AsyncWriteExt;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::blocking;
use super::transfer::Pace;
use crate::peers::Shares;

/// Limit on simultaneous uploads. Each has a file on the disk.
const UPLOADS_MAX: usize = 16;
/// Time limit of one upload. An archive too large for a slow line goes through a registry.
const UPLOAD_DEADLINE: Duration = Duration::from_secs(3600);
/// Time after which a client that sends nothing is considered gone.
const STALL: Duration = Duration::from_secs(30);
/// Number of bytes written between two checks of the free disk space.
const ROOM_INTERVAL_BYTES: u64 = 16 << 20;

fn failed(error: io::Error) -> HostError {
    HostError::io("receive", "an archive", error)
}

fn refused(kind: HostErrorKind, words: &str) -> HostError {
    HostError::new(kind, "receive", "an archive").because(words)
}

/// The uploads of all clients. Clones share them.
#[derive(Clone)]
pub(in crate::host) struct Uploads {
    permits: Arc<Semaphore>,
    shares: Arc<Shares<Arc<str>>>,
}

/// The directory of an upload's file, and what bounds it.
pub(in crate::host) struct Bounds {
    /// Directory of the file.
    pub(in crate::host) directory: PathBuf,
    /// Largest size of the file, in bytes.
    pub(in crate::host) size_max: u64,
    /// Checks that the disk has room for more.
    pub(in crate::host) need_room: Arc<dyn Fn() -> io::Result<()> + Send + Sync>,
}

impl Uploads {
    pub(super) fn new() -> Self {
        Self { permits: Arc::new(Semaphore::new(UPLOADS_MAX)), shares: Shares::new(UPLOADS_MAX / 2) }
    }

    /// Receives an archive from a client into a file without an owner, which is removed with the value. Returns `None` if
    /// the archive is larger than it may be. One client may have at most half of the uploads.
    ///
    /// # Errors
    /// Permanent if the archive comes too slowly. Exhausted if there is no room. Transient while too many uploads run.
    pub(in crate::host) async fn receive(
        &self,
        client: &Arc<str>,
        archive: impl Stream<Item = io::Result<Bytes>> + Send + Unpin,
        bounds: Bounds,
    ) -> Result<Option<NamedTempFile>, HostError> {
        let busy = || refused(HostErrorKind::Transient, "too many archives are being received");
        let _share = self.shares.take(client).ok_or_else(busy)?;
        let _upload = self.permits.try_acquire().map_err(|_| busy())?;
        let received = tokio::time::timeout(UPLOAD_DEADLINE, write(archive, bounds)).await;
        received.map_err(|_| refused(HostErrorKind::Permanent, "it took more than an hour"))?
    }
}

async fn write(
    mut archive: impl Stream<Item = io::Result<Bytes>> + Send + Unpin,
    bounds: Bounds,
) -> Result<Option<NamedTempFile>, HostError> {
    let Bounds { directory, size_max, need_room } = bounds;
    let checked = need_room.clone();
    let scratch = blocking("receive", move || {
        checked().map_err(failed)?;
        NamedTempFile::new_in(directory).map_err(failed)
    });
    let scratch = scratch.await?;
    let mut file = tokio::fs::File::from_std(scratch.reopen().map_err(failed)?);
    let (mut length, mut unseen) = (0u64, 0u64);
    let mut pace = Pace::new(Instant::now());
    loop {
        let next = tokio::time::timeout_at(Instant::now() + STALL, archive.next()).await;
        let stalled = || refused(HostErrorKind::Permanent, "nothing came for 30 s");
        let Some(chunk) = next.map_err(|_| stalled())? else { break };
        let chunk = chunk.map_err(failed)?;
        pace.received(chunk.len());
        if !pace.is_kept(Instant::now()) {
            return Err(refused(HostErrorKind::Permanent, "it comes too slowly"));
        }
        (length, unseen) = (length + chunk.len() as u64, unseen + chunk.len() as u64);
        if length > size_max {
            return Ok(None);
        }
        if unseen >= ROOM_INTERVAL_BYTES {
            unseen = 0;
            let need_room = need_room.clone();
            blocking("receive", move || need_room().map_err(failed)).await?;
        }
        file.write_all(&chunk).await.map_err(failed)?;
    }
    file.flush().await.map_err(failed)?;
    Ok(Some(scratch))
}
