//! Detection of connections over which no data moves.
//!
//! Guarantees: a connection over which no byte went either way for [`INGRESS_STALL_MAX`] is reported within
//! twice that time.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use stead_schemas::limits::INGRESS_STALL_MAX;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::sleep;

/// A counter of reads and writes; clones share the count.
#[derive(Debug, Clone, Default)]
pub(super) struct Progress(Arc<AtomicU64>);

impl Progress {
    fn note(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// Waits until no data has moved for [`INGRESS_STALL_MAX`].
    pub(super) async fn stalled(&self) {
        let mut before = self.0.load(Ordering::Relaxed);
        loop {
            sleep(INGRESS_STALL_MAX).await;
            let now = self.0.load(Ordering::Relaxed);
            if now == before {
                return;
            }
            before = now;
        }
    }
}

/// A connection whose progress is counted.
pub(super) struct Watched {
    pub(super) stream: TcpStream,
    pub(super) progress: Progress,
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        if buffer.filled().len() > before {
            self.progress.note();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let count = ready!(Pin::new(&mut self.stream).poll_write(context, bytes))?;
        self.progress.note();
        Poll::Ready(Ok(count))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let count = ready!(Pin::new(&mut self.stream).poll_write_vectored(context, pieces))?;
        self.progress.note();
        Poll::Ready(Ok(count))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::{Instant, timeout};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_moves_now_and_then_is_not_stalled() {
        let progress = Progress::default();
        let began = Instant::now();
        for _ in 0..4 {
            progress.note();
            let ended = timeout(INGRESS_STALL_MAX + Duration::from_secs(1), progress.stalled());
            let moves = async {
                sleep(INGRESS_STALL_MAX / 2).await;
                progress.note();
                std::future::pending::<()>().await;
            };
            tokio::select! {
                ended = ended => assert!(ended.is_err(), "after {:?}", began.elapsed()),
                () = moves => {}
            }
        }
        let began = Instant::now();
        progress.stalled().await;
        assert!(began.elapsed() <= INGRESS_STALL_MAX * 2, "{:?}", began.elapsed());
    }
}
