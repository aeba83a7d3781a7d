//! The server of the control socket.
//!
//! Guarantees: a client that is neither root nor the user of the daemon is closed unread; at most
//! [`CONNECTIONS_MAX`] connections are served at once, each for at most [`EXCHANGE_TIMEOUT`]; accepting goes on after any
//! error but the loss of the socket.
//! Cancel: when this is dropped, its connections end.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use stead_schemas::egress::{ControlReply, ControlRequest};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::answer::Control;
use super::wire::{EXCHANGE_TIMEOUT, WireError, receive, send};

/// Largest number of connections that are served at once. The daemon has a few; the rest is for a new daemon beside one
/// that hangs.
const CONNECTIONS_MAX: usize = 16;
/// Pause after a failed accept (no descriptors), long enough not to spin and short enough not to be noticed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Root's id, which may do everything anyway.
const ROOT: u32 = 0;

/// Serves the control socket for root and the user with this id, until the socket is lost.
pub(crate) async fn serve(listener: UnixListener, control: Arc<Control>, daemon_uid: u32) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        let next = async {
            let permit = permits.clone().acquire_owned().await;
            (permit, listener.accept().await)
        };
        // Finished connections are removed. Both arms may be dropped without losing a connection.
        let (permit, accepted) = tokio::select! {
            biased;
            Some(_) = connections.join_next() => continue,
            next = next => next,
        };
        match accepted {
            Ok((stream, _)) if is_served(&stream, daemon_uid) => {
                let control = control.clone();
                connections.spawn(async move {
                    let _permit = permit;
                    exchange(stream, &control).await;
                });
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                tracing::warn!(%error, "the control socket was lost");
                return;
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection of the daemon");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Returns `true` if the client's user may control the process. The kernel keeps the user that connected.
fn is_served(stream: &UnixStream, daemon_uid: u32) -> bool {
    match stream.peer_cred() {
        Ok(peer) if [ROOT, daemon_uid].contains(&peer.uid()) => true,
        Ok(peer) => {
            tracing::warn!(uid = peer.uid(), "a user who may not control the process was refused");
            false
        }
        Err(error) => {
            tracing::warn!(%error, "the user of a connection is not known");
            false
        }
    }
}

/// Serves one request.
async fn exchange(mut stream: UnixStream, control: &Control) {
    let exchanged = timeout(EXCHANGE_TIMEOUT, async {
        let reply = match receive::<ControlRequest>(&mut stream).await {
            Ok((request, files)) => control.answer(request, files),
            Err(WireError::Io(error)) => return Err(error.into()),
            Err(error) => ControlReply::Refused(error.to_string()),
        };
        if let ControlReply::Refused(text) = &reply {
            tracing::warn!(reason = text.as_str(), "a request of the daemon was refused");
        }
        send(&mut stream, &reply, &[]).await
    });
    match exchanged.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "an exchange with the daemon failed"),
        Err(_) => tracing::warn!("an exchange with the daemon took too long"),
    }
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
