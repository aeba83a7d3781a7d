//! Tunnels: bytes are copied both ways and counted.
//!
//! Guarantees: an idle tunnel holds no buffer. Bytes are read into a buffer that all tunnels of a thread share, and only
//! those that the other end does not take at once are kept, at most [`EGRESS_TUNNEL_BUFFER_BYTES_MAX`] in each direction:
//! until they are taken, nothing more is read. The end of one direction is passed on while the other goes on.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use stead_schemas::limits::EGRESS_TUNNEL_BUFFER_BYTES_MAX;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::audit::Counts;

thread_local! {
    /// The buffer that bytes pass through within one poll.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; EGRESS_TUNNEL_BUFFER_BYTES_MAX].into());
}

/// Copies bytes between a guest and a server until both directions end.
pub(crate) async fn copy<Guest, Server>(
    mut guest: Guest,
    mut server: Server,
    counts: &Counts,
) -> io::Result<()>
where
    Guest: AsyncRead + AsyncWrite + Unpin,
    Server: AsyncRead + AsyncWrite + Unpin,
{
    let (mut up, mut down) = (Direction::new(&counts.up), Direction::new(&counts.down));
    poll_fn(|context| {
        let up = up.poll(context, Pin::new(&mut guest), Pin::new(&mut server))?;
        let down = down.poll(context, Pin::new(&mut server), Pin::new(&mut guest))?;
        if up.is_ready() && down.is_ready() { Poll::Ready(Ok(())) } else { Poll::Pending }
    })
    .await
}

/// A direction of a tunnel.
struct Direction<'a> {
    /// Bytes that were read and not yet taken by the writer.
    rest: Bytes,
    is_flushed: bool,
    has_ended: bool,
    is_shut: bool,
    count: &'a AtomicU64,
}

impl<'a> Direction<'a> {
    fn new(count: &'a AtomicU64) -> Self {
        Self { rest: Bytes::new(), is_flushed: true, has_ended: false, is_shut: false, count }
    }

    /// Copies until one end has to be waited for, or the direction is over.
    fn poll<Reader: AsyncRead, Writer: AsyncWrite>(
        &mut self,
        context: &mut Context<'_>,
        mut reader: Pin<&mut Reader>,
        mut writer: Pin<&mut Writer>,
    ) -> Poll<io::Result<()>> {
        while !self.is_shut {
            while self.rest.has_remaining() {
                let taken = ready!(writer.as_mut().poll_write(context, &self.rest))?;
                self.taken(taken)?;
                self.rest.advance(taken);
            }
            // The memory is given back.
            self.rest = Bytes::new();
            if !self.is_flushed {
                ready!(writer.as_mut().poll_flush(context))?;
                self.is_flushed = true;
            }
            if self.has_ended {
                ready!(writer.as_mut().poll_shutdown(context))?;
                self.is_shut = true;
            } else {
                ready!(self.pass(context, reader.as_mut(), writer.as_mut()))?;
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Reads once, and writes what was read as far as it is taken at once.
    fn pass<Reader: AsyncRead, Writer: AsyncWrite>(
        &mut self,
        context: &mut Context<'_>,
        reader: Pin<&mut Reader>,
        writer: Pin<&mut Writer>,
    ) -> Poll<io::Result<()>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            ready!(reader.poll_read(context, &mut buffer))?;
            let bytes = buffer.filled();
            if bytes.is_empty() {
                self.has_ended = true;
                return Poll::Ready(Ok(()));
            }
            self.is_flushed = false;
            let taken = match writer.poll_write(context, bytes)? {
                Poll::Ready(taken) => {
                    self.taken(taken)?;
                    taken
                }
                Poll::Pending => 0,
            };
            self.rest = Bytes::copy_from_slice(&bytes[taken..]);
            Poll::Ready(Ok(()))
        })
    }

    fn taken(&self, bytes: usize) -> io::Result<()> {
        if bytes == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.count.fetch_add(u64::try_from(bytes).unwrap_or(u64::MAX), Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test]
    async fn a_direction_that_ends_leaves_the_other_open() {
        let (mut client, guest) = duplex(64);
        let (server, mut origin) = duplex(64);
        let counts = Counts::default();
        let talk = async {
            client.write_all(b"question").await.expect("sent");
            client.shutdown().await.expect("ended");
            let mut question = String::new();
            origin.read_to_string(&mut question).await.expect("read to its end");
            assert_eq!(question, "question");
            origin.write_all(b"an answer").await.expect("sent");
            drop(origin);
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.expect("read to its end");
            assert_eq!(answer, "an answer");
        };
        let (copied, ()) = tokio::join!(copy(guest, server, &counts), talk);
        copied.expect("copied");
        assert_eq!((counts.up.load(Ordering::Relaxed), counts.down.load(Ordering::Relaxed)), (8, 9));
    }

    #[tokio::test]
    async fn a_large_transfer_arrives_whole() {
        let (mut client, guest) = duplex(1 << 20);
        let (server, mut origin) = duplex(1 << 20);
        let counts = Counts::default();
        let data: Vec<u8> = (0..3_000_000u32).map(|number| number.to_le_bytes()[0]).collect();
        let send = async {
            client.write_all(&data).await.expect("sent");
            drop(client);
        };
        let receive = async {
            let mut received = Vec::new();
            origin.read_to_end(&mut received).await.expect("read");
            drop(origin);
            received
        };
        let (_, (), received) = tokio::join!(copy(guest, server, &counts), send, receive);
        assert!(received == data, "{} bytes arrived", received.len());
    }

    #[tokio::test]
    async fn what_is_not_taken_is_bounded_and_arrives_later() {
        let (mut client, guest) = duplex(1 << 20);
        let (server, mut origin) = duplex(1000);
        let counts = Counts::default();
        let data: Vec<u8> = (0..300_000u32).map(|number| number.to_le_bytes()[1]).collect();
        client.write_all(&data).await.expect("there is room");
        client.shutdown().await.expect("ended");
        let mut copying = std::pin::pin!(copy(guest, server, &counts));
        // The server takes nothing beyond its buffer, however often the tunnel is polled.
        for _ in 0..100 {
            assert!(futures::poll!(copying.as_mut()).is_pending());
        }
        assert_eq!(counts.up.load(Ordering::Relaxed), 1000);
        let receive = async {
            let mut received = Vec::new();
            origin.read_to_end(&mut received).await.expect("read");
            drop(origin);
            received
        };
        drop(client);
        let (_, received) = tokio::join!(copying, receive);
        assert!(received == data, "{} bytes arrived", received.len());
    }
}
