//! The sockets of the resolver.
//!
//! Guarantees: an error of one message or connection ends nothing else; a lack of descriptors or memory makes a loop
//! pause and go on.

mod tcp;
mod udp;

use std::sync::Arc;

use tokio::net::{TcpListener, UdpSocket};

use super::resolver::Resolver;

/// Answers questions at both sockets for ever. When it is dropped, it closes the connections of all guests.
pub async fn serve(resolver: Arc<Resolver>, udp: UdpSocket, tcp: TcpListener) {
    tokio::join!(udp::serve(resolver.clone(), Arc::new(udp)), tcp::serve(resolver, tcp));
}
