//! The sockets on which the API is served: TCP, with or without TLS, and Unix sockets, whose clients the kernel
//! names.

use std::io;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::client::Client;
use super::local::LocalUsers;
use super::tls::Tls;

/// A socket that takes connections.
#[derive(Debug)]
pub enum Listener {
    Tcp { listener: TcpListener, tls: Option<Tls> },
    Local { listener: UnixListener, users: LocalUsers },
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Self {
        Self::Tcp { listener, tls: None }
    }
}

/// The stream of a connection, on which nothing was exchanged yet.
pub(super) enum Stream {
    Tcp(TcpStream),
    Tls(TcpStream, Tls),
    Local(UnixStream),
}

/// A stream of bytes of any kind.
pub(super) trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

impl Stream {
    /// Sends bytes to a client that is not served, as far as the kernel takes them at once. A client that expects
    /// TLS gets none.
    pub(super) fn send_at_once(&self, bytes: &[u8]) {
        let _ = match self {
            Self::Tcp(stream) => stream.try_write(bytes),
            Self::Local(stream) => stream.try_write(bytes),
            Self::Tls(..) => Ok(0),
        };
    }
}

impl Listener {
    fn poll_accept(&self, context: &mut Context<'_>) -> Poll<io::Result<(Stream, Client)>> {
        match self {
            Self::Tcp { listener, tls } => {
                let (stream, client) = ready!(listener.poll_accept(context))?;
                let stream = match tls {
                    Some(tls) => Stream::Tls(stream, tls.clone()),
                    None => Stream::Tcp(stream),
                };
                Poll::Ready(Ok((stream, Client::Network(client.ip().to_canonical()))))
            }
            Self::Local { listener, users } => {
                let (stream, _) = ready!(listener.poll_accept(context))?;
                let peer = users.peer(&stream)?;
                Poll::Ready(Ok((Stream::Local(stream), Client::Local(peer.into()))))
            }
        }
    }
}

/// All sockets of a server.
#[derive(Debug)]
pub(super) struct Listeners {
    all: Vec<Listener>,
    first: usize,
}

impl Listeners {
    pub(super) fn new(all: Vec<Listener>) -> Self {
        Self { all, first: 0 }
    }

    /// Accepts a connection on any socket. Each call begins with another socket, so that a flood of connections
    /// on one does not keep out those on another. May be dropped without losing a connection.
    pub(super) async fn accept(&mut self) -> io::Result<(Stream, Client)> {
        self.first = (self.first + 1) % self.all.len().max(1);
        let (last, first) = self.all.split_at(self.first);
        std::future::poll_fn(|context| {
            for listener in first.iter().chain(last) {
                if let Poll::Ready(accepted) = listener.poll_accept(context) {
                    return Poll::Ready(accepted);
                }
            }
            Poll::Pending
        })
        .await
    }
}
