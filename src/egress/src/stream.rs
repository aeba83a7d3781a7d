//! The guest's end of a connection: a TCP stream with the bytes that were read ahead, and its progress.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use rustix::net::sockopt::set_tcp_quickack;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::progress::Progress;

/// A stream to a guest.
#[derive(Debug)]
pub(crate) struct GuestStream {
    tcp: TcpStream,
    /// Bytes that are read before those of the socket.
    ahead: Bytes,
    pub(crate) progress: Progress,
}

impl GuestStream {
    pub(crate) fn new(tcp: TcpStream) -> Self {
        Self { tcp, ahead: Bytes::new(), progress: Progress::new() }
    }

    /// Waits until the guest has sent bytes or closed the connection. Nothing is read.
    pub(crate) async fn readable(&self) {
        if self.ahead.is_empty() {
            // An error is found again by the next read.
            let _ = self.tcp.readable().await;
        }
    }

    /// Acknowledges what was read at once. A client that waits for that before it sends more would wait for the kernel's
    /// delay of 40 ms.
    pub(crate) fn acknowledge(&self) {
        // An option that cannot be set only delays that.
        let _ = set_tcp_quickack(&self.tcp, true);
    }

    /// Puts bytes back before all that has not been read.
    pub(crate) fn put_back(&mut self, bytes: Bytes) {
        if self.ahead.is_empty() {
            self.ahead = bytes;
        } else {
            self.ahead = [bytes, std::mem::take(&mut self.ahead)].concat().into();
        }
    }
}

impl AsyncRead for GuestStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.ahead.is_empty() {
            let count = self.ahead.len().min(buffer.remaining());
            buffer.put_slice(&self.ahead[..count]);
            self.ahead.advance(count);
            return Poll::Ready(Ok(()));
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.tcp).poll_read(context, buffer))?;
        if buffer.filled().len() > before {
            self.progress.note_read();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for GuestStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let count = ready!(Pin::new(&mut self.tcp).poll_write(context, bytes))?;
        self.progress.note_write();
        Poll::Ready(Ok(count))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let count = ready!(Pin::new(&mut self.tcp).poll_write_vectored(context, pieces))?;
        self.progress.note_write();
        Poll::Ready(Ok(count))
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(context)
    }
}
