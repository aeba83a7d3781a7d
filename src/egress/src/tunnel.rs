//! Tunnels: bytes are copied both ways and counted.
//!
//! Guarantees: an idle direction has a small buffer, and a busy one at most [`EGRESS_TUNNEL_BUFFER_BYTES_MAX`];
//! the end of one direction is passed on while the other goes on; a writer that takes nothing stops the
//! reader.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use stead_schemas::limits::EGRESS_TUNNEL_BUFFER_BYTES_MAX;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split};

use crate::audit::Counts;

/// Size of the buffer of an idle direction, in bytes.
const BUFFER_BYTES_MIN: usize = 2 << 10;
/// Factor by which a buffer grows that was filled whole.
const GROWTH: usize = 4;

/// Copies bytes between a guest and a server until both directions end.
pub(crate) async fn copy<Guest, Server>(guest: Guest, server: Server, counts: &Counts) -> io::Result<()>
where
    Guest: AsyncRead + AsyncWrite,
    Server: AsyncRead + AsyncWrite,
{
    let (mut from_guest, mut to_guest) = split(guest);
    let (mut from_server, mut to_server) = split(server);
    tokio::try_join!(
        pump(&mut from_guest, &mut to_server, &counts.up),
        pump(&mut from_server, &mut to_guest, &counts.down),
    )?;
    Ok(())
}

/// Copies one direction to its end.
async fn pump<Reader, Writer>(reader: &mut Reader, writer: &mut Writer, count: &AtomicU64) -> io::Result<()>
where
    Reader: AsyncRead + Unpin,
    Writer: AsyncWrite + Unpin,
{
    let mut buffer = vec![0; BUFFER_BYTES_MIN];
    loop {
        let length = reader.read(&mut buffer).await?;
        if length == 0 {
            return writer.shutdown().await;
        }
        writer.write_all(&buffer[..length]).await?;
        writer.flush().await?;
        count.fetch_add(u64::try_from(length).unwrap_or(u64::MAX), Ordering::Relaxed);
        if length == buffer.len() && length < EGRESS_TUNNEL_BUFFER_BYTES_MAX {
            buffer = vec![0; (length * GROWTH).min(EGRESS_TUNNEL_BUFFER_BYTES_MAX)];
        } else if length < buffer.len() / GROWTH && buffer.len() > BUFFER_BYTES_MIN {
            buffer = vec![0; BUFFER_BYTES_MIN];
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

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
}
