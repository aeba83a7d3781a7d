//! Uploads of archives by clients: bounded in size, disk space, pace and number, then imported.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use stead_controllers::host::{HostError, HostErrorKind};
use tokio::io::AsyncWriteExt;
use tokio::time::Instant;

use super::jobs::Stop;
use super::transfer::Pace;
use super::unpack::UNPACKED_BYTES_MAX;
use super::{Hold, Oci, blocking, import, rootfs};

/// Limit on simultaneous uploads. Each has a file on the disk.
pub(super) const UPLOADS_MAX: usize = 16;
/// Time limit of one upload. An archive too large for a slow line goes through a registry.
const UPLOAD_DEADLINE: Duration = Duration::from_secs(3600);
/// Time after which a client that sends nothing is considered gone.
const STALL: Duration = Duration::from_secs(30);
/// Time limit for reading and building an upload.
const IMPORT_DEADLINE: Duration = Duration::from_secs(3600);
/// Number of bytes written between two checks of the free disk space.
const ROOM_INTERVAL_BYTES: u64 = 16 << 20;

fn failed(error: io::Error) -> HostError {
    HostError::io("receive", "an archive", error)
}

fn refused(kind: HostErrorKind, words: &str) -> HostError {
    HostError::new(kind, "receive", "an archive").because(words)
}

impl Oci {
    /// Receives an archive from a client and builds its root file system. The hold keeps the content. One client may
    /// use at most half of the uploads.
    ///
    /// # Errors
    /// Permanent, with the reason, if the archive is no image or is hostile. Exhausted if there is no room. Transient
    /// while too many uploads run.
    pub async fn import(
        &self,
        client: &Arc<str>,
        archive: impl Stream<Item = io::Result<Bytes>> + Send + Unpin,
    ) -> Result<Hold, HostError> {
        let busy = || refused(HostErrorKind::Transient, "too many archives are being received");
        let share = self.uploads_of.take(client).ok_or_else(busy)?;
        let upload = self.uploads.try_acquire().map_err(|_| busy())?;
        let received = tokio::time::timeout(UPLOAD_DEADLINE, self.receive(archive)).await;
        let late = || refused(HostErrorKind::Permanent, "it took more than an hour; use a registry");
        let scratch = received.map_err(|_| late())??;
        drop((upload, share));
        let permit = self.jobs.conversion_of(client).await;
        let (layout, target) = (self.layout.clone(), self.target);
        // When this is dropped, the work on the blocking thread ends: the client is gone, or the time is over.
        let (given_up, stop) = Stop::new();
        let work = blocking("import", move || {
            let _permit = permit;
            let (manifest, hold) = import::import(&layout, scratch.path(), target, &stop)?;
            rootfs::build(&layout, &manifest, &stop)?;
            Ok(hold)
        });
        let _given_up = given_up;
        let late = || refused(HostErrorKind::Permanent, "it takes more than an hour to unpack");
        tokio::time::timeout(IMPORT_DEADLINE, work).await.map_err(|_| late())?
    }

    async fn receive(
        &self,
        mut archive: impl Stream<Item = io::Result<Bytes>> + Send + Unpin,
    ) -> Result<tempfile::NamedTempFile, HostError> {
        let layout = self.layout.clone();
        let scratch = blocking("receive", move || {
            layout.need_room(0).map_err(failed)?;
            tempfile::NamedTempFile::new_in(layout.scratch()).map_err(failed)
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
            if length > UNPACKED_BYTES_MAX {
                return Err(refused(HostErrorKind::Permanent, "it is larger than an image may be"));
            }
            if unseen >= ROOM_INTERVAL_BYTES {
                unseen = 0;
                let layout = self.layout.clone();
                blocking("receive", move || layout.need_room(0).map_err(failed)).await?;
            }
            file.write_all(&chunk).await.map_err(failed)?;
        }
        file.flush().await.map_err(failed)?;
        Ok(scratch)
    }
}
