//! The daemon's end of the control socket.
//!
//! Guarantees: a request ends within [`EXCHANGE_TIMEOUT`]; no error contains a part of the request or the reply.
//! Cancel: a dropped request may have been carried out; each may be repeated.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use stead_schemas::egress::{ControlReply, ControlRequest};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::wire::{EXCHANGE_TIMEOUT, FILES, WireError, receive, send};

/// The reason why there is no reply.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("the control socket is absent")]
    Absent,
    #[error("no process listens at the control socket")]
    NotListening,
    #[error("the process did not reply within {secs} s", secs = EXCHANGE_TIMEOUT.as_secs())]
    Silent,
    #[error("the process closed the connection without a reply")]
    Closed,
    #[error("the connection to the process failed")]
    Io(#[source] io::Error),
    #[error("the request has {0} bytes, which is too large")]
    TooLarge(usize),
    #[error("the reply of the process is malformed")]
    Malformed,
}

/// Sends a request to the process that listens at a socket, with the files of an audit log if there are any, and
/// returns the reply.
///
/// # Errors
/// Fails if the socket is absent, nobody listens, or the process does not reply in time, closes the connection or
/// replies with something else.
pub async fn ask(
    socket: &Path,
    request: &ControlRequest,
    files: Option<[OwnedFd; FILES]>,
) -> Result<ControlReply, ControlError> {
    let exchange = timeout(EXCHANGE_TIMEOUT, async {
        let mut stream = UnixStream::connect(socket).await.map_err(not_connected)?;
        let borrowed: Vec<_> = files.iter().flatten().map(AsFd::as_fd).collect();
        let sent = send(&mut stream, request, &borrowed).await;
        if let Err(WireError::TooLarge(bytes)) = sent {
            return Err(ControlError::TooLarge(bytes));
        }
        // A process that refuses a request may have replied before it was sent whole.
        let received = receive(&mut stream).await.map(|(reply, _)| reply);
        received.map_err(|error| without_reply(sent.err().unwrap_or(error)))
    });
    exchange.await.unwrap_or(Err(ControlError::Silent))
}

fn not_connected(error: io::Error) -> ControlError {
    match error.kind() {
        io::ErrorKind::NotFound => ControlError::Absent,
        io::ErrorKind::ConnectionRefused => ControlError::NotListening,
        // The queue of connections is full: the process accepts none.
        io::ErrorKind::WouldBlock => ControlError::Silent,
        _ => ControlError::Io(error),
    }
}

fn without_reply(error: WireError) -> ControlError {
    match error {
        WireError::Io(error) => match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                ControlError::Closed
            }
            _ => ControlError::Io(error),
        },
        WireError::TooLarge(_) | WireError::UnexpectedFiles | WireError::Malformed(_) => {
            ControlError::Malformed
        }
    }
}
