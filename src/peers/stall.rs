//! Connections whose peer must take the data that it is sent.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

/// A connection whose writes fail once the peer has taken nothing for a time.
#[derive(Debug)]
pub(crate) struct Unstalled<Inner> {
    stream: Inner,
    most: Duration,
    timer: Pin<Box<Sleep>>,
    is_waiting: bool,
}

impl<Inner> Unstalled<Inner> {
    pub(crate) fn new(stream: Inner, most: Duration) -> Self {
        Self { stream, most, timer: Box::pin(sleep_until(Instant::now())), is_waiting: false }
    }

    /// Returns the outcome of a write, or an error when the peer has not let one through for too long.
    fn check<T>(&mut self, context: &mut Context<'_>, wrote: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if wrote.is_ready() {
            self.is_waiting = false;
            return wrote;
        }
        if !self.is_waiting {
            self.is_waiting = true;
            let ends = Instant::now() + self.most;
            self.timer.as_mut().reset(ends);
        }
        self.timer.as_mut().poll(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<Inner: AsyncRead + Unpin> AsyncRead for Unstalled<Inner> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<Inner: AsyncWrite + Unpin> AsyncWrite for Unstalled<Inner> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.check(context, wrote)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.stream).poll_write_vectored(context, pieces);
        self.check(context, wrote)
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
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const MOST: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_nothing_is_given_up_and_a_slow_one_is_served() {
        let (ours, mut theirs) = tokio::io::duplex(64);
        let mut ours = Unstalled::new(ours, MOST);
        let reads = async {
            let mut piece = [0; 16];
            for _ in 0..12 {
                tokio::time::sleep(MOST / 2).await;
                theirs.read_exact(&mut piece).await.expect("sent");
            }
            // The connection is kept open, and not read any more.
            std::future::pending::<()>().await;
        };
        let writes = async {
            ours.write_all(&[0; 192]).await.expect("taken in the end");
            ours.write_all(&[0; 192]).await.expect_err("never taken").kind()
        };
        let kind = tokio::select! {
            kind = writes => kind,
            () = reads => unreachable!("it goes on"),
        };
        assert_eq!(kind, io::ErrorKind::TimedOut);
    }
}
