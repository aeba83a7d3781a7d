//! Questions by TCP: each message has its length in front of it (RFC 1035, section 4.2.2; RFC 7766).
//!
//! Guarantees: the questions of a connection are answered one after the other, so that a connection has the memory of
//! one; a guest that sends nothing, or sends or takes a message too slowly, is cut off after [`TCP_IDLE_MAX`].

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::names::limits::{
    SOCKET_PAUSE, TCP_CONNECTIONS_MAX, TCP_CONNECTIONS_PER_GUEST_MAX, TCP_IDLE_MAX, TCP_QUESTION_BYTES_MAX,
};
use crate::names::message::Transport;
use crate::names::resolver::{Resolver, Step};
use crate::names::shares::Shares;

/// Answers questions for ever.
pub(super) async fn serve(resolver: Arc<Resolver>, listener: TcpListener) {
    let shares = Shares::new(TCP_CONNECTIONS_PER_GUEST_MAX, TCP_CONNECTIONS_MAX);
    let mut connections = JoinSet::new();
    loop {
        // Finished connections are removed. Both arms may be dropped without losing a connection.
        let accepted = tokio::select! {
            biased;
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, sender)) => accept(&resolver, &shares, &mut connections, stream, sender),
            Err(error) => {
                tracing::debug!(%error, "cannot accept a connection");
                resolver.counters().socket_errors.add_one();
                sleep(SOCKET_PAUSE).await;
            }
        }
    }
}

/// Begins a connection, or closes it if the guest may not have it.
fn accept(
    resolver: &Arc<Resolver>,
    shares: &Arc<Shares>,
    connections: &mut JoinSet<()>,
    stream: TcpStream,
    sender: SocketAddr,
) {
    let guest = sender.ip().to_canonical();
    if resolver.guest(guest).is_none() {
        resolver.counters().from_nobody.add_one();
        return;
    }
    let Some(share) = shares.take(guest) else {
        resolver.counters().connections_refused.add_one();
        return;
    };
    let resolver = resolver.clone();
    connections.spawn(async move {
        if let Err(error) = connection(&resolver, stream, guest).await {
            tracing::debug!(%error, %guest, "a connection ended badly");
        }
        drop(share);
    });
}

/// Answers the questions of a connection until it ends, or one of them may not be answered.
async fn connection(resolver: &Arc<Resolver>, mut stream: TcpStream, guest: IpAddr) -> io::Result<()> {
    while let Some(question) = timeout(TCP_IDLE_MAX, receive(&mut stream)).await?? {
        let answer = match resolver.begin(guest, Transport::Tcp, &question) {
            Step::Silence | Step::TooOften(_) => return Ok(()),
            Step::Reply(bytes) => Some(bytes),
            Step::Wait(pending) => resolver.clone().finish(pending).await,
        };
        let Some(answer) = answer else { return Ok(()) };
        timeout(TCP_IDLE_MAX, send(&mut stream, &answer)).await??;
    }
    Ok(())
}

/// Receives a message; returns `None` at the end of the connection, and for one that is too long or empty.
async fn receive(stream: &mut TcpStream) -> io::Result<Option<Vec<u8>>> {
    let length = match stream.read_u16().await {
        Ok(length) => usize::from(length),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    if length == 0 || length > TCP_QUESTION_BYTES_MAX {
        return Ok(None);
    }
    let mut message = vec![0; length];
    stream.read_exact(&mut message).await?;
    Ok(Some(message))
}

/// Sends a message, in one piece with its length.
async fn send(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    let mut bytes = Vec::with_capacity(size_of::<u16>() + message.len());
    bytes.extend(length.to_be_bytes());
    bytes.extend(message);
    stream.write_all(&bytes).await
}
