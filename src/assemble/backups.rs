//! A backup as a stream, made by a thread while its reader consumes it.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use stead_controllers::store::{KvError, Store, StoreError};
use tokio::sync::{Semaphore, mpsc};

use crate::api::ImportStream;
use crate::store::backup;

/// Number of concurrent backups: each holds a copy of the store's references until its reader has taken it.
const BACKUPS_MAX: usize = 2;
/// Size of a chunk of the stream, in bytes.
const CHUNK_BYTES: usize = 64 << 10;
/// Number of chunks that wait for the reader.
const CHUNKS_MAX: usize = 4;

/// A maker of backups of one data directory.
#[derive(Debug, Clone)]
pub(super) struct Backups {
    store: Store,
    data_dir: PathBuf,
    permits: Arc<Semaphore>,
}

impl Backups {
    pub(super) fn new(store: Store, data_dir: PathBuf) -> Self {
        Self { store, data_dir, permits: Arc::new(Semaphore::new(BACKUPS_MAX)) }
    }

    /// Takes a copy of the store and returns its backup once it has begun; the stream ends with an error
    /// when the backup is incomplete.
    ///
    /// # Errors
    /// Returns [`StoreError::Overloaded`] while `BACKUPS_MAX` backups are in progress; fails when the backup
    /// cannot begin, for example without the seal key.
    pub(super) async fn begin(&self) -> Result<ImportStream, StoreError> {
        let permit = self.permits.clone().try_acquire_owned().map_err(|_| StoreError::Overloaded)?;
        let export = self.store.export().await?;
        let (sender, mut receiver) = mpsc::channel(CHUNKS_MAX);
        let data_dir = self.data_dir.clone();
        tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let mut out = io::BufWriter::with_capacity(CHUNK_BYTES, Sender(sender.clone()));
            let written = backup::write(&export, &data_dir, &mut out)
                .map_err(anyhow::Error::from)
                .and_then(|_| Ok(out.flush()?));
            // A reader that went away needs no reason.
            if let Err(error) = written
                && !sender.is_closed()
            {
                let error = format!("{error:#}");
                tracing::error!(error, "a backup could not be made");
                let _ = sender.blocking_send(Err(io::Error::other(error)));
            }
        });
        // The seal key and the files are read before anything is sent: without them the request fails
        // instead of the stream.
        let first = receiver.recv().await;
        let first = first.transpose().map_err(|error| KvError::Io(error.to_string()))?;
        let rest = futures::stream::unfold(receiver, |mut receiver| async {
            let chunk = receiver.recv().await?;
            Some((chunk, receiver))
        });
        Ok(futures::stream::iter(first.map(Ok)).chain(rest).boxed())
    }
}

/// A writer that hands its bytes to the stream's reader.
struct Sender(mpsc::Sender<io::Result<Bytes>>);

impl Write for Sender {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let sent = self.0.blocking_send(Ok(Bytes::copy_from_slice(bytes)));
        sent.map(|()| bytes.len()).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
