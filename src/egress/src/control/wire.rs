//! The frames of the control socket: a length, JSON, and files.
//!
//! Guarantees: no bytes make it panic; a frame is at most as large as the largest policy; the bytes of a frame are cleared
//! when it is read or written; files that are not expected are closed; no error contains a part of a message.

use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use stead_schemas::limits::{
    EGRESS_CREDENTIAL_NAME_BYTES_MAX, EGRESS_CREDENTIALS_MAX, EGRESS_FORMAT_BYTES_MAX, EGRESS_HOSTS_MAX,
    EGRESS_INJECTIONS_MAX, EGRESS_VALUE_BYTES_MAX, HEADER_NAME_BYTES_MAX, HOSTNAME_BYTES_MAX,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use zeroize::Zeroizing;

/// Time within which a request and its reply must be exchanged. The daemon and the process are on one host, and a
/// policy takes milliseconds.
pub(super) const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(10);
/// Number of files that come with a policy: those of the audit log.
pub(super) const FILES: usize = 2;
/// Length of the length of a frame, in bytes.
const LENGTH_BYTES: usize = size_of::<u32>();

/// Bytes of JSON around a value: its name, marks and braces.
const SYNTAX_BYTES: usize = 128;
/// Largest number of bytes of JSON for one byte of a field's value, which has no control characters.
const ESCAPE_FACTOR: usize = 2;
/// Largest certificate with its key in PEM, in bytes; those that are made here have about 1 KiB.
const AUTHORITY_BYTES_MAX: usize = 64 << 10;
/// Largest list of patterns in JSON, in bytes.
const PATTERNS_BYTES_MAX: usize = EGRESS_HOSTS_MAX * (HOSTNAME_BYTES_MAX + "\"*.\",".len()) + SYNTAX_BYTES;
/// Largest injection in JSON, in bytes.
const INJECTION_BYTES_MAX: usize =
    PATTERNS_BYTES_MAX + HEADER_NAME_BYTES_MAX + ESCAPE_FACTOR * EGRESS_FORMAT_BYTES_MAX + SYNTAX_BYTES;
/// Largest credential in JSON, in bytes.
const CREDENTIAL_BYTES_MAX: usize = EGRESS_CREDENTIAL_NAME_BYTES_MAX
    + ESCAPE_FACTOR * EGRESS_VALUE_BYTES_MAX
    + EGRESS_INJECTIONS_MAX * INJECTION_BYTES_MAX
    + SYNTAX_BYTES;
/// Largest frame, in bytes without its length: that of the largest policy, about 20 MiB. The list of all fingerprints,
/// for the 1,023 ports of a bridge, is much smaller.
pub(super) const FRAME_BYTES_MAX: usize = EGRESS_CREDENTIALS_MAX * CREDENTIAL_BYTES_MAX
    + PATTERNS_BYTES_MAX
    + AUTHORITY_BYTES_MAX
    + 4 * SYNTAX_BYTES;

/// The reason why a message was not sent or received. It contains no part of the message.
#[derive(Debug, thiserror::Error)]
pub(super) enum WireError {
    #[error("the connection failed")]
    Io(#[from] io::Error),
    #[error("the message has {0} bytes; at most {most} are allowed", most = FRAME_BYTES_MAX)]
    TooLarge(usize),
    #[error("the message came with too many files, or something else than files")]
    UnexpectedFiles,
    #[error("the message is malformed at byte {0}")]
    Malformed(usize),
}

/// A writer that only counts.
#[derive(Default)]
struct Count(usize);

impl Write for Count {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Returns the bytes of a frame. The buffer has its size from the start, so that no copy is left when it grows.
fn frame<T: Serialize>(message: &T) -> Result<Zeroizing<Vec<u8>>, WireError> {
    let mut count = Count::default();
    serde_json::to_writer(&mut count, message).map_err(io::Error::from)?;
    let length = u32::try_from(count.0).ok().filter(|_| count.0 <= FRAME_BYTES_MAX);
    let length = length.ok_or(WireError::TooLarge(count.0))?;
    let mut bytes = Zeroizing::new(Vec::with_capacity(LENGTH_BYTES + count.0));
    bytes.extend_from_slice(&length.to_be_bytes());
    serde_json::to_writer(&mut *bytes, message).map_err(io::Error::from)?;
    Ok(bytes)
}

/// Reads a message from the bytes of a frame.
fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    // The library's text may quote a value.
    serde_json::from_slice(bytes).map_err(|error| WireError::Malformed(error.column()))
}

/// Sends a message, with files attached to its first byte.
///
/// # Errors
/// Fails when the message is too large or the connection fails.
pub(super) async fn send<T: Serialize>(
    stream: &mut UnixStream,
    message: &T,
    files: &[BorrowedFd<'_>],
) -> Result<(), WireError> {
    let bytes = frame(message)?;
    let sent = stream.async_io(Interest::WRITABLE, || send_first(stream, &bytes, files)).await?;
    stream.write_all(&bytes[sent..]).await?;
    Ok(())
}

fn send_first(stream: &UnixStream, bytes: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
}

/// Receives a message and the files that came with its first byte.
///
/// # Errors
/// Fails when the message is too large or malformed, or the connection ends or fails.
pub(super) async fn receive<T: DeserializeOwned>(
    stream: &mut UnixStream,
) -> Result<(T, Vec<OwnedFd>), WireError> {
    let mut length = [0; LENGTH_BYTES];
    let first = stream.async_io(Interest::READABLE, || receive_first(stream, &mut length)).await?;
    if first.bytes == 0 {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    stream.read_exact(&mut length[first.bytes..]).await?;
    let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
    if first.is_unexpected {
        return Err(WireError::UnexpectedFiles);
    }
    if length > FRAME_BYTES_MAX {
        return Err(WireError::TooLarge(length));
    }
    // Zeroed memory that nothing was written to takes no room.
    let mut bytes = Zeroizing::new(vec![0; length]);
    stream.read_exact(&mut bytes).await?;
    Ok((parse(&bytes)?, first.files))
}

/// The first bytes of a frame, and what came with them.
struct First {
    bytes: usize,
    files: Vec<OwnedFd>,
    /// True if there was more than files, or too many of them.
    is_unexpected: bool,
}

fn receive_first(stream: &UnixStream, bytes: &mut [u8]) -> io::Result<First> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(stream, &mut [IoSliceMut::new(bytes)], &mut control, flags)?;
    let mut files = Vec::new();
    let mut is_unexpected = received.flags.contains(ReturnFlags::CTRUNC);
    for message in control.drain() {
        match message {
            RecvAncillaryMessage::ScmRights(rights) => files.extend(rights),
            _ => is_unexpected = true,
        }
    }
    Ok(First { bytes: received.bytes, is_unexpected: is_unexpected || files.len() > FILES, files })
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
