//! The way in which the host reaches the guest's end of the channel.

use std::io;
use std::path::PathBuf;

use tokio::net::UnixStream;

/// The way to the guest that a driver sets up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Transport {
    /// A port of a virtio console. The VMM listens on this socket, one connection at a time, and the
    /// connection carries the bytes of the port from its first byte on.
    VirtioSerial { socket: PathBuf },
}

impl Transport {
    /// Connects once.
    ///
    /// # Errors
    /// Returns an error when the VMM does not listen yet, or not any more.
    pub async fn connect(&self) -> io::Result<UnixStream> {
        match self {
            Self::VirtioSerial { socket } => UnixStream::connect(socket).await,
        }
    }
}
