//! Imports of images: an archive of a client becomes a root file system.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use stead_controllers::host::{HostError, HostErrorKind};

use super::jobs::Stop;
use super::receive::{Bounds, Uploads};
use super::unpack::UNPACKED_BYTES_MAX;
use super::{Hold, Oci, blocking, import, rootfs};

/// Time limit for reading and building an upload.
const IMPORT_DEADLINE: Duration = Duration::from_secs(3600);

impl Oci {
    /// Receives an archive from a client and builds its root file system. The hold keeps the content.
    ///
    /// # Errors
    /// Permanent, with the reason, if the archive is no image or is hostile. Exhausted if there is no room. Transient
    /// while too many uploads run.
    pub async fn import(
        &self,
        client: &Arc<str>,
        archive: impl Stream<Item = io::Result<Bytes>> + Send + Unpin,
    ) -> Result<Hold, HostError> {
        let refused =
            |words: &str| HostError::new(HostErrorKind::Permanent, "receive", "an archive").because(words);
        let received = self.uploads.receive(client, archive, self.bounds()).await?;
        let scratch = received.ok_or_else(|| refused("it is larger than an image may be"))?;
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
        let late = || refused("it takes more than an hour to unpack");
        tokio::time::timeout(IMPORT_DEADLINE, work).await.map_err(|_| late())?
    }

    /// Returns the uploads, which all archives of clients share.
    pub(in crate::host) fn uploads(&self) -> Uploads {
        self.uploads.clone()
    }

    fn bounds(&self) -> Bounds {
        let layout = self.layout.clone();
        Bounds {
            directory: layout.scratch(),
            size_max: UNPACKED_BYTES_MAX,
            need_room: Arc::new(move || layout.need_room(0)),
        }
    }
}
