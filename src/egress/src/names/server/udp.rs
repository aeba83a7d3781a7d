//! Questions by UDP.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::UdpSocket;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::names::limits::{SOCKET_PAUSE, UDP_QUESTION_BYTES_MAX};
use crate::names::message::Transport;
use crate::names::resolver::{Resolver, Step};

/// Answers questions for ever.
pub(super) async fn serve(resolver: Arc<Resolver>, socket: Arc<UdpSocket>) {
    // As many as have a share of the questions that wait, so the set is bounded.
    let mut waiting = JoinSet::new();
    // One byte more than a question may have: what fills it is too long.
    let mut buffer = [0; UDP_QUESTION_BYTES_MAX + 1];
    loop {
        // Both arms may be dropped without losing a message.
        let received = tokio::select! {
            biased;
            Some(_) = waiting.join_next() => continue,
            received = socket.recv_from(&mut buffer) => received,
        };
        let (length, sender) = match received {
            Ok(received) => received,
            Err(error) => {
                tracing::debug!(%error, "cannot receive a question");
                resolver.counters().socket_errors.add_one();
                sleep(SOCKET_PAUSE).await;
                continue;
            }
        };
        match resolver.begin(sender.ip().to_canonical(), Transport::Udp, &buffer[..length]) {
            Step::Silence | Step::TooOften(None) => {}
            Step::Reply(bytes) | Step::TooOften(Some(bytes)) => send(&resolver, &socket, sender, &bytes),
            Step::Wait(pending) => {
                let (resolver, socket) = (resolver.clone(), socket.clone());
                waiting.spawn(async move {
                    if let Some(bytes) = resolver.clone().finish(pending).await {
                        send(&resolver, &socket, sender, &bytes);
                    }
                });
            }
        }
    }
}

/// Sends an answer. One that the kernel has no room for is dropped, as the network may do too: the guest asks again.
fn send(resolver: &Resolver, socket: &UdpSocket, guest: SocketAddr, bytes: &[u8]) {
    if let Err(error) = socket.try_send_to(bytes, guest) {
        tracing::debug!(%error, %guest, "cannot send an answer");
        resolver.counters().unsent.add_one();
    }
}
